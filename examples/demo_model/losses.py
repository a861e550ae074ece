"""Score a batch: dense labels for the tower, next tokens for the whole model."""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from examples.demo_model.labels import IGNORE, Labels
from examples.demo_model.model import DemoConfig, InternVL
from examples.demo_model.rows import Row
from examples.demo_model.vocabulary import COLORS, CONCEPTS
from examples.demo_model.writing import LONGEST

BACKGROUND_WEIGHT = 0.15  # most regions are background: what is there must weigh more
SIDE_WORDS = ((" left", " right"), (" top", " bottom"))


class SeeingHeads(nn.Module):
    """Read concept, color, side and center from visual tokens; only training needs it.

    A visual token is compared with the decoder's own embedding of each word ("dog", "red", "left"):
    what
    the projector makes then matches the words of a question, and the decoder need not learn a
    dictionary.
    """

    def __init__(self, c: DemoConfig, tokenizer: Tokenizer):
        super().__init__()
        self.patch = nn.Linear(c.vision_width, len(CONCEPTS))
        self.order = nn.Linear(c.vision_width, LONGEST)
        self.background = nn.Parameter(torch.zeros(c.text_width))
        self.home = nn.Linear(c.text_width, 1)
        self.scale = nn.Parameter(torch.full((3,), 0.25))
        words = [
            [f" {name}" if len(name) > 1 else name for name in CONCEPTS[1:]],
            [f" {name}" for name in COLORS],
        ]
        words.append([word for pair in SIDE_WORDS for word in pair])
        for name, group in zip(("concepts", "colors", "sides"), words, strict=True):
            self.register_buffer(
                name, torch.tensor([word_id(tokenizer, word) for word in group]), persistent=False
            )

    def forward(
        self, patches: Tensor, tokens: Tensor, embedding: Tensor, labels: dict[str, Tensor]
    ) -> Tensor:
        """Add up the label losses.

        patches: (N, G, G, H), tokens: (N, V, D), embedding: (vocab, D).
        """
        patches = patches.flatten(1, 2)
        unit = F.rms_norm(tokens, tokens.shape[-1:])
        concepts = torch.cat([self.background[None], embedding[self.concepts]])
        side = unit @ embedding[self.sides].T * self.scale[2]
        return (
            weighted(self.patch(patches), labels["patch"])
            + cross_entropy(self.order(patches), labels["order"])
            + weighted(unit @ concepts.T * self.scale[0], labels["token"])
            + 0.5
            * cross_entropy(unit @ embedding[self.colors].T * self.scale[1], labels["color"] - 1)
            + 0.5 * cross_entropy(side[..., :2], labels["side"][..., 0])
            + 0.5 * cross_entropy(side[..., 2:], labels["side"][..., 1])
            + F.binary_cross_entropy_with_logits(self.home(unit)[..., 0], labels["home"])
        )

    def blank(self) -> None:
        """Start at zero: heads that know nothing yet then pass nothing back to a trained tower."""
        for head in (self.patch, self.order, self.home):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)


def word_id(tokenizer: Tokenizer, word: str) -> int:
    """Give the id of a word that must be one token."""
    (only,) = tokenizer.encode(word, add_special_tokens=False).ids
    return only


def weighted(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy over classes whose first is the background, which counts for less."""
    weights = torch.ones(logits.shape[-1], device=logits.device)
    weights[0] = BACKGROUND_WEIGHT
    return F.cross_entropy(
        logits.flatten(0, -2), target.flatten(), weight=weights, ignore_index=IGNORE
    )


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy over the places that have a label (not negative); 0 when none has."""
    target = torch.where(target < 0, IGNORE, target).flatten()
    total = F.cross_entropy(logits.flatten(0, -2), target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def to_device(labels: Labels, device: torch.device) -> dict[str, Tensor]:
    """Copy the labels to the device."""
    return {name: torch.from_numpy(array).to(device) for name, array in vars(labels).items()}


def answer_loss(
    model: InternVL, visual: Tensor, row: Row, image_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Give the answers' mean cross entropy and the share of their tokens that greedy gets right."""
    ids, targets, positions, visible = (
        torch.from_numpy(array).to(device) for array in vars(row).values()
    )
    mask = torch.zeros(visible.shape, dtype=visual.dtype, device=device).masked_fill_(
        ~visible, -torch.inf
    )
    hidden = model.read(ids, visual, image_id, positions, mask[:, None])
    wanted = targets != IGNORE
    logits = model.language_model.lm_head(hidden[wanted]).float()
    right = (logits.argmax(-1) == targets[wanted]).float().mean()
    return F.cross_entropy(logits, targets[wanted]), right.detach()
