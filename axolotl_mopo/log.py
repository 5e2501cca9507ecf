"""Axolotl's logger for modules that must not import it before they need it, since it imports torch."""

from typing import Any


def warn(message: str, *values: Any) -> None:
    """Log a warning, on the first rank of a run only."""
    from axolotl.utils.logging import get_logger

    get_logger("axolotl.mopo").warning(message, *values)
