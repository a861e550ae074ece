"""The figures of a run before it begins."""

from typing import Any

from internvl3_mlx.training.optimizers import warmup_updates
from internvl3_mlx.training.trainable import count_parameters
from internvl3_mlx.training.session import Session


def plan_of(session: Session) -> dict[str, Any]:
    """Say what will be trained on what, how often, and how much of the model it is."""
    recipe, learner, ground = session.recipe, session.learner, session.ground
    counts = count_parameters(learner.model)
    survey = ground.train.survey
    together = recipe.batch_size * recipe.grad_accumulation_steps * learner.ranks.size
    plan = {
        "method": recipe.method,
        "model": recipe.model or ground.ready.folder.name,
        "trained": f"{counts.trainable:,} of {counts.total:,} parameters ({counts.share:.2%})",
        "layers_adapted": len(session.adapted) or None,
        "rows": len(survey.sizes.numbers),
        "tokens": int(survey.sizes.tokens.sum()),
        "tiles": int(survey.sizes.tiles.sum()),
        "rows_validated": len(ground.valid.survey.sizes.numbers) if ground.valid else None,
        "updates": learner.updates,
        "of_them_warm_up": warmup_updates(recipe, learner.updates),
        "samples_an_update": None if recipe.packing else together,
        "processes": learner.ranks.size if learner.ranks.size > 1 else None,
        "goes_on_after_update": learner.update or None,
    }
    return {name: value for name, value in plan.items() if value is not None}
