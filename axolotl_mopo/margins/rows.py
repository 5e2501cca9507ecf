"""Margin rewards that a row decides by itself."""

from axolotl_mopo.config import ColumnMargin, LengthMargin, MODPOConfig
from axolotl_mopo.data.entries import MODPOData
from axolotl_mopo.data.rows import RatedResponse


def row_margins(data: MODPOData, response: RatedResponse, tokens: int) -> list[float]:
    """The rewards of one response: scores as they stand in the data set, then minus its length.

    Lengths are the length penalty of arXiv 2310.03708's released code, a unit per token, word or character.

    Args:
        data: which margins there are.
        response: its text and scores.
        tokens: its tokens, the end-of-turn token included.
    """
    lengths = {"tokens": tokens, "words": len(response.text.split()), "characters": len(response.text)}
    scores = [response.score(field) for field in data.columns.values()]
    return scores + [-float(lengths[unit]) for unit in data.lengths.values()]


def row_margin_names(method: MODPOConfig) -> list[str]:
    """The margins that rows decide, in the order of `row_margins`."""
    kinds = (ColumnMargin, LengthMargin)
    return [name for kind in kinds for name, margin in method.margins.items() if isinstance(margin, kind)]
