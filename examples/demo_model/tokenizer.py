"""Learn a small byte-level BPE with Qwen's splitting rule and InternVL's special tokens."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.demo_model.questions import corpus
from examples.demo_model.vocabulary import COLORS

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB_SIZE = 768
SYSTEM = "You are a small demo model."
FRAME = ("system\n", "user\n", "assistant\n", SYSTEM, "yes", "no")
WEIGHT = 20  # how often each line is shown, so that every whole word outweighs chance pairs


def learn(lines: Iterable[str] | None = None, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train the tokenizer; every byte stays a token of its own, so any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = list(lines if lines is not None else corpus())
    text += [text.lower() for text in text] + [
        *FRAME,
        *COLORS,
        *(f"is {color}" for color in COLORS),
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text * WEIGHT, trainer)
    return tokenizer


def open_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer, or learn and write it when the file does not exist yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        learn().save(str(path))
    return Tokenizer.from_file(str(path))
