"""Past conversations in the chat: listing them, and continuing one from its log."""

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console
from internvl3_mlx.cli.faults import attempt
from internvl3_mlx.errors import InternVL3Error, UserError

if TYPE_CHECKING:
    from internvl3_mlx import Conversation
    from internvl3_mlx.cli.chat_session import ChatSession
    from internvl3_mlx.generation.conversation_log import ConversationLog, LoggedConversation
    from internvl3_mlx.generation.processor import ProcessedImage, ProcessedVideo
    from internvl3_mlx.images.load import LoadedImage

TITLE_WIDTH = 60
NONE_YET = "no past conversations; internvl3 chat keeps them unless --no-history is given"


def list_past_chats() -> list[dict[str, Any]]:
    """Return a row for each past conversation, the latest first, numbered from 1."""
    from internvl3_mlx.generation.conversation_log import read_logs

    return [
        {
            "number": number,
            "started": log.start.get("started", ""),
            "model": os.path.basename(str(log.start.get("model", ""))),
            "questions": len(log.exchanges) + bool(log.unanswered),
            "first question": shorten(log.title),
        }
        for number, log in enumerate(read_logs(), start=1)
    ]


def shorten(text: str) -> str:
    return text if len(text) <= TITLE_WIDTH else text[: TITLE_WIDTH - 1] + "…"


def find_past_chat(number: int) -> "LoggedConversation":
    """Return conversation ``number`` of the list, 1 being the latest; raise UserError if none."""
    from internvl3_mlx.generation.conversation_log import read_logs

    logs = [*read_logs()]
    if not logs:
        raise UserError(NONE_YET)
    if not 1 <= number <= len(logs):
        raise UserError(f"no conversation {number}; internvl3 history lists 1 to {len(logs)}")
    return logs[number - 1]


def new_log(
    conversation: "Conversation", load_options: dict[str, Any], *, keep_images: bool
) -> "ConversationLog":
    """Return the log of a new conversation with the model that ``load_options`` name."""
    from internvl3_mlx.generation.conversation_log import ConversationLog, describe_model

    return ConversationLog(describe_model(conversation.runner, load_options), keep_images)


def continue_past_chat(session: "ChatSession", past: "LoggedConversation") -> None:
    """Restore a conversation in the session, and append to its log from now on."""
    from internvl3_mlx.generation.conversation_log import ConversationLog, restore_exchange
    from internvl3_mlx.generation.exchange import Exchange
    from internvl3_mlx.generation.prompt_cache_file import model_fingerprint

    conversation = session.conversation
    same_model = past.start.get("fingerprint") == model_fingerprint(conversation.runner.model)
    reader = MediaReader(conversation)
    exchanges = [
        restore_exchange(
            record,
            partial(reader.read_image, record["options"]),
            partial(reader.read_video, record["options"]),
            same_model=same_model,
        )
        for record in past.exchanges
    ]
    keep_images = session.log is not None and session.log.keep_images
    if exchanges:
        restore_options(conversation, past.exchanges[-1]["options"])
    log = ConversationLog(past.start, keep_images, past.path)
    log.open()  # refuses one that another chat writes
    log.written = [Exchange("") for _ in range(past.next_number)]
    for record, exchange in zip(past.exchanges, exchanges, strict=True):
        if "exchange" in record:
            log.written[record["exchange"]] = exchange
            log.order.append(record["exchange"])
    session.pending.clear()
    conversation.exchanges = exchanges
    if session.log is not None:
        session.log.close()
    session.log = log
    show_continued(past, exchanges, reader.lost)


def restore_options(conversation: "Conversation", saved: dict[str, Any]) -> None:
    """Set the options that shaped the prompts. Raises UserError for damaged ones."""
    from internvl3_mlx.generation.conversation_archive import checked_options

    try:
        options: Any = checked_options(saved)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("the log of this conversation is damaged; choose another") from error
    conversation.configure(**options)


def show_continued(past: "LoggedConversation", exchanges: list[Any], lost: list[str]) -> None:
    count = console.format_count(len(exchanges), "question")
    console.hint(f"continuing {shorten(past.title)} · {count}")
    if exchanges:
        console.hint(f"last question: {shorten(exchanges[-1].question)}")
        console.hint(f"last answer: {shorten(exchanges[-1].answer)}")
    for name in lost:
        console.note(f"{name} is missing or has changed; the conversation continues without it")
    if past.unanswered:
        console.note(f"not answered yet: {past.unanswered}")


class MediaReader:
    """Opens the images and videos that a log names, and checks that they are the same.

    ``lost``: the names of those that are not.
    """

    def __init__(self, conversation: "Conversation"):
        self.conversation = conversation
        self.lost: list[str] = []
        self.pages: dict[str, list[LoadedImage]] = {}

    def read_image(self, options: dict[str, Any], entry: dict[str, Any]) -> "ProcessedImage | None":
        from dataclasses import replace

        found = attempt(lambda: self.open_image(options, entry))
        if isinstance(found, InternVL3Error) or found.content_hash.hex() != entry["hash"]:
            self.lost.append(str(entry["source"]))
            return None
        names = ("source", "width", "height", "tiles", "tokens")
        info = replace(found.info, **{name: entry[name] for name in names})
        return replace(found, info=info)

    def open_image(self, options: dict[str, Any], entry: dict[str, Any]) -> "ProcessedImage":
        from internvl3_mlx.generation.conversation_log import PDF_PAGE, read_copy
        from internvl3_mlx.images.pages import open_pages

        copy = read_copy(entry["hash"])
        if copy is not None:
            return copy
        path = str(entry["path"])
        if not os.path.isfile(path):
            raise UserError(f"no file at {path}; put it back")
        config = self.config(options)
        page = PDF_PAGE.fullmatch(str(entry["source"]))
        if page and not path.endswith(str(entry["source"])):
            if path not in self.pages:
                self.pages[path] = open_pages(path, upright=config.upright)
            ending = f" page {str(entry['source']).rsplit(' ', 1)[1]}"
            for image in self.pages[path]:
                if image.name.endswith(ending):
                    return self.conversation.runner.processor.process_image(image, config)
            raise UserError(f"{path} has no{ending}; put the file back as it was")
        return self.conversation.runner.processor.process_image(path, config)

    def read_video(self, options: dict[str, Any], entry: dict[str, Any]) -> "ProcessedVideo | None":
        from internvl3_mlx.generation.conversation_log import read_video_copy

        def read() -> "ProcessedVideo":
            if copy := read_video_copy(entry):
                return copy
            path = str(entry["path"])
            if not os.path.isfile(path):
                raise UserError(f"no file at {path}; put it back")
            return self.conversation.process_video(path, self.config(options))

        found = attempt(read)
        if isinstance(found, InternVL3Error) or entry["frames"] != [
            frame.content_hash.hex() for frame in found.frames
        ]:
            self.lost.append(str(entry["name"]))
            return None
        return found

    def config(self, options: Any) -> Any:
        from internvl3_mlx.generation.generation_config import with_overrides

        return with_overrides(self.conversation.generation_config, options)
