"""``generate --best-of`` and ``score``: what is printed, and what is refused early."""

import json

import pytest
from click.testing import CliRunner
from fixtures.inputs import random_image
from fixtures.loaded_models import tiny
from fixtures.tiny import Recipe

from internvl3_mlx import load, load_critic
from internvl3_mlx.cli.main import main
from internvl3_mlx.test_time_scaling import memory_plan

IMAGE = random_image(60, 60)
SAMPLED = {"temperature": 1.0, "seed": 4, "max_tokens": 5}
FLAGS = ("--temp", "1", "--seed", "4", "-m", "5")


@pytest.fixture(scope="module")
def folder():
    return str(tiny(Recipe()).folder)


@pytest.fixture(scope="module")
def result(folder):
    """What Python returns for the same question and seed."""
    critic = load_critic(folder)
    return load(folder).best_of("What?", [IMAGE], n=3, critic=critic, **SAMPLED)


@pytest.fixture
def run(folder, tmp_path):
    IMAGE.save(tmp_path / "a.png")
    asked = ["generate", str(tmp_path / "a.png"), "-p", "What?", "--model", folder]
    return lambda *words: CliRunner().invoke(main, [*asked, *words])


def test_the_best_is_printed_and_how_it_was_chosen(run, folder, result):
    found = run("--best-of", "3", "--critic", folder, *FLAGS)
    assert (found.stdout, found.exit_code) == (f"{result.answer.text}\n", 0)
    assert f"best of 3: candidate {result.index} · {result.score:.4g} ({folder}, soft)" in (
        found.stderr
    )
    quiet = run("--best-of", "3", "--critic", folder, *FLAGS, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (found.stdout, "")


def test_all_candidates_can_be_shown(run, folder, result):
    found = run("--best-of", "3", "--critic", folder, "--show-candidates", *FLAGS, "--quiet")
    lines = found.stdout.splitlines()
    headings = [line for line in lines if line.startswith("== ")]
    scores = [f"{candidate.score:.4g}" for candidate in result.candidates]
    assert headings == [
        f"== {n} · {score}{' · best' * (n == result.index)}" for n, score in enumerate(scores)
    ]


def test_json_has_the_candidates_with_their_steps(run, folder, result):
    found = run("--best-of", "3", "--critic", folder, "--critic-mode", "orm", *FLAGS, "--json")
    content = json.loads(found.stdout)
    assert content["best_of"]["critic_mode"] == "orm"
    assert [one["text"] for one in content["best_of"]["candidates"]] == [
        candidate.answer.text for candidate in result.candidates
    ]
    assert all("steps" in one for one in content["best_of"]["candidates"])


def test_without_a_critic_the_majority_or_the_likelihood_decides(run):
    for select, kind in (((), "share of votes"), (("--select", "log-prob"), "mean log-prob")):
        found = run("--best-of", "3", *select, *FLAGS)
        assert found.exit_code == 0
        assert kind in found.stderr


def test_models_that_do_not_fit_take_turns_and_it_is_said(run, folder, monkeypatch, result):
    monkeypatch.setattr(memory_plan, "gpu_memory_limit", lambda: 10**6)
    found = run("--best-of", "3", "--critic", folder, *FLAGS)
    assert "do not fit into 0.0 GB together: the model writes all candidates first" in found.stderr
    assert found.stdout == f"{result.answer.text}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--critic", "demo"), "--critic needs --best-of N"),
        (("--select", "vote"), "--select needs --best-of N"),
        (("--best-of", "2", "--critic-mode", "hard"), "--critic-mode needs --critic"),
        (("--best-of", "2", "--critic-system", "prm"), "--critic-system needs --critic"),
        (("--best-of", "2", "--critic", "demo", "--select", "vote"), "--select is for best-of-N"),
        (("--best-of", "2", "--temp", "0"), "at temperature 0 all candidates are the same"),
        (("--best-of", "2", "--num-samples", "2"), "--best-of cannot be combined with --each"),
        (("--best-of", "0"), "0 is not in the range"),
    ],
)
def test_mistakes_are_told_before_a_model_loads(words, message, monkeypatch):
    monkeypatch.setattr("internvl3_mlx.load", lambda **_: pytest.fail("a model was loaded"))
    found = CliRunner().invoke(main, ["generate", "-p", "What?", *words])
    assert (found.exit_code, message in found.stderr) == (2, True)


@pytest.fixture
def score(folder, tmp_path):
    IMAGE.save(tmp_path / "a.png")
    asked = ["score", "--critic", folder, "-i", str(tmp_path / "a.png"), "-p", "What?"]
    return lambda *words, **more: CliRunner().invoke(main, [*asked, *words], **more)


def test_a_response_is_scored_step_by_step(score, folder, tmp_path):
    text = "A red square.\n\nA blue circle\nbelow it."
    (tmp_path / "response.txt").write_text(text + "\n")
    wanted = load_critic(folder).open("What?", [IMAGE]).score(text)
    found = score("--response", str(tmp_path / "response.txt"))
    first, second = (f"{step.score:.3f}" for step in wanted.steps)
    assert found.stdout == f"{first}  A red square.\n{second}  A blue circle\n       below it.\n"
    assert f"{wanted.score:.4g} · mean of P(+)" in found.stderr
    piped = score("--response", "-", "--json", input=text)
    content = json.loads(piped.stdout)
    assert content["score"] == pytest.approx(wanted.score, abs=1e-4)
    assert [step["text"] for step in content["steps"]] == text.split("\n\n")


def test_generated_replies_are_shown(score):
    found = score("--response", "-", "--critic-mode", "hard", "--json", input="one\n\ntwo")
    content = json.loads(found.stdout)
    assert {step["score"] for step in content["steps"]} <= {0.0, -100.0}
    assert all("reply" in step for step in content["steps"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the critic: --critic PATH|REPO"),
        (("--critic", "demo"), "name the question: -p"),
        (("--critic", "demo", "-p", "What?"), "name the response to judge: --response FILE"),
        (
            ("--critic", "demo", "-p", "What?", "--response", "/no/such/file"),
            "cannot read /no/such/file: No such file or directory; check the path",
        ),
        (
            ("--critic", "demo", "-p", "What?", "--response", "-"),
            "the response on standard input is empty",
        ),
        (("--critic", "demo", "-p", "What?", "--response", "/tmp"), "/tmp is not a regular file"),
    ],
)
def test_a_score_needs_all_its_parts(words, message):
    found = CliRunner().invoke(main, ["score", *words])
    assert (found.exit_code, message in found.stderr) == (2, True)
