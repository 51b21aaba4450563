"""Errors that a user can act on. Each message names the bad value and the remedy."""


class UserError(Exception):
    """Base class of errors that the command line prints as one line.

    Attributes:
        exit_code: Exit code of the command.
    """

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting on the command line or in a YAML file is invalid."""


class UnknownModelError(UserError, ValueError):
    """The model name is not registered, or the model cannot be built as requested."""


class DatasetError(UserError, ValueError):
    """A dataset is unknown, empty or unreadable, or does not fit the model."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """The folder or file of a dataset does not exist."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be read safely or does not fit the model."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint was written by a newer release."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The checkpoint file does not exist."""


class OutputError(UserError, OSError):
    """An output file cannot be written, or would overwrite an existing run."""


class NonFiniteLossError(UserError, FloatingPointError):
    """The loss or a gradient is NaN or infinite. Raised before the optimizer step, so the weights are still finite."""

    exit_code = 1
