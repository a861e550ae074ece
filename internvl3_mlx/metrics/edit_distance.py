"""Levenshtein distance between two strings."""


def edit_distance(a: str, b: str) -> int:
    """Count the insertions, deletions and substitutions that turn one string into the other."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            substituted = diagonal + (left != right)
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def similarity(a: str, b: str) -> float:
    """Return 1 - distance / length of the longer string; 1 for two empty ones."""
    longest = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longest if longest else 1.0
