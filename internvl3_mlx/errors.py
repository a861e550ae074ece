"""Errors. Each message is one line: what was given, what was expected, what to do next."""


class InternVL3Error(Exception):
    """Base class of all errors raised on purpose; ``exit_code`` is the command's exit status."""

    exit_code = 1


class UserError(InternVL3Error):
    """A mistake that the user can correct, such as a wrong path or option."""

    exit_code = 2


class ImageError(UserError):
    """An image or video that cannot be found or read."""


class PromptError(UserError):
    """A prompt the model cannot take, such as one longer than its context."""


class DataError(UserError):
    """Invalid training data: the file, the line and what is wrong there."""


class CheckpointError(UserError):
    """A model folder that is incomplete, corrupt or of an unsupported kind."""


class ConfigError(CheckpointError):
    """A ``config.json`` that does not describe an InternVL3 model."""


class KeyMapError(CheckpointError):
    """Tensors that do not fit the model: unknown, missing, duplicated or of the wrong shape."""


class WriteError(UserError):
    """A file or folder that cannot be written."""


class DownloadError(InternVL3Error):
    """A repository that cannot be downloaded: no network, not found, or the disk is full."""


class TrainingError(InternVL3Error):
    """Training cannot continue: the loss is NaN, or memory ran out."""


class MissingExtraError(UserError):
    """A feature whose optional library is not installed."""

    def __init__(self, feature: str, library: str, extra: str):
        super().__init__(f'{feature} needs {library}: pip install "internvl3-mlx[{extra}]"')
