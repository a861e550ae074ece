"""The user's file gives defaults and aliases; flags and the environment win over it."""

import json

import pytest
from click.testing import CliRunner

from internvl3_mlx.cli import chat as chat_module
from internvl3_mlx.cli import generate as generate_module
from internvl3_mlx.cli.main import main
from internvl3_mlx.cli.options import list_model_completions
from internvl3_mlx.cli.user_config import config_path
from internvl3_mlx.errors import UserError

TEXT = """\
model: 2b
adapter: meters
system: Be brief.
temperature: 0.5
aliases:
  ocr: {model: 8b, system: Read., max-tiles: 24}
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    path = tmp_path / "settings" / "mine.yaml"
    path.parent.mkdir()
    monkeypatch.setenv("INTERNVL3_CONFIG", str(path))
    monkeypatch.delenv("INTERNVL3_MODEL", raising=False)
    return path


@pytest.fixture
def ask(path, monkeypatch):
    """Return what ``generate`` would load and ask with."""
    path.write_text(TEXT)
    seen = []
    monkeypatch.setattr(generate_module, "run_generate", seen.append)

    def ask(*words, **env):
        done = CliRunner().invoke(main, ["generate", "-p", "Why?", *words], env=env)
        assert done.exit_code == 0, done.stderr
        return {**seen[-1].load_options, **seen[-1].generation_options}

    return ask


def config(*words):
    return CliRunner().invoke(main, ["config", *words])


def test_the_file_gives_what_no_flag_does(ask):
    wanted = {"model": "2b", "adapter": "meters", "system": "Be brief.", "temperature": 0.5}
    assert ask() == wanted
    assert ask("--temp", "0", "--system", "") == {**wanted, "temperature": 0.0, "system": ""}


def test_flags_win_over_the_environment_and_the_environment_over_the_file(ask):
    assert ask(INTERNVL3_MODEL="14b")["model"] == "14b"
    assert ask("--model", "1b", INTERNVL3_MODEL="14b")["model"] == "1b"


def test_the_adapter_is_not_used_with_another_model(ask):
    assert "adapter" not in ask("--model", "1b")
    assert ask("--model", "1b", "--adapter-path", "a")["adapter"] == "a"
    assert ask("--model", "2b")["adapter"] == "meters"


def test_an_alias_sets_the_model_and_its_settings_below_the_flags(ask):
    wanted = {"model": "8b", "system": "Read.", "temperature": 0.5, "max_tiles": 24}
    assert ask("--model", "ocr") == ask(INTERNVL3_MODEL="ocr") == wanted
    assert ask("--model", "ocr", "--max-tiles", "3") == {**wanted, "max_tiles": 3}
    assert [item.value for item in list_model_completions(None, None, "oc")] == ["ocr"]


def test_slash_model_takes_an_alias(path, monkeypatch):
    path.write_text("aliases: {ocr: {model: 8b, adapter: a, system: Read.}}")
    monkeypatch.setattr(chat_module, "load_vlm", lambda options, quiet: options)
    options = {"model": "2b", "adapter": "mine", "quantize": 4}
    loaded = chat_module.load_other_model(options, "ocr", quiet=True)
    assert loaded == {"model": "8b", "adapter": "a", "quantize": 4}


@pytest.mark.parametrize(("words", "kept"), [((), False), (("--history",), True)])
def test_the_file_turns_the_history_of_chats_off(path, monkeypatch, words, kept):
    path.write_text("history: false\n")
    seen = []
    monkeypatch.delenv("INTERNVL3_HISTORY", raising=False)

    def find(history):
        seen.append(history["history"])
        raise UserError("seen")

    monkeypatch.setattr(chat_module, "find_past", find)
    CliRunner().invoke(main, ["chat", *words])
    assert seen == [kept]


def test_settings_are_set_shown_and_unset(path):
    for name, value in (
        ("model", "2b"),
        ("history", "off"),
        ("max-tokens", "64"),
        ("aliases.ocr.model", "8b"),
        ("aliases.ocr.system", "Lies: alles."),
    ):
        done = config("set", name, value)
        assert done.exit_code == 0, done.stderr
    shown = "model: 2b\nmax-tokens: 64\nhistory: off\n"
    alias = "aliases.ocr.model: 8b\naliases.ocr.system: Lies: alles.\n"
    assert config().stdout == shown + alias
    assert json.loads(config("--json").stdout)["aliases"]["ocr"]["model"] == "8b"
    assert config("unset", "aliases.ocr").exit_code == 0
    assert config().stdout == shown
    assert config("path").stdout == f"{path}\n"


def test_any_spelling_of_a_flag_names_its_setting(path):
    for name, value in (("temp", "0.3"), ("m", "64"), ("aliases.ocr.model", "8b")):
        assert config("set", name, value).exit_code == 0
    assert config("set", "aliases.ocr.max_tiles", "2").exit_code == 0
    shown = "temperature: 0.3\nmax-tokens: 64\naliases.ocr.model: 8b\naliases.ocr.max-tiles: 2\n"
    assert config("list").stdout == shown
    assert config("get", "temp").stdout == "0.3\n"
    assert config("get", "aliases.ocr.max-tiles").stdout == "2\n"
    assert json.loads(config("get", "aliases.ocr").stdout) == {"model": "8b", "max-tiles": 2}
    assert "top-p is not set" in config("get", "top-p").stderr
    assert config("rm", "temp").exit_code == 0
    assert "temperature" not in config().stdout
    path.write_text("temp: 1\ntemperature: 2\n")
    assert "temperature is set twice; remove one of them" in config().stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: 2b", "unknown setting 'modle'; did you mean model?"),
        ("temperature: warm", "temperature is 'warm'; it must be a number"),
        ("temperature: -1", "temperature"),
        ("max-tokens: true", "max-tokens is True; it must be a whole number"),
        ("model: 2", "model is 2; it must be text; put it in quotes"),
        ("history: maybe", "history is 'maybe'; choose true or false"),
        ("aliases: [ocr]", "aliases must map names to settings"),
        ("aliases: {ocr: {system: x}}", "alias ocr names no model"),
        ("aliases: {ocr: {model: 8b, max-tile: 2}}", "did you mean max-tiles?"),
        ("aliases: {2b: {model: 8b}}", "2b is the name of a model"),
        ("aliases: {a/b: {model: 8b}}", "'a/b' cannot be an alias"),
        ("model: [", "is not valid YAML"),
        ("- model", "is not a YAML mapping"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(path, text, message):
    path.write_text(text)
    for words in (["config"], ["generate", "-p", "Why?"], ["config", "set", "model", "8b"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: {path}")
        assert message in done.stderr
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("set", "modle", "2b"), "did you mean model?"),
        (("set", "max-tokens", "many"), "max-tokens is 'many'; it must be a whole number"),
        (("set", "history", "x"), "history is 'x'; choose on or off"),
        (("set", "a.b", "x"), "an alias is set with aliases.NAME.model 8b"),
        (("set", "aliases.ocr", "x"), "an alias is set with aliases.NAME.model 8b"),
        (("set", "aliases.ocr.system", "x"), "alias ocr names no model"),
        (("set", "model"), "internvl3 config set takes a NAME and a VALUE"),
        (("unset", "model"), "model is not set"),
    ],
)
def test_a_mistake_in_a_change_writes_nothing(path, words, message):
    done = config(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert not path.exists()


def test_comments_are_not_lost(path):
    path.write_text("# mine\nmodel: 2b\n")
    done = config("set", "model", "8b")
    assert f"{path} has comments, which would be lost" in done.stderr
    assert path.read_text() == "# mine\nmodel: 2b\n"


def test_a_file_that_the_environment_names_must_exist(path):
    done = CliRunner().invoke(main, ["generate", "-p", "Why?"])
    assert done.stderr.startswith(f"error: no file {path}, which INTERNVL3_CONFIG names")


def test_the_file_is_in_the_users_folder_of_settings(tmp_path, monkeypatch):
    monkeypatch.delenv("INTERNVL3_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_path() == tmp_path / "internvl3-mlx" / "config.yaml"
    assert config("set", "temperature", "0.25").exit_code == 0
    assert config_path().read_text() == "temperature: 0.25\n"
