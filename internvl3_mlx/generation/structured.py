"""Constrained decoding: a JSON schema, a regular expression or a choice (llguidance)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from internvl3_mlx.distributed.agreement import from_rank_0
from internvl3_mlx.errors import MissingExtraError, UserError
from internvl3_mlx.generation.compiled_step import mark_not_finite
from internvl3_mlx.generation.engine import Engine, check_token
from internvl3_mlx.generation.generation_config import CONSTRAINTS, GenerationConfig
from internvl3_mlx.json_files import parse_json_value
from internvl3_mlx.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MASK_WORD_BITS = 32
# JSON on one line: where whitespace is free, a model may generate it forever
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def is_structured(config: GenerationConfig) -> bool:
    return any(getattr(config, name) for name in CONSTRAINTS)


def needs_constraint(config: GenerationConfig) -> bool:
    """Tell whether tokens are masked while an answer is decoded; ranking choices needs no mask."""
    return is_structured(config) and not config.ranks_choices


def make_constraint(
    config: GenerationConfig, tokenizer: Tokenizer, vocab_size: int
) -> "Constraint":
    """Compile the constraint of ``config``. vocab_size: rows of the model's output head.

    Raises ``UserError`` for an invalid constraint, ``MissingExtraError`` without llguidance.
    """
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError("structured output", "llguidance", "structured") from error
    name = next(name for name in CONSTRAINTS if getattr(config, name))
    try:
        grammar = GRAMMARS[name](llguidance.LLMatcher, getattr(config, name))
        matcher = llguidance.LLMatcher(llguidance_tokenizer(tokenizer, vocab_size), grammar)
    except ValueError as error:
        raise constraint_error(name, str(error)) from error
    if matcher.is_error():
        raise constraint_error(name, matcher.get_error())
    return Constraint(matcher, tokenizer.im_end_id, vocab_size)


@dataclass(eq=False)
class Constraint:
    """Follows an answer and masks the tokens that may not come next."""

    matcher: "LLMatcher"
    end_id: int
    vocab_size: int

    def next_mask(self) -> mx.array:
        """Compute which tokens may come next, as the bits of uint32 words, the lowest first: (W,).

        On the host: while the device reads the last token, this costs no time.
        """
        words = np.zeros(-(-self.vocab_size // MASK_WORD_BITS), dtype=np.uint32)
        self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return mx.array(words)

    def mask_logits(self, logits: mx.array) -> mx.array:
        """Set tokens that are not allowed to -inf: (1, vocab) -> (1, vocab)."""
        return apply_mask(logits, self.next_mask())

    def accept(self, token: int) -> bool:
        """Append the next token; return False when the answer is complete."""
        return self.matcher.consume_token(token) and not self.matcher.is_stopped()

    def decode(self, engine: Engine, logits: mx.array, limit: int) -> Iterator[int]:
        """Yield up to ``limit`` tokens, and the end token after a complete answer.

        A token is read by the model before it is known here: the mask of the next one is
        computed meanwhile, and only the next choice waits for both.
        """
        for left in range(limit - 1, -1, -1):
            masked = self.mask_logits(logits)
            chosen, engine.sampler_state = engine.sampler(masked, engine.sampler_state)
            chosen = from_rank_0(engine.model.shard, mark_not_finite(chosen, logits))
            logits = engine.step(chosen) if left else logits
            mx.async_eval(chosen, logits)
            token = check_token(int(chosen.item()))  # type: ignore[arg-type]
            yield token
            if not self.accept(token):
                yield self.end_id
                return


def apply_mask(logits: mx.array, words: mx.array) -> mx.array:
    """Set logits (B, vocab) to -inf where the bit of a token, in (W,) uint32, is 0."""
    bits = (words[:, None] >> mx.arange(MASK_WORD_BITS, dtype=mx.uint32)) & 1
    allowed = bits.reshape(-1)[: logits.shape[-1]].astype(mx.bool_)
    return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))


def matches_regex(pattern: str, text: str) -> bool:
    """Return whether a whole text matches, in time that grows with its length alone."""
    from llguidance import LLMatcher, LLTokenizer

    grammar = LLMatcher.grammar_from_regex(pattern)
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    return matcher.consume_tokens([*text.encode()]) and matcher.is_accepting()


class TokenTable:
    """A tokenizer in llguidance's terms: the bytes of every token, and a function that encodes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.im_end_id
        self.special_token_ids = sorted(entry.id for entry in tokenizer.added.values())
        self.tokens = [tokenizer.spelling(n) for n in range(vocab_size)]
        added = {*self.special_token_ids}
        plain = [n for n in range(vocab_size) if n not in added and self.tokens[n]]
        self.ids = {self.tokens[n]: n for n in plain}
        self.longest = max(map(len, self.ids))

    def __call__(self, text: bytes) -> list[int]:
        """Encode text that the constraint forces: longest token first, no space added in front."""
        found, at = list[int](), 0
        while at < len(text):
            ends = range(min(at + self.longest, len(text)), at, -1)
            end = next((end for end in ends if text[at:end] in self.ids), None)
            if end is None:
                break
            found.append(self.ids[text[at:end]])
            at = end
        return found


def llguidance_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> "LLTokenizer":
    """Build llguidance's tokenizer, once for each of ours."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if tokenizer.llguidance_tokenizer is None:
        wrapped = TokenizerWrapper(TokenTable(tokenizer, vocab_size))
        stops = sorted(tokenizer.stop_ids)
        tokenizer.llguidance_tokenizer = LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=stops)
    return tokenizer.llguidance_tokenizer


def json_grammar(matcher: Any, schema: Any) -> str:
    """Compile a schema given as a mapping or as JSON text."""
    if isinstance(schema, str):
        schema = parse_json_value(schema.encode())
    if not isinstance(schema, Mapping | bool):
        raise ValueError("a JSON schema is an object")
    schema = schema if isinstance(schema, bool) else dict(schema)
    return matcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_LAYOUT)


def choice_grammar(_: Any, choices: tuple[str, ...]) -> str:
    from llguidance import grammar_from

    return grammar_from("lark", "start: " + " | ".join(map(json.dumps, choices)))


GRAMMARS = {
    "json_schema": json_grammar,
    "regex": lambda matcher, pattern: matcher.grammar_from_regex(pattern),
    "choice": choice_grammar,
}


def constraint_error(name: str, message: str) -> UserError:
    """Make an error of llguidance's message, whose last line holds the reason."""
    lines = [" ".join(line.split()) for line in message.split("\n") if line.strip()]
    reason = (lines[-1] if lines else "").removeprefix("error: ")
    return UserError(f"{name} is not valid: {reason}; correct it and ask again")
