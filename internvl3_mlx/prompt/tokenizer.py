"""Tokenizer: text to ids and back, from any of the tokenizer files a repository may have."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import Metaspace

from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.json_files import JSON_LIMIT
from internvl3_mlx.native_output import native_errors_hidden
from internvl3_mlx.prompt.added_tokens import AddedTokenMatcher, keep
from internvl3_mlx.prompt.detokenizer import StreamingDetokenizer, visible_added_tokens
from internvl3_mlx.prompt.harmony import Detokenizer, HarmonyDetokenizer, is_harmony
from internvl3_mlx.prompt.messages import GeneratedAnswer, ImageSegment, Segment, TextSegment
from internvl3_mlx.prompt.tokenizer_files import (
    CONTROL_TOKENS,
    FLAGS,
    GROUNDING_TOKENS,
    HARMONY_TOKENS,
    IGNORED_ADDED_TOKENS,
    RETURN,
    THINKING_TOKENS,
    AddedToken,
    bos_token,
    eos_token,
    eos_token_ids,
    read_added_tokens,
)
from internvl3_mlx.prompt.vocabulary import (
    LeadingSpace,
    Vocabulary,
    byte_level_bytes,
    read_sentencepiece,
    sentencepiece_bytes,
)

# Qwen2's pre-tokenizer; tokenizer.json has it, vocab.json does not.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEADING_SPACES: dict[str, LeadingSpace] = {"always": "chunk", "first": "start", "never": "none"}
IMAGE_START, IMAGE_CONTEXT, IMAGE_END, IM_END = "<img>", "<IMG_CONTEXT>", "</img>", "<|im_end|>"


class Tokenizer:
    """One model's tokenizer. Special ids are looked up by their text.

    ``added`` maps special tokens to their ids; ``bos_id`` is None where prompts have no BOS.
    ``im_end_id``: of what ends an answer, <|im_end|> or, for GPT-OSS (``is_harmony``), <|return|>.
    """

    def __init__(self, vocabulary: Vocabulary, *, source: Path, stops: Iterable[int | str] = ()):
        self._vocabulary = vocabulary
        self.added = {t: a for t, a in vocabulary.added.items() if t not in IGNORED_ADDED_TOKENS}
        self.is_harmony = is_harmony(self.added)
        answer_end = RETURN if self.is_harmony else IM_END
        missing = {IMAGE_START, IMAGE_CONTEXT, IMAGE_END, answer_end} - self.added.keys()
        if missing:
            raise CheckpointError(
                f"the tokenizer in {source} lacks {', '.join(sorted(missing))}: "
                "take the tokenizer files of an InternVL3 repository"
            )
        self._added_names = {entry.id: name.encode() for name, entry in self.added.items()}
        self.plain_size = vocabulary.size
        self.vocab_size = max(vocabulary.size, 1 + max(a.id for a in self.added.values()))
        self.bos_id = vocabulary.bos_id
        self.image_start_id = self.added[IMAGE_START].id
        self.image_id = self.added[IMAGE_CONTEXT].id
        self.image_end_id = self.added[IMAGE_END].id
        self.im_end_id = self.added[answer_end].id
        named = (self.added[s].id if s in self.added else s for s in (answer_end, *stops))
        self.stop_ids = frozenset(
            n for n in named if isinstance(n, int) and 0 <= n < self.vocab_size
        )
        self.llguidance_tokenizer: Any = None  # llguidance's wrapper of this tokenizer, once built
        control = {t for t, a in self.added.items() if t in CONTROL_TOKENS or a.id in self.stop_ids}
        typed = {t: a for t, a in self.added.items() if t not in control and a.id != self.bos_id}
        self._any_token = AddedTokenMatcher(self.added, vocabulary.normalize)
        self._typed_token = AddedTokenMatcher(typed, vocabulary.normalize)

    @classmethod
    def from_folder(cls, folder: str | Path, *, stops: Iterable[int | str] = ()) -> "Tokenizer":
        """Read tokenizer.json, else vocab.json with merges.txt, else tokenizer.model.

        stops: tokens that end an answer besides those that the folder's files name.
        """
        folder = Path(folder)
        stops = [*stops, *eos_token_ids(folder), eos_token(folder) or IM_END]
        return cls(_read_vocabulary(folder), source=folder, stops=stops)

    def encode(
        self, segments: Sequence[Segment], num_image_token: int, *, bos: bool = True
    ) -> list[int]:
        """Encode a rendered prompt, with ``num_image_token`` context tokens per tile.

        Adjacent texts are encoded as one, so the ids are those of the whole prompt as text. All
        added tokens are recognized in the template's text; in untrusted text all but those that
        give a prompt its structure.
        """
        ids: list[int] = []
        waiting = ""
        for piece in self._pieces(segments, num_image_token):
            if isinstance(piece, str):
                waiting += piece
                continue
            ids += self._encode_plain(waiting, at_start=not ids) + piece
            waiting = ""
        ids += self._encode_plain(waiting, at_start=not ids)
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_text(self, text: str, *, specials: bool = False) -> list[int]:
        """Encode plain text without BOS; ``specials`` recognizes special tokens in it."""
        if specials:
            return self.encode([TextSegment(text)], 0, bos=False)
        return self._encode_plain(text, at_start=True)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a plain token, which may be part of a character."""
        return self._vocabulary.token_bytes(token_id)

    def spelling(self, token_id: int) -> bytes:
        """Return the bytes of any token: those of an added one are its name."""
        return self._added_names.get(token_id) or self.token_bytes(token_id)

    def decode(self, ids: Iterable[int], *, keep_boxes: bool = False) -> str:
        """Decode ids, skipping special tokens; ``keep_boxes`` keeps grounding tags."""
        pieces = self.detokenizer(keep_boxes=keep_boxes)
        return "".join([*map(pieces.add_token, ids), pieces.finalize()])

    def detokenizer(self, *, keep_boxes: bool = False, keep_tags: bool = False) -> Detokenizer:
        """Return a streaming detokenizer for one answer.

        keep_boxes: keep grounding tags; keep_tags: those of a thought, where they are special; an
        answer of GPT-OSS gets them for its thought, which is left out otherwise.
        """
        keep = GROUNDING_TOKENS if keep_boxes else frozenset[str]()
        keep |= THINKING_TOKENS if keep_tags else frozenset[str]()
        shown = visible_added_tokens(self.added, keep)
        plain = StreamingDetokenizer(
            self._vocabulary.token_bytes, shown, self._vocabulary.leading_space
        )
        if not self.is_harmony:
            return plain
        names = {self.added[name].id: name for name in HARMONY_TOKENS & self.added.keys()}
        return HarmonyDetokenizer(plain, names, keep_tags)

    def _pieces(
        self, segments: Sequence[Segment], num_image_token: int
    ) -> Iterator[str | list[int]]:
        """Yield plain texts, and ids of special tokens, images and answers."""
        for segment in segments:
            if isinstance(segment, ImageSegment):
                context = [self.image_id] * (segment.tiles * num_image_token)
                yield [self.image_start_id, *context, self.image_end_id]
                continue
            if isinstance(segment, GeneratedAnswer):
                yield list(segment.token_ids)
                continue
            matcher = self._typed_token if segment.untrusted else self._any_token
            for piece in matcher.split(_without_surrogates(segment.text)):
                yield piece if isinstance(piece, str) else [piece]

    def _encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        clean = _without_surrogates(text)
        return self._vocabulary.encode(clean, at_start) if clean else []


