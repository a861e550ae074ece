"""One answer while it is decoded: its text, its position, and the events that it gives."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from internvl3_mlx.generation.answer import FinishReason
from internvl3_mlx.generation.engine import check_token
from internvl3_mlx.generation.row_sampler import RowSampler, TokenScores
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.serving.queued_request import QueuedRequest
from internvl3_mlx.serving.requests import AnswerDone, RequestTiming, TextDelta, TokenLogprob


@dataclass(eq=False)
class RunningAnswer:
    """Answer ``index`` of a request.

    position: of the next token. ntk: whether dynamic NTK may apply to it. tokens_left: how many
    tokens may still follow. generated_ids: all so far, the one that ended it included. row: its
    number in the batch.
    """

    queued: QueuedRequest
    index: int
    sampler: RowSampler
    text: TextStream
    tokenizer: Tokenizer
    position: float
    ntk: bool
    tokens_left: int
    generated_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    row: int = -1
    started: float = field(default_factory=time.perf_counter)
    finish_reason: FinishReason | None = None

    def accept(self, token: int, scores: TokenScores | None) -> None:
        """Append a token and give its text. Raises NumericError for logits without numbers.

        ``finish_reason`` is set when the answer is complete.
        """
        check_token(token)
        self.generated_ids.append(token)
        self.tokens_left -= 1
        texts = [new for _, new in self.text.decode([token])]
        is_stop_token = not texts
        logprobs = tuple[TokenLogprob, ...]()
        if scores is not None and not is_stop_token:
            logprobs = (read_scores(token, scores, self.tokenizer),)
        self.logprobs += logprobs
        constraint = self.sampler.constraint
        complete = constraint is not None and not constraint.accept(token)
        if self.text.finish_reason == "stop" or complete:
            self.finish_reason = "stop"
        elif self.tokens_left <= 0:
            self.finish_reason = "length"
        if not is_stop_token:
            self.queued.emit(TextDelta("".join(texts), self.index, (token,), logprobs))

    def finish(self, reason: FinishReason) -> None:
        """Give the rest of the text and the end of the answer."""
        rest = self.text.flush()
        if rest:
            self.queued.emit(TextDelta(rest, self.index))
        self.queued.finish_answer(
            AnswerDone(
                text=self.text.text,
                finish_reason=reason,
                usage=self.queued.usage(len(self.text.token_ids)),
                timing=self.timing(),
                index=self.index,
                stop_string=self.text.stop_string,
                logprobs=tuple(self.logprobs),
            )
        )

    def timing(self) -> RequestTiming:
        return self.queued.timing(time.perf_counter() - self.started)


def read_scores(token: int, scores: TokenScores, tokenizer: Tokenizer) -> TokenLogprob:
    """Turn computed log probabilities into what requests get, the most likely first."""

    def one(token_id: int, logprob: float, top: Sequence[TokenLogprob] = ()) -> TokenLogprob:
        return TokenLogprob(token_id, tokenizer.spelling(token_id), logprob, tuple(top))

    ids, values = np.array(scores.top_ids), np.array(scores.top)
    order = np.argsort(-values, kind="stable")
    top = [one(int(ids[n]), float(values[n])) for n in order]
    return one(token, float(scores.chosen.item()), top)  # type: ignore[arg-type]
