"""From a question and its images to an answer, generated token by token."""
