"""Errors of this package. Each message states what is wrong, where, and how to fix it."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names its key or its file."""


class DataError(ValueError):
    """Data that cannot be trained on; the message names the data set and the row."""


class RowError(ValueError):
    """An error in a row, raised by code that does not know the number of the row.

    Args:
        message: what is wrong and how to fix it.
        kind: the error in two or three words, by which dropped rows are counted.
    """

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


class LossError(RuntimeError):
    """A loss that is not finite; the message names the step and the rows."""


class NoiseError(ValueError):
    """A model whose forward pass gives different numbers in training and in evaluation mode."""
