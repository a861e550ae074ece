"""Answers of a given form: a JSON schema, a regular expression or a choice (llguidance)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from internvl3_mlx.errors import MissingExtraError, UserError
from internvl3_mlx.generation.engine import Engine
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MASK_WORD_BITS = 32  # of one word of the mask
# JSON on one line: where any white space may stand, a model can go on with it for ever
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
CONSTRAINTS = ("json_schema", "regex", "choice")


def is_structured(settings: GenerationConfig) -> bool:
    return any(getattr(settings, form) for form in CONSTRAINTS)


def make_constraint(settings: GenerationConfig, tokenizer: Tokenizer, vocab: int) -> "Constraint":
    """Compile what the settings ask for. vocab: rows of the model's head.

    Raises ``UserError`` for a form that cannot be, ``MissingExtraError`` without llguidance.
    """
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError("an answer of a given form", "llguidance", "structured") from error
    form = next(form for form in CONSTRAINTS if getattr(settings, form))
    value = getattr(settings, form)
    try:
        grammar = GRAMMARS[form](llguidance.LLMatcher, value)
        matcher = llguidance.LLMatcher(llguidance_tokenizer(tokenizer, vocab), grammar)
    except ValueError as error:
        raise constraint_error(form, str(error)) from error
    if matcher.is_error():
        raise constraint_error(form, matcher.get_error())
    return Constraint(matcher, tokenizer.im_end_id, vocab)


@dataclass(eq=False)
class Constraint:
    """Follows an answer and says which tokens may come next."""

    matcher: "LLMatcher"
    end_id: int
    vocab_size: int

    def mask_logits(self, logits: mx.array) -> mx.array:
        """Rule out what does not fit: (1, vocab) -> (1, vocab)."""
        words = np.zeros(-(-self.vocab_size // MASK_WORD_BITS), dtype=np.uint32)
        self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self.vocab_size]
        return mx.where(mx.array(bits.astype(bool)), logits, mx.array(-mx.inf, logits.dtype))

    def accept(self, token: int) -> bool:
        """Take the next token; False when the answer is complete."""
        return self.matcher.consume_token(token) and not self.matcher.is_stopped()

    def decode(self, engine: Engine, ids: mx.array, logits: mx.array, limit: int) -> Iterator[int]:
        """Yield up to ``limit`` tokens, and the end when the form is complete. ids: (1, L)."""
        history = ids.reshape(-1)
        for left in range(limit - 1, -1, -1):
            chosen = engine.sampler(history, self.mask_logits(logits))
            token = int(chosen.item())  # type: ignore[arg-type]
            yield token
            if not self.accept(token):
                yield self.end_id
                return
            if left:
                history = mx.concatenate([history, chosen]) if engine.track_ids else history
                logits = engine.step(chosen)


class TokenTable:
    """A tokenizer as llguidance wants it: every token's bytes, and a function that cuts text."""

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.im_end_id
        self.special_token_ids = sorted(entry.id for entry in tokenizer.added.values())
        names = {entry.id: name.encode() for name, entry in tokenizer.added.items()}
        self.tokens = [names.get(n) or tokenizer.token_bytes(n) for n in range(vocab)]
        plain = [n for n in range(vocab) if n not in names and self.tokens[n]]
        self.ids = {self.tokens[n]: n for n in plain}
        self.longest = max(map(len, self.ids))

    def __call__(self, text: bytes) -> list[int]:
        """Cut text that must come: the longest token first, and no blank put before it."""
        found, at = list[int](), 0
        while at < len(text):
            ends = range(min(at + self.longest, len(text)), at, -1)
            end = next((end for end in ends if text[at:end] in self.ids), None)
            if end is None:
                break
            found.append(self.ids[text[at:end]])
            at = end
        return found


def llguidance_tokenizer(tokenizer: Tokenizer, vocab: int) -> "LLTokenizer":
    """Build llguidance's tokenizer once for each of ours."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if tokenizer.llguidance_tokenizer is None:
        wrapped = TokenizerWrapper(TokenTable(tokenizer, vocab))
        stops = sorted(tokenizer.stop_ids)
        tokenizer.llguidance_tokenizer = LLTokenizer(wrapped, n_vocab=vocab, eos_token=stops)
    return tokenizer.llguidance_tokenizer


def json_grammar(matcher: Any, schema: Any) -> str:
    """Read a schema given as a dictionary or as JSON text."""
    if isinstance(schema, str):
        schema = json.loads(schema)
    if not isinstance(schema, dict | bool):
        raise ValueError("a schema is an object")
    return matcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_LAYOUT)


def choice_grammar(_: Any, choices: tuple[str, ...]) -> str:
    from llguidance import grammar_from

    return grammar_from("lark", "start: " + " | ".join(map(json.dumps, choices)))


GRAMMARS = {
    "json_schema": json_grammar,
    "regex": lambda matcher, pattern: matcher.grammar_from_regex(pattern),
    "choice": choice_grammar,
}


def constraint_error(form: str, words: str) -> UserError:
    """Say why a form is refused: the last line of what the library tells is the reason."""
    told = [" ".join(line.split()) for line in words.split("\n") if line.strip()]
    reason = (told[-1] if told else "").removeprefix("error: ")
    return UserError(f"{form} cannot be followed: {reason}; correct it and ask again")
