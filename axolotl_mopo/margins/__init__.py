"""MODPO's margin rewards r_j (arXiv 2310.03708, section 3): what the other objectives think of a response."""
