"""All errors that users see: what was given, what was expected and what to do next."""

# What ends a program on purpose, or because nobody reads its output any more: never an item's error
LEAVING = (KeyboardInterrupt, SystemExit, GeneratorExit, BrokenPipeError)


class InternVL3Error(Exception):
    """Base class of all expected failures. ``exit_code`` is that of the command line."""

    exit_code = 1


class UnforeseenError(InternVL3Error):
    """A fault that nobody foresaw, in one line; ``__cause__`` has its traceback."""


class UserError(InternVL3Error):
    """A mistake in the request."""

    exit_code = 2


class ImageError(UserError):
    """An image or video that cannot be found or read."""


class PromptError(UserError):
    """A prompt that does not fit the model, such as one longer than its context."""


class DataError(UserError):
    """Records that cannot be trained on: the file, the line, and what is wrong there."""


class CheckpointError(UserError):
    """A model folder that is incomplete, corrupt or of an unsupported kind."""


class ConfigError(CheckpointError):
    """A ``config.json`` that does not describe an InternVL3 model."""


class KeyMapError(CheckpointError):
    """Tensors that do not match the model: unknown, missing, duplicate or of a wrong shape."""


class WriteError(UserError):
    """A file or folder that cannot be written."""


class DownloadError(InternVL3Error):
    """A repository that cannot be downloaded: no network, no such name, no disk space."""


class NumericError(InternVL3Error):
    """The model computed NaN or an infinity: damaged weights, or a range too small for them."""


class GPUError(InternVL3Error):
    """The GPU gave up: out of memory, stopped by macOS, or asked for too large an array."""


class TrainingError(InternVL3Error):
    """Training cannot continue: the loss is NaN, or memory ran out."""


class MissingExtraError(UserError):
    """A feature whose optional library is not installed.

    library: its name on the package index.
    """

    def __init__(self, feature: str, library: str, extra: str):
        from internvl3_mlx.install_hint import install_command

        super().__init__(f"{feature} needs {library}; run {install_command(extra, library)}")
