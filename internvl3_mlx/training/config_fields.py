"""The values that settings of a training run choose from."""

from typing import Literal

PAIR_METHODS = ("mpo", "dpo", "orpo", "simpo")  # read preference pairs
METHODS = ("sft", *PAIR_METHODS, "kto", "grpo", "prm", "distill", "pretrain")
OPTIMIZERS = (
    "adamw", "adam", "adamax", "adafactor", "adagrad", "adadelta", "lion", "muon", "rmsprop", "sgd",
)  # fmt: skip
SCHEDULES = ("cosine", "linear", "constant")
REDUCTIONS = ("token", "sample", "square")
LOGGERS = ("wandb", "tensorboard", "swanlab")
ANSWER_METRICS = ("exact", "relaxed", "anls", "iou")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
LORA = "lora"
TRAINABLE_PARTS = (LORA, "language_model", "mlp1", "vision_model", "lm_head")
MODEL_PARTS = TRAINABLE_PARTS[1:4]
IMPORTANCE_LEVELS = ("token", "sequence")
REWARD_SHIFTS = ("running", "zero")
BAD_ROW_POLICIES = ("skip", "stop")  # what to do about a record that cannot be read
ON_LOSS_SPIKE = ("step-back", "stop", "ignore")  # when the loss has exploded
TILE_SHARING = ("shared", "each")  # of the tile limit, among the images of a record
RANDOM: Literal["random"] = "random"  # of v2pe_delta: drawn for each image
