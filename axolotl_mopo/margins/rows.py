"""Margin rewards that a row decides by itself."""

from axolotl_mopo.config import ColumnMargin, LengthMargin, MODPOConfig
from axolotl_mopo.data.entries import MODPOData
from axolotl_mopo.data.rows import RatedResponse


def row_margins(data: MODPOData, response: RatedResponse, tokens: int) -> list[float]:
    """The rewards of one response: scores as they stand in the data set, then minus its length.

    Args:
        data: which margins there are.
        response: its text and scores.
        tokens: its tokens, the end-of-turn token included.
    """
    scores = [response.score(field) for field in data.columns.values()]
    return scores + [length_reward(unit, response.text, tokens) for unit in data.lengths.values()]


def length_reward(unit: str, text: str, tokens: int) -> float:
    """The length penalty of arXiv 2310.03708's released code: minus one for every token, word or character."""
    return -float({"tokens": tokens, "words": len(text.split()), "characters": len(text)}[unit])


def row_margin_names(method: MODPOConfig) -> list[str]:
    """The margins that rows decide, in the order of `row_margins`."""
    kinds = (ColumnMargin, LengthMargin)
    return [name for kind in kinds for name, margin in method.margins.items() if isinstance(margin, kind)]
