"""Log with Axolotl's logger, which is imported on first use because it imports torch."""

from typing import Any


def warn(message: str, *values: Any) -> None:
    """Log a warning on the first rank only."""
    from axolotl.utils.logging import get_logger

    get_logger("axolotl.mopo").warning(message, *values)
