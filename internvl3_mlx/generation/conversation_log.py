"""A log of a conversation, written as it goes: one JSON record per line, readable by its owner.

A killed process loses nothing that was on the screen: the question is logged before it is asked,
and the answer chunk by chunk. Images are named by path and content hash, and copied only on
request. Every exchange is written once; an ``order`` says which ones the conversation holds.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from internvl3_mlx.errors import UserError
from internvl3_mlx.files import atomic_write, data_folder
from internvl3_mlx.generation.conversation_file import SAVED_FIELDS, json_value, npy_bytes
from internvl3_mlx.generation.exchange import Exchange
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.log_records import Record, parse_record
from internvl3_mlx.generation.processor import ImageInfo, ProcessedImage, ProcessedVideo
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.generation.runner import ModelRunner

LOG_VERSION = 1
SUFFIX = ".jsonl"
IMAGES = "images"  # folder of the copies
OWNER_ONLY = 0o600
LOGGED_OPTIONS = (*SAVED_FIELDS, "num_frames", "frame_times")
PDF_PAGE = re.compile(r"(?P<path>.+) page \d+")
ReadImage = Callable[[Record], ProcessedImage | None]
ReadVideo = Callable[[Record], ProcessedVideo | None]


def log_folder() -> Path:
    return data_folder("conversations")


@dataclass(eq=False)
class ConversationLog:
    """The log of one conversation; its file appears with the first question.

    start: what the first record says, such as the model. keep_images: copy the tiles of images,
    pages and frames.
    fault: why nothing is written any more. The conversation itself goes on.
    """

    start: Record
    keep_images: bool = False
    path: Path | None = None
    written: list[Exchange] = field(default_factory=list[Exchange])
    order: list[int] = field(default_factory=list[int])
    fault: Exception | None = None
    stream: IO[str] | None = field(default=None, repr=False)

    def add_question(self, exchange: Exchange, config: GenerationConfig) -> None:
        """Log a question before it is asked."""
        self.write({"asked": self.describe(exchange, config)})

    def add_text(self, text: str) -> None:
        """Log a piece of the answer."""
        if text:
            self.write({"text": text})

    def update(self, exchanges: Sequence[Exchange], config: GenerationConfig) -> None:
        """Log what has changed since the last call."""
        numbers: list[int] = []
        for exchange in exchanges:
            number = next((n for n, old in enumerate(self.written) if old is exchange), None)
            if number is None:
                number = len(self.written)
                self.write({"exchange": number, **self.describe(exchange, config)})
                self.written.append(exchange)
            numbers.append(number)
        if numbers != self.order:
            self.write({"order": numbers})
            self.order = numbers

    def change_start(self, start: Record) -> None:
        """Log that the conversation continues with another model."""
        self.start = start
        if self.path is not None:
            self.write(self.first_record())

    def first_record(self) -> Record:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        return {"version": LOG_VERSION, "started": started, **self.start}

    def start_over(self) -> None:
        """Continue in another file: a new conversation begins."""
        self.close()
        self.path, self.written, self.order = None, [], []

    def close(self) -> None:
        if self.stream is not None:
            with suppress(OSError):
                self.stream.close()
        self.stream = None

    def describe(self, exchange: Exchange, config: GenerationConfig) -> Record:
        if self.keep_images and self.fault is None:
            self.copy_images(exchange)
        return {
            "question": exchange.question,
            "answer": exchange.answer,
            "token_ids": exchange.token_ids,
            "complete": exchange.complete,
            "images": [image_record(image) for image in exchange.images],
            "videos": [video_record(video) for video in exchange.videos],
            "options": {name: json_value(getattr(config, name)) for name in LOGGED_OPTIONS},
        }

    def copy_images(self, exchange: Exchange) -> None:
        try:
            for image in exchange.processed_images:
                target = image_copy(image.content_hash.hex())
                make_private_folder(target.parent)
                if not target.exists():
                    with atomic_write(target, durable=False) as part:
                        part.touch(OWNER_ONLY)
                        part.write_bytes(npy_bytes(image.tiles))
        except OSError as fault:
            self.fault = fault

    def write(self, record: Record) -> None:
        """Append a record. A full disk ends the log, not the conversation."""
        if self.fault is not None:
            return
        try:
            if self.stream is None:
                self.open()
            assert self.stream is not None
            self.stream.write(json.dumps(record) + "\n")
            self.stream.flush()
        except (OSError, UserError) as fault:  # there is no home folder, or another chat
            self.fault = fault

    def open(self) -> None:
        """Open the file for appending; a new one gets the first record."""
        is_new = self.path is None
        make_private_folder(log_folder())
        if self.path is None:
            name = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
            taken = {path.stem for path in log_folder().glob(f"{name}*")}
            unique = next(
                n for n in (name, *(f"{name}-{i}" for i in range(1000))) if n not in taken
            )
            self.path = log_folder() / (unique + SUFFIX)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | (os.O_EXCL if is_new else 0)
        self.stream = os.fdopen(os.open(self.path, flags, OWNER_ONLY), "a", encoding="utf-8")
        lock_exclusively(self.stream, self.path)
        if is_new:
            self.stream.write(json.dumps(self.first_record()) + "\n")
        else:  # a killed process may have left half a line
            self.stream.write("\n")


@dataclass(frozen=True)
class LoggedConversation:
    """What a log holds.

    exchanges: records in the order of the conversation; ``next_number``: that of a new one.
    unanswered: a question that was asked when the process ended before a token of its answer.
    """

    path: Path
    start: Record
    exchanges: list[Record]
    unanswered: str = ""
    next_number: int = 0

    @property
    def title(self) -> str:
        first = self.exchanges[0]["question"] if self.exchanges else self.unanswered
        return " ".join(str(first).split())


def list_logs() -> list[Path]:
    """List the logs, the latest first."""
    try:
        found = [path for path in log_folder().glob(f"*{SUFFIX}") if path.is_file()]
    except OSError:
        return []
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def read_logs() -> Iterator[LoggedConversation]:
    """Yield the conversations that can be read, the latest first."""
    for path in list_logs():
        with suppress(UserError):
            log = read_log(path)
            if log.exchanges or log.unanswered:
                yield log


def read_log(path: Path) -> LoggedConversation:
    """Read a log, without records that are damaged: a killed process leaves half of one at its end.

    Raises UserError where it cannot be read.
    """
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    start, exchanges, order, asked = Record(), dict[int, Record](), list[int](), Record()
    records = (parse_record(line, max_number=len(lines)) for line in lines)
    for record in filter(None, records):
        if "version" in record:
            start = {**record, **({"started": start.get("started", "")} if start else {})}
        elif "asked" in record:
            asked = {**record["asked"], "complete": False}
        elif "text" in record and asked:
            asked["answer"] += record["text"]
        elif "exchange" in record:
            exchanges[record["exchange"]], asked = record, {}
        elif "order" in record:
            order, asked = record["order"], {}
    if start.get("version") != LOG_VERSION:
        raise UserError(f"{path} is not a log of a conversation of this version; choose another")
    found = [exchanges[number] for number in order if number in exchanges]
    unanswered, following = str(asked.get("question", "")), max(exchanges, default=-1) + 1
    if asked and asked["answer"].strip():
        found, unanswered = [*found, asked], ""
    return LoggedConversation(path, start, found, unanswered, following)


def restore_exchange(
    record: Record, read_image: ReadImage, read_video: ReadVideo, *, same_model: bool
) -> Exchange:
    """Make an exchange of a record, without the images that ``read_image`` does not find.

    Raises UserError for a damaged record.
    """
    try:
        videos = tuple(map(read_video, record["videos"]))
        exchange = Exchange(
            question=str(record["question"]),
            answer=str(record["answer"]).strip(),
            token_ids=tuple(map(int, record["token_ids"])) if same_model else (),
            complete=bool(record["complete"]),
            videos=tuple(video for video in videos if video is not None),
        )
        images = [read_image(entry) for entry in record["images"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("the log of this conversation is damaged; choose another") from error
    return with_found_images(exchange, images)


def with_found_images(exchange: Exchange, images: Sequence[ProcessedImage | None]) -> Exchange:
    """Return ``exchange`` with the images that were found, and without the others' placeholders."""
    missing = ProcessedImage(np.zeros((0, 1, 1, 3), np.uint8), ImageInfo("", 0, 0, 0, 0))
    result = replace(exchange, images=tuple(image or missing for image in images))
    for index in reversed([n for n, image in enumerate(images) if image is None]):
        result = result.without_image(index)
    return result


