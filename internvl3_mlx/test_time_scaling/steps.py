"""Split a response into the steps that a critic judges."""

from math import ceil

SEPARATOR = "\n\n"
MAX_STEPS = 16  # as in the published critic data


def split_steps(response: str, max_steps: int = MAX_STEPS) -> list[str]:
    r"""Split a response at ``\n\n``, exactly as the published code does.

    Of more than ``max_steps`` steps, groups of equal size are joined. A third newline stays with
    the step that follows it.
    """
    steps = response.split(SEPARATOR)
    size = ceil(len(steps) / max_steps)
    return [SEPARATOR.join(steps[at : at + size]) for at in range(0, len(steps), size)]
