"""What can go wrong, in the words a user reads: what was given, what was wanted, what to do
next."""


class InternVL3Error(Exception):
    """Any failure this library foresees. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class UserError(InternVL3Error):
    """A mistake the user can mend by asking differently."""

    exit_code = 2


class ImageError(UserError):
    """A picture or video that cannot be found or read."""


class PromptError(UserError):
    """A question that cannot be put to the model, such as one longer than its context."""


class DataError(UserError):
    """Rows that cannot be trained on: the file and the line, and what is wrong there."""


class CheckpointError(UserError):
    """A model folder that is missing something, damaged, or of a kind we do not know."""


class ConfigError(CheckpointError):
    """A ``config.json`` that does not describe an InternVL3 model."""


class KeyMapError(CheckpointError):
    """Tensors that do not fit the model: unknown, missing, doubled or wrong in shape."""


class WriteError(UserError):
    """A file or folder that cannot be written."""


class DownloadError(InternVL3Error):
    """A repository that cannot be fetched: no network, no such name, no room on disk."""


class TrainingError(InternVL3Error):
    """A training run that cannot go on: its numbers are none any more, or memory runs out."""


class MissingExtraError(UserError):
    """A feature whose optional library is not installed."""

    def __init__(self, feature: str, library: str, extra: str):
        super().__init__(f'{feature} needs {library}: pip install "internvl3-mlx[{extra}]"')