def read_copy(content_hash: str) -> ProcessedImage | None:
    """Return the tiles that were copied; None where there are none, or others."""
    try:
        tiles = np.load(BytesIO(image_copy(content_hash).read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    image = ProcessedImage(tiles, ImageInfo("", 0, 0, len(tiles), 0))
    return image if image.content_hash.hex() == content_hash else None


def read_video_copy(record: Record) -> ProcessedVideo | None:
    """Return a video whose frames were all copied; None where one is missing."""
    frames = list[ProcessedImage]()
    for content_hash, info in zip(record["frames"], record["infos"], strict=True):
        copy = read_copy(content_hash)
        if copy is None:
            return None
        frames.append(replace(copy, info=ImageInfo(**info)))
    times = record["times"]
    return ProcessedVideo(record["name"], tuple(frames), times and tuple(map(float, times)))


def clear_logs() -> int:
    """Delete all logs and copies; return how many conversations they were."""
    logs = list_logs()
    copies = log_folder().joinpath(IMAGES).glob("*.npy")
    for path in (*logs, *copies):
        with suppress(FileNotFoundError):
            path.unlink()
    return len(logs)


def image_copy(content_hash: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]+", content_hash):
        raise ValueError(content_hash)
    return log_folder() / IMAGES / f"{content_hash}.npy"


def image_record(image: ProcessedImage) -> Record:
    return {
        "hash": image.content_hash.hex(),
        **asdict(image.info),
        "path": absolute(image.info.source),
    }


def video_record(video: ProcessedVideo) -> Record:
    return {
        "name": video.name,
        "path": absolute(video.name),
        "frames": [frame.content_hash.hex() for frame in video.frames],
        "infos": [asdict(frame.info) for frame in video.frames],
        "times": video.times,
    }


def absolute(source: str) -> str:
    """Return the path to open again, whatever the folder is then; anything else as it is."""
    page = PDF_PAGE.fullmatch(source)
    try:
        path = os.path.abspath(os.path.expanduser(page["path"] if page else source))
    except OSError:  # the current folder was deleted
        return source
    return path if os.path.exists(path) else source


def describe_model(runner: ModelRunner, load_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a log says about the model, so that it can be loaded again."""
    paths = {
        name: absolute(str(load_options[name]))
        for name in ("model", "adapter")
        if load_options.get(name)
    }
    return {
        "model": runner.name,
        "load": {**load_options, **paths},
        "fingerprint": model_fingerprint(runner.model),
    }


def make_private_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def lock_exclusively(stream: IO[str], path: Path) -> None:
    """Refuse a log that another process writes; the lock ends with the process."""
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise UserError(f"{path.stem} is open in another chat; leave that one first") from error
    except OSError:
        pass  # some network file systems cannot lock
