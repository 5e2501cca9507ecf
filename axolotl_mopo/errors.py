"""The errors of this package. Each message says what is wrong, where, and how to fix it."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names its key or its file."""


class DataError(ValueError):
    """Data that cannot be trained on; the message names the data set and the row."""


class RowError(ValueError):
    """What is wrong with a row, raised where it is not known yet which row it is.

    Args:
        message: what is wrong and how to fix it.
        kind: the fault in two or three words; dropped rows are counted by it.
    """

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


class LossError(RuntimeError):
    """A loss that is not finite; the message names the step and the rows."""


class NoiseError(ValueError):
    """A model whose training forward pass gives other numbers than its evaluation."""
