"""Token ids -> packed trees -> completion log-probs; knows nothing of Axolotl or TRL."""
