"""From a question and its pictures to an answer, a piece at a time."""
