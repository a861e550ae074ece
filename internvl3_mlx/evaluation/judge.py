"""A language model reads answers in which the rules found none: an option, yes or no, a value.

The harnesses ask GPT-4 with prompts of their own. Ours are short, and the judge is any text model
that mlx-lm loads, or the model under test itself; so a result names its judge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from internvl3_mlx.errors import UserError
from internvl3_mlx.evaluation.items import EvalItem
from internvl3_mlx.metrics.answers import final_answer, option_letter, yes_or_no

SELF, NOBODY = "self", "none"
MAX_TOKENS = 64
OPTION_PROMPT = (
    "A question with options was answered in free words. Which option does the answer mean?\n\n"
    "Question: {question}\nOptions:{options}\n\nAnswer: {answer}\n\n"
    "Reply with one letter and nothing else, or with Z if it means none of them."
)
YES_NO_PROMPT = (
    "A question was answered in free words. Does the answer mean yes or no?\n\n"
    "Question: {question}\n\nAnswer: {answer}\n\nReply with yes, no or unknown and nothing else."
)
VALUE_PROMPT = (
    "A question was answered with an explanation. Copy the final value from it.\n\n"
    "Question: {question}\n\nAnswer: {answer}\n\n"
    "Reply with the value alone, without a unit and without words."
)


class Judge(Protocol):
    """Completes a prompt. name: what a result calls the judge."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompt: str) -> str: ...


@dataclass(frozen=True, eq=False)
class TextJudge:
    """A judge by a function from prompt to text."""

    name: str
    complete: Callable[[str], str]

    def __call__(self, prompt: str) -> str:
        return self.complete(prompt)


def judge_prompt(item: EvalItem, metric: str, answer: str) -> str:
    """Write what the judge is asked about an answer."""
    if item.options:
        options = "".join(f"\n{letter}. {text}" for letter, text in item.options.items())
        return OPTION_PROMPT.format(question=item.question, options=options, answer=answer)
    template = YES_NO_PROMPT if metric in ("hallusion", "mme", "pope") else VALUE_PROMPT
    return template.format(question=item.question, answer=answer)


def read_judgment(item: EvalItem, metric: str, reply: str) -> str | None:
    """Read the judge's reply; None where it names nothing that could be scored."""
    said = final_answer(reply)
    if item.options:
        return option_letter(said, item.options)
    if metric in ("hallusion", "mme", "pope"):
        return yes_or_no(said)
    return said.splitlines()[0].strip() if said.strip() else None


def load_text_judge(repo: str) -> TextJudge:
    """Load a text model through mlx-lm; raises UserError for what it cannot load."""
    import mlx_lm
    from mlx_lm.sample_utils import make_sampler

    try:
        model, tokenizer, *_ = mlx_lm.load(repo)
    except Exception as error:  # noqa: BLE001  mlx-lm and its libraries raise whatever they like
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot load the judge {repo} through mlx-lm: {reason}; name a text model that "
            "mlx-lm knows, self, or none"
        ) from error

    def complete(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        greedy = make_sampler(temp=0.0)
        return mlx_lm.generate(
            model, tokenizer, ids, max_tokens=MAX_TOKENS, sampler=greedy, verbose=False
        )

    return TextJudge(repo, complete)
