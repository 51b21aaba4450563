"""Errors that a user can act on: each names value and remedy, and the command line prints it as one line."""


class UserError(Exception):
    """Base of every error whose message is meant for the user; `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting on the command line or in a YAML file cannot be used."""


class UnknownModelError(UserError, ValueError):
    """No registered model has the requested name, or it cannot be built as requested."""


class DatasetError(UserError, ValueError):
    """A dataset is unknown, empty, unreadable, or does not fit the model."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """The folder or file of a dataset does not exist."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be read safely or does not fit the model."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint was written by a newer release."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The checkpoint file does not exist."""


class OutputError(UserError, OSError):
    """Results cannot be written, or would overwrite an existing run."""


class NonFiniteLossError(UserError, FloatingPointError):
    """Loss or gradient became NaN or infinite; raised before the optimizer step, so the weights are still finite."""

    exit_code = 1
