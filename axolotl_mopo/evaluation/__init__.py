"""From trained policies to a decision: their responses, the responses' scores, the Pareto front."""
