"""Choose a few of all questions that could be asked about an image."""

import numpy as np

from examples.demo_model.questions import Question

ONLY_ONE = 0.25  # weight of a count whose answer is 1: most things in most pictures come once
QUESTIONS = 6  # asked about each picture


def choose(
    random: np.random.Generator, questions: list[Question], tasks: dict[str, float]
) -> list[Question]:
    """Pick a few questions, the weighty tasks more often."""
    weights = np.array([weight(question, tasks) for question in questions])
    # Exponential races: the smallest times are a weighted sample without replacement.
    order = np.argsort(random.exponential(size=len(questions)) / weights)[:QUESTIONS]
    return [questions[index] for index in order]


def weight(question: Question, tasks: dict[str, float]) -> float:
    """Say how much a question is wanted."""
    if question.task in ("count", "count_all") and question.answer == "1":
        return ONLY_ONE
    return tasks.get(question.task, 1.0)
