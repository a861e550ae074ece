"""The first word of a command with several actions, such as ``models pull``."""

from collections.abc import Mapping, Sequence

import click

from internvl3_mlx.files import did_you_mean


class ActionType(click.Choice[str]):
    """A choice that also takes the words of other programs for the same action."""

    def __init__(self, actions: Sequence[str], other_words: Mapping[str, str]):
        super().__init__(actions)
        self.other_words = other_words

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        action = self.other_words.get(value, value)
        if action not in self.choices:
            hint = did_you_mean(value, self.choices)
            raise click.UsageError(f"unknown action {value!r}; {hint}", ctx)
        return action
