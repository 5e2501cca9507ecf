"""Compare trained policies: generate responses, score them, find the Pareto front."""
