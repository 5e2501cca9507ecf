"""MODPO's margin rewards r_j (arXiv 2310.03708, section 3): what the other objectives think of a response."""

from axolotl_mopo.margins.rewards import ColumnReward, LengthReward, MarginReward, Response, build_margin

__all__ = ["ColumnReward", "LengthReward", "MarginReward", "Response", "build_margin"]
