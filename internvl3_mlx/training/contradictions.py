"""Settings of a recipe that contradict each other, told before anything is loaded."""

from typing import TYPE_CHECKING

from internvl3_mlx.errors import UserError
from internvl3_mlx.training.config_fields import LOGGERS, PARTS, RANDOM

if TYPE_CHECKING:
    from internvl3_mlx.training.config import TrainRecipe


def check_together(recipe: "TrainRecipe") -> None:
    """Refuse settings that contradict each other."""
    if not recipe.train:
        raise UserError(f"train names nothing; wanted are {', '.join(PARTS)} or patterns")
    if unknown := [name for name in recipe.report_to if name not in LOGGERS]:
        raise UserError(f"report_to is {unknown[0]}; known are {', '.join(LOGGERS)}")
    if recipe.iters is None and recipe.epochs == 0:
        raise UserError("epochs is 0; give epochs above 0, or iters")
    if not recipe.adapts and (recipe.dora or recipe.rslora):
        raise UserError("dora and rslora shape adapters; add lora to train")
    if recipe.dora and recipe.rslora:
        raise UserError("dora and rslora both set the scale of adapters; choose one")
    if recipe.compile and (recipe.packing or recipe.grad_checkpoint or recipe.method == "mpo"):
        raise UserError(
            "compile is for samples of few lengths; leave out packing, grad_checkpoint and mpo"
        )
    if recipe.compile and "lm_head" in recipe.lora_keys:
        raise UserError("compile cannot take an adapted lm_head; leave one of them out")
    if recipe.method == "mpo":
        check_preference(recipe)


def check_preference(recipe: "TrainRecipe") -> None:
    if recipe.packing:
        raise UserError("packing is for samples; mpo lays each pair behind its prompt already")
    if not (recipe.dpo_weight or recipe.bco_weight or recipe.sft_weight):
        raise UserError("dpo_weight, bco_weight and sft_weight are all 0; nothing would be learned")
    if recipe.needs_reference and not (recipe.only_adapts or recipe.cache_reference):
        raise UserError(
            f"train is {','.join(recipe.train)}: once more than lora moves, the base is gone that "
            "mpo compares with; add cache_reference, which asks it beforehand"
        )
    if recipe.needs_reference and not recipe.only_adapts and recipe.v2pe_delta == RANDOM:
        raise UserError("v2pe_delta random cannot be asked beforehand; train lora alone, or fix it")
    if recipe.augment:
        check_asked_beforehand(recipe)


def check_asked_beforehand(recipe: "TrainRecipe") -> None:
    """Refuse pictures that are drawn anew where the reference knows only those it was asked of."""
    if recipe.needs_reference and not recipe.only_adapts:
        raise UserError(
            "augment draws pictures anew, and the reference is asked beforehand; "
            "train lora alone, or leave augment out"
        )
