"""What keeps a chat from beginning is reported before a model loads."""

from click.testing import CliRunner

from internvl3_mlx.cli.main import main


def test_standard_input_cannot_be_an_image_and_the_questions():
    result = CliRunner().invoke(main, ["chat", "-", "--model", "/nowhere"])
    assert result.exit_code == 2
    assert "a chat reads its questions from standard input" in result.output


def test_an_image_that_is_not_there_is_reported_before_the_model_loads():
    result = CliRunner().invoke(main, ["chat", "no.png", "--model", "/nowhere/at/all"])
    assert result.exit_code == 2
    assert "no file at no.png" in result.output
