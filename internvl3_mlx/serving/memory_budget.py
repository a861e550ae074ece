"""What a request takes at most, and whether this machine has it: known before it is computed."""

from dataclasses import dataclass

from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.generation.context_budget import kv_nbytes_per_token
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.memory import GB, TIGHT_SHARE
from internvl3_mlx.serving.requests import AnswerRequest, RequestTooLarge

EMBEDDING_COPIES = 4  # of a prompt: embedded, with visual tokens, and a chunk's activations


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that weights and caches may take together."""

    limit_nbytes: int

    @classmethod
    def from_setting(cls, nbytes: int | None) -> "MemoryBudget":
        """Take the setting, or the share of the device's memory that stays fast."""
        return cls(int(TIGHT_SHARE * gpu_memory_limit()) if nbytes is None else nbytes)

    def check_can_fit(
        self, nbytes: int, weights: int, request: AnswerRequest, inputs: ModelInputs
    ) -> None:
        """Raise ``RequestTooLarge`` for a request that does not fit even alone."""
        free = self.limit_nbytes - weights
        if nbytes <= free:
            return
        answers = f" and {request.n} answers" if request.n > 1 else ""
        raise RequestTooLarge(
            f"this request takes up to {nbytes / GB:.2f} GB for {len(inputs.token_ids):,} prompt "
            f"tokens{answers}, but {max(free, 0) / GB:.2f} GB are free beside the model; send "
            "fewer or smaller images (max_tiles), or lower max_tokens or n"
        )


def request_nbytes(
    runner: ModelRunner, request: AnswerRequest, inputs: ModelInputs, max_tokens: int
) -> int:
    """Return what prompt and answers take at most, beside the weights. Answers share the prompt."""
    text, length = runner.config.text, len(inputs.token_ids)
    item = runner.model.language_model.model.norm.weight.dtype.size
    tokens = length + max_tokens * (request.best_of or request.n)
    tiles = sum(image.tiles.nbytes for image in inputs.processed_images)
    embeddings = EMBEDDING_COPIES * length * text.hidden_size * item
    return tokens * kv_nbytes_per_token(runner.model, request.config) + embeddings + tiles
