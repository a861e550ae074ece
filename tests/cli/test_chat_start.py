"""What keeps a chat from beginning is told before a model loads."""

from click.testing import CliRunner

from internvl3_mlx.cli.main import main


def test_standard_input_cannot_be_a_picture_and_the_questions():
    result = CliRunner().invoke(main, ["chat", "-", "--model", "/nowhere"])
    assert result.exit_code == 2
    assert "standard input holds the questions of a chat" in result.output


def test_a_picture_that_is_not_there_is_told_before_the_model_loads():
    result = CliRunner().invoke(main, ["chat", "no.png", "--model", "/nowhere/at/all"])
    assert result.exit_code == 2
    assert "no file at no.png" in result.output
