"""Every decode loop runs inside the one memory context: weights wired, given back at its end."""

import pytest
from fixtures.inputs import random_image
from fixtures.pretend_gpu import pretend_metal

from internvl3_mlx.generation.compiled_step import MODE_VARIABLE, StepRunner
from internvl3_mlx.models.decoder import Decoder

IMAGES = [random_image(60, 60), random_image(130, 70, 1)]
LOOPS = {
    "plain": lambda vlm, **options: vlm.ask("What?", IMAGES, **options),
    "sampled": lambda vlm, **options: vlm.ask("What?", IMAGES, temperature=0.9, **options),
    "structured": lambda vlm, **options: vlm.ask("What?", IMAGES, regex="[a-f]{4}", **options),
    "lookup": lambda vlm, **options: vlm.ask("a b a b a b", lookup=True, **options),
    "batch": lambda vlm, **options: list(vlm.ask_each("What?", IMAGES, batch_size=2, **options)),
    "samples": lambda vlm, **options: vlm.ask_many("What?", IMAGES, n=2, **options),
}


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("loop", LOOPS)
def test_each_forward_pass_is_wired_and_the_limit_is_restored(vlm, monkeypatch, loop, mode):
    monkeypatch.setenv(MODE_VARIABLE, mode)
    calls = pretend_metal(monkeypatch, wired=7)
    limits, forward = [], Decoder.__call__

    def recorded(self, *arguments, **options):
        limits.append(calls.limit)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "__call__", recorded)
    run = StepRunner.run
    monkeypatch.setattr(
        StepRunner, "run", lambda *given: (limits.append(calls.limit), run(*given))[1]
    )
    LOOPS[loop](vlm, max_tokens=5)
    assert limits
    assert min(limits) > 7
    assert calls.limit == 7
    assert calls.clears
