"""Write rendered items as PNG files with a JSONL file that ``internvl3 eval`` reads."""

import json
from pathlib import Path
from typing import cast

from PIL import Image

from internvl3_mlx.errors import WriteError
from internvl3_mlx.evaluation.synthetic.sets import SyntheticItems
from internvl3_mlx.files import atomic_write

QUESTIONS = "questions.jsonl"


def save_items(source: SyntheticItems, folder: Path) -> None:
    """Write all items into a new or empty folder; raises ``WriteError`` for any other."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WriteError(f"{folder} is not empty; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    for entry in source.entries:
        item = source[entry.number]
        names = [f"{item.id}-{part}.png" for part in range(len(item.images))]
        for name, image in zip(names, item.images, strict=True):
            with atomic_write(folder / name, durable=False) as part_path:
                cast(Image.Image, image).save(part_path, "PNG")
        row = {
            "id": item.id,
            "image": names,
            "question": item.question,
            "answers": [*item.answers],
            "category": item.category,
        }
        rows.append(json.dumps(row) + "\n")
    with atomic_write(folder / QUESTIONS) as part_path:
        part_path.write_text("".join(rows), "utf-8")
