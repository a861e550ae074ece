"""The bridges to other harnesses: lmms-eval on a local task file, VLMEvalKit's interface."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from fixtures.eval_data import png
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "lmms_eval"
TASK = """
task: shapes
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes.doc_to_visual
doc_to_text: !function shapes.doc_to_text
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 3, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
FUNCTIONS = """
import io
from PIL import Image
def doc_to_visual(doc):
    return [Image.open(io.BytesIO(doc["picture"])).convert("RGB")]
def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture
def entry_point(tmp_path, monkeypatch):
    """Install the example's entry point for this test alone."""
    info = tmp_path / "site" / "internvl3_lmms_eval-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: internvl3-lmms-eval\nVersion: 0.1.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[lmms_eval.models]\ninternvl3_mlx = internvl3_lmms_eval:manifest\n"
    )
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.syspath_prepend(str(EXAMPLE))


@pytest.mark.usefixtures("entry_point")
def test_lmms_eval_runs_a_local_task_on_our_model(tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.registry_v2 import ModelRegistryV2
    from lmms_eval.tasks import TaskManager

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert "internvl3_mlx" in registry.list_model_names()
    rows = [{"picture": png(n, 60 + n, 40), "question": f"Which is {n}?", "answer": "x"}
            for n in range(5)]  # fmt: skip
    data = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "shapes.yaml").write_text(TASK.format(data=data))
    (tasks / "shapes.py").write_text(FUNCTIONS)
    model = str(tiny(Recipe()).folder)
    found = simple_evaluate(
        model=registry.get_model_class("internvl3_mlx")(pretrained=model, batch_size=2),
        tasks=["shapes"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
    )
    said = [sample["resps"][0][0] for sample in found["samples"]["shapes"]]
    from internvl3_mlx import load

    vlm = load(model)
    alone = [
        vlm.ask(row["question"], [row["picture"]], max_tiles=12, max_tokens=3, keep_boxes=True).text
        for row in rows
    ]
    assert said == alone


@pytest.fixture
def adapter(monkeypatch):
    """The adapter over a stand-in for VLMEvalKit's base class."""

    class BaseModel:
        def dump_image(self, line, dataset):
            return line["paths"]

    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vlmeval.vlm.base"].BaseModel = BaseModel
    monkeypatch.delitem(sys.modules, "examples.vlmevalkit.adapter", raising=False)
    from examples.vlmevalkit import adapter

    return adapter


def test_vlmevalkits_interface(adapter, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png())
    model = adapter.InternVL3MLX(str(tiny(Recipe()).folder))
    assert model.use_custom_prompt("ChartQA_TEST")
    assert not model.use_custom_prompt("MVBench")
    assert not model.use_custom_prompt("Unheard_OF")
    line = {"index": 3, "question": "How many?", "A": float("nan"), "hint": None,
            "paths": [str(tmp_path / "a.png")]}  # fmt: skip
    message = model.build_prompt(line, "ChartQA_TEST")
    assert message[0]["value"] == ("How many?\nAnswer the question using a single word or phrase.")
    monkeypatch.setattr(adapter, "MAX_TOKENS", 5)
    assert isinstance(model.generate_inner(message, "ChartQA_TEST"), str)
    choice = model.build_prompt({**line, "A": "one", "B": "two"}, "MMBench_DEV_EN")
    assert choice[0]["value"].startswith("How many?\nA. one\nB. two\n")
