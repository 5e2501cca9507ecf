"""Turns token ids into packed trees and computes completion log-probs; independent of Axolotl and TRL."""
