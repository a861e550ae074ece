"""Take as many good steps as bad ones from critic rows, as conversations without a system turn.

    python -m examples.best_of_demo.rows best-of/rollouts/critic.jsonl \\
        --out best-of/critic-data/train.jsonl

The system text of the published data has ten times the tokens of the rest of such a row. A critic
that was trained without it is used with ``--critic-system ""``.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from internvl3_mlx.prompt.reasoning import CORRECT, INCORRECT, critic_question
from internvl3_mlx.records.json_values import write_json_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=800, help="at most so many rows")
    parser.add_argument("--matched", action="store_true", help="as many of both for each picture")
    options = parser.parse_args()
    kept = balanced(
        [*map(conversation, read_rows(options.rows))], options.count, matched=options.matched
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(options.out, kept)
    print(f"{len(kept)} rows")


def conversation(row: dict) -> dict:
    """Turn a row of one step into the critic's conversation."""
    [step] = row["steps_with_score"]
    asked = critic_question(f"<image>\n{row['question']}", step["step"])
    reply = CORRECT if step["score"] > 0 else INCORRECT
    turns = [{"from": "system", "value": ""}, {"from": "human", "value": asked}]
    return {"image": row["image"], "conversations": [*turns, {"from": "gpt", "value": reply}]}


def parts(row: dict) -> tuple[str, str, bool]:
    """Return the question, the answer and whether it is right: ``conversation`` the other way."""
    *_, asked, reply = (turn["value"] for turn in row["conversations"])
    before, between = critic_question("<image>\n|", "").split("|")
    question, answer = asked.removeprefix(before).split(between)
    return question, answer, reply == CORRECT


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def balanced(rows: list[dict], count: int, *, matched: bool = False) -> list[dict]:
    """Draw the same number of rows of both replies, in a random order.

    matched: of each picture as many of both, so that the text alone cannot tell them apart.
    """
    random = np.random.default_rng(0)
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["image"] if matched else "", []).append(row)
    kept = [row for group in groups.values() for row in as_many_of_both(group, random)]
    kept = [kept[n] for n in random.permutation(len(kept))]
    return as_many_of_both(kept, random)[:count]


def as_many_of_both(rows: list[dict], random: np.random.Generator) -> list[dict]:
    kinds = [
        [row for row in rows if row["conversations"][-1]["value"] == reply]
        for reply in (CORRECT, INCORRECT)
    ]
    each = min(map(len, kinds))
    drawn = [[kind[n] for n in random.permutation(len(kind))[:each]] for kind in kinds]
    return [row for pair in zip(*drawn, strict=True) for row in pair]


if __name__ == "__main__":
    main()
