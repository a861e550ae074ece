"""A shell completes commands and models."""

import pytest
from click.testing import CliRunner

from internvl3_mlx.cli.main import main
from internvl3_mlx.cli.options import list_model_completions


@pytest.mark.parametrize("shell", ["zsh", "bash", "fish"])
def test_completion_prints_the_script_of_each_shell(shell):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_INTERNVL3_COMPLETE={shell}_complete" in result.output
    assert "_internvl3_completion" in result.output


def test_models_are_completed_from_sizes_the_cache_and_folders(tmp_path, monkeypatch):
    (tmp_path / "models--OpenGVLab--InternVL3-2B").mkdir()
    (tmp_path / "models--other--thing").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    values = [item.value for item in list_model_completions(None, None, "")]
    assert "2b" in values
    assert "OpenGVLab/InternVL3-2B" in values
    assert "other/thing" not in values
    assert [item.value for item in list_model_completions(None, None, "Open")][
        0
    ] == "OpenGVLab/InternVL3-2B"
    monkeypatch.chdir(tmp_path)
    for name in ("my model", ".hidden", "x/inside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mine.txt").touch()
    assert [item.value for item in list_model_completions(None, None, "m")] == [
        "models--OpenGVLab--InternVL3-2B",
        "models--other--thing",
        "my model",
    ]
    assert [item.value for item in list_model_completions(None, None, "x/")] == ["x/inside"]
    # an item of another type makes bash drop the names
    assert {item.type for item in list_model_completions(None, None, "")} == {"plain"}
