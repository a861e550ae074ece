"""The tokens of an answer as the model itself would continue the opened turn."""

from internvl3_mlx.prompt.harmony import FINAL_HEADER
from internvl3_mlx.prompt.messages import TextSegment
from internvl3_mlx.prompt.template import MESSAGE_START
from internvl3_mlx.prompt.tokenizer import Tokenizer

ASSISTANT_START = TextSegment(MESSAGE_START.format(role="assistant"))


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode an answer as the model would continue the opened turn.

    If the answer's first characters would merge with the opening into one token, as a newline
    does, the answer is encoded alone: generation never sees the merged token. GPT-OSS first names
    the channel.
    """
    if tokenizer.is_harmony:
        header = TextSegment(FINAL_HEADER)
        return tokenizer.encode([header, TextSegment(text, untrusted=True)], 0, bos=False)
    answer = TextSegment(text, untrusted=True)
    opening = tokenizer.encode([ASSISTANT_START], 0, bos=False)
    together = tokenizer.encode([ASSISTANT_START, answer], 0, bos=False)
    if together[: len(opening)] == opening and len(together) > len(opening):
        return together[len(opening) :]
    return tokenizer.encode([answer], 0, bos=False)
