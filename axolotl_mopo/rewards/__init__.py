"""Sources of rewards. One file per source defines its settings, its validation, its digest and its rewards.

MODPO's margins r_j (arXiv 2310.03708, section 3) and the columns of `axolotl mopo score` use the same classes.
"""

from axolotl_mopo.config.sources import SOURCES, RewardSource
from axolotl_mopo.rewards.column import ColumnSource
from axolotl_mopo.rewards.function import FunctionSource
from axolotl_mopo.rewards.implicit import AdapterSource
from axolotl_mopo.rewards.length import LengthSource
from axolotl_mopo.rewards.reward_model import RewardModelSource
from axolotl_mopo.rewards.text import Rewards, TextSource

__all__ = [
    "SOURCES",
    "AdapterSource",
    "ColumnSource",
    "FunctionSource",
    "LengthSource",
    "RewardModelSource",
    "RewardSource",
    "Rewards",
    "TextSource",
]

SOURCES.update(
    column=ColumnSource,
    length=LengthSource,
    adapter=AdapterSource,
    reward_model=RewardModelSource,
    callable=FunctionSource,
)
