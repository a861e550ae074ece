"""``internvl3 convert`` by whole screens."""

import json

import pytest
from click.testing import CliRunner
from fixtures.hub import running_hub
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe

from internvl3_mlx.cli.convert_run import DTYPE_NAMES, LAYOUTS, MODES
from internvl3_mlx.cli.main import main
from internvl3_mlx.convert import plan, recipes


def invoke(*args, **kwargs):
    return CliRunner().invoke(main, ["convert", *map(str, args)], prog_name="internvl3", **kwargs)


@pytest.fixture
def source():
    return tiny(Recipe()).folder


def test_the_whole_screen_of_a_conversion(source, tmp_path):
    result = invoke(source, "-q", "--q-group-size", 32, "--mlx-path", tmp_path / "out")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert result.exit_code == 0, result.stderr
    assert lines[0].startswith("verdict noticeable (KL 0.")  # random weights suffer from 6 bits
    assert lines[1] == f"source {source}"
    assert lines[2:6] == [f"target {tmp_path / 'out'}", "layout mlx", lines[4], "files 1"]
    assert "6 32 affine 23" in lines  # the default of a small language model
    assert "8 32 affine 2" in lines
    assert (tmp_path / "out" / "README.md").exists()
    assert result.stderr == ""


@pytest.mark.parametrize("name", ["--hf-path", "--model"])
def test_the_names_of_other_converters_are_understood(source, tmp_path, name):
    result = invoke(name, source, "--mlx-path", tmp_path / "out", "--no-verify", "--json")
    assert json.loads(result.stdout)["target"] == str(tmp_path / "out")


def test_json_tells_everything(source, tmp_path):
    samples = tmp_path / "pictures"
    samples.mkdir()
    from fixtures.inputs import random_image

    random_image(80, 60).save(samples / "a.png")
    result = invoke(
        source,
        "--q-bits",
        3,
        "--q-group-size",
        32,
        "--mlx-path",
        tmp_path / "out",
        "--measure",
        "--measure-images",
        samples,
        "--json",
    )
    report = json.loads(result.stdout)
    assert report["bits_per_parameter"]["language model"] == pytest.approx(5.0, abs=0.1)
    assert report["measured"]["kl"] > 0
    assert report["verification_kl"] > 0
    assert {"bits": 3, "group_size": 32, "mode": "affine", "modules": 23} in report["quantization"]
    assert "KL" in (tmp_path / "out" / "README.md").read_text()


def test_calibration_from_the_command_line(source, tmp_path):
    from fixtures.inputs import random_image

    (tmp_path / "pictures").mkdir()
    random_image(80, 60).save(tmp_path / "pictures" / "a.png")
    result = invoke(
        source,
        "--calibrate",
        tmp_path / "pictures",
        "--target-bpw",
        5,
        "--mlx-path",
        tmp_path / "out",
        "--json",
    )
    report = json.loads(result.stdout)
    assert report["calibration"]["bits_per_weight"] <= 5
    assert len(report["calibration"]["most_sensitive"]) > 3


def test_a_dry_run_writes_nothing(source, tmp_path):
    result = invoke(source, "-q", "--dry-run", "--mlx-path", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["tensors"] > 50
    assert [*tmp_path.iterdir()] == []


def test_the_target_is_named_after_the_model(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke(source, "--quant-predicate", "mixed_4_6", "--no-verify")
    assert [path.name for path in tmp_path.iterdir()] == [f"{source.name}-mixed_4_6"]


def test_a_recipe_file_from_the_command_line(source, tmp_path):
    (tmp_path / "mine.yaml").write_text("text: {bits: 6, group_size: 32}\n")
    result = invoke(
        source, "--quant-predicate", tmp_path / "mine.yaml", "--mlx-path", tmp_path / "o", "--json"
    )
    assert {entry["bits"] for entry in json.loads(result.stdout)["quantization"]} == {6, 8}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name one model to convert: a folder, a repository or a size such as 2b"),
        (
            ("{source}", "--q-bits", "7"),
            "7 bits are not supported in affine mode; choose from 2, 3, 4, 5, 6, 8",
        ),
        (
            ("{source}", "--quant-predicate", "mixed_9"),
            "unknown recipe 'mixed_9'; did you mean mixed_",
        ),
        (
            ("{source}", "--quant-predicate", "mixed_4_6", "--q-bits", "4"),
            "a recipe chooses the bits; drop",
        ),
        (
            ("{source}", "--quant-predicate", "a.yaml", "--calibrate", "x"),
            "a recipe and calibration both choose the bits",
        ),
        (
            ("{source}", "--calibrate", "x", "--q-bits", "4"),
            "calibration chooses bits and group sizes itself",
        ),
        (("{source}", "--target-bpw", "4"), "add a folder of calibration images (--calibrate)"),
        (("{source}", "--upload-repo", "name"), "--upload-repo name is not a repository name"),
        (("{source}", "--mlx-path", "{source}"), "overlaps the source"),
        (("{source}", "-d"), "is not quantized; drop --dequantize"),
        (("nowhere/at/all",), "no model folder, size or repository 'nowhere/at/all'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(source, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(*(word.format(source=source) for word in words))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_dequantizing_from_the_command_line(tmp_path):
    packed = tiny(Recipe(layout="mlx", bits=Bits(group_size=32)))
    result = invoke(packed.folder, "-d", "--to", "hf", "--mlx-path", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["quantization"] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "internvl"


def test_an_upload_asks_and_a_pipe_cannot_say_yes(source, tmp_path, monkeypatch):
    with running_hub(monkeypatch) as hub:
        hub.repos["me/mine"] = {"config.json": b"old"}
        flags = ("--upload-repo", "me/mine", "--no-verify", "--mlx-path")
        refused = invoke(source, *flags, tmp_path / "a")
        assert "me/mine was not changed" in refused.stderr
        assert hub.repos["me/mine"] == {"config.json": b"old"}
        done = invoke(source, *flags, tmp_path / "b", "--yes", "--json")
        assert json.loads(done.stdout)["uploaded"].endswith("me/mine")
        assert hub.repos["me/mine"]["README.md"] == (tmp_path / "b" / "README.md").read_bytes()


def test_the_flags_offer_what_the_converter_knows():
    assert set(MODES) == {*recipes.MODES}
    assert LAYOUTS == plan.LAYOUTS
    assert {*DTYPE_NAMES} == {*plan.FLOATS}