def read_spellings(folder: Path) -> Callable[[int], bytes]:
    """Read any tokenizer; return the bytes of its tokens by id, none for ids that do not exist."""
    vocabulary = _read_vocabulary(folder)
    names = {entry.id: name.encode() for name, entry in vocabulary.added.items()}
    return lambda token: names.get(token) or vocabulary.token_bytes(token)


def _without_surrogates(text: str) -> str:
    """Replace what no tokenizer accepts; it comes from broken file names and JSON escapes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_vocabulary(folder: Path) -> Vocabulary:
    if (folder / "tokenizer.json").is_file():
        return _read_tokenizer_json(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        core, added = _read_qwen_bpe(folder), read_added_tokens(folder)
        return _bpe_vocabulary(core, added, _named_bos(folder, core, added))
    if (folder / "tokenizer.model").is_file():
        return read_sentencepiece(folder)
    raise CheckpointError(
        f"no tokenizer in {folder}: it needs tokenizer.json, or vocab.json with merges.txt, "
        "or tokenizer.model; copy them from the model's repository"
    )


@contextmanager
def _rust_errors(files: str) -> Iterator[None]:
    """Turn whatever the library raises into a CheckpointError of one line."""
    try:
        with native_errors_hidden():
            yield
    except BaseException as error:  # its Rust code also panics, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{files} cannot be read ({why}); download it again") from error


def _read_tokenizer_json(folder: Path) -> Vocabulary:
    path = folder / "tokenizer.json"
    if path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{path} is too large for a tokenizer; download it again")
    with _rust_errors(str(path)):
        whole = tokenizers.Tokenizer.from_file(str(path))
    added = read_added_tokens(folder) | {
        token.content: AddedToken(number, token.special, *(getattr(token, flag) for flag in FLAGS))
        for number, token in whole.get_added_tokens_decoder().items()
    }
    bos = _named_bos(folder, whole, added)
    marked, bare = (whole.encode("a", add_special_tokens=flag).ids for flag in (True, False))
    if marked[0] != bare[0]:
        bos = marked[0]
    return _bpe_vocabulary(_without_added(whole), added, bos)


def _named_bos(
    folder: Path, core: tokenizers.Tokenizer, added: dict[str, AddedToken]
) -> int | None:
    name = bos_token(folder, default=False)
    if name is None:
        return None
    return added[name].id if name in added else core.token_to_id(name)


def _without_added(whole: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer for plain text only: the same parts without the added tokens."""
    core = tokenizers.Tokenizer(whole.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(whole, part) is not None:
            setattr(core, part, getattr(whole, part))
    return core


def _read_qwen_bpe(folder: Path) -> tokenizers.Tokenizer:
    """Build what Qwen2's tokenizer class builds from vocab.json and merges.txt."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    with _rust_errors(f"{vocab} and {merges.name}"):
        core = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    return core


def _bpe_vocabulary(
    core: tokenizers.Tokenizer, added: dict[str, AddedToken], bos_id: int | None
) -> Vocabulary:
    state = core.decoder.__getstate__() if core.decoder is not None else b""
    spell = byte_level_bytes if b'"ByteLevel"' in state else sentencepiece_bytes
    inner = _without_leading_space(core)
    strips = b'"Strip"' in state or b'"Metaspace"' in state

    def cut(text: str, at_start: bool) -> list[int]:
        return (core if at_start else inner).encode(text, add_special_tokens=False).ids

    return Vocabulary(
        encode=cut,
        token_bytes=lambda n: spell(core.id_to_token(n) if n >= 0 else None),
        size=core.get_vocab_size(with_added_tokens=False),
        added=added,
        bos_id=bos_id,
        leading_space=_leading_space(core) if strips else "none",
        normalize=core.normalizer.normalize_str if core.normalizer is not None else keep,
    )


def _leading_space(core: tokenizers.Tokenizer) -> LeadingSpace:
    blank = core.pre_tokenizer
    if isinstance(blank, Metaspace):
        return LEADING_SPACES[blank.prepend_scheme]
    normal = core.normalizer.__getstate__() if core.normalizer is not None else b""
    return "chunk" if b'"Prepend"' in normal else "none"


def _without_leading_space(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer for text after an added token, without the space of the prompt's start."""
    blank = core.pre_tokenizer
    if not isinstance(blank, Metaspace) or blank.prepend_scheme != "first":
        return core
    inner = _without_added(core)
    inner.pre_tokenizer = Metaspace(blank.replacement, prepend_scheme="never", split=blank.split)
    return inner
