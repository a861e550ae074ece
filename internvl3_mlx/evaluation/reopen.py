"""Open the items of a saved evaluation again."""

from collections.abc import Mapping
from typing import Any

from internvl3_mlx.errors import DataError
from internvl3_mlx.evaluation.item_files import Layout, open_items
from internvl3_mlx.evaluation.items import ItemSource, rotate_all
from internvl3_mlx.evaluation.synthetic.sets import SyntheticItems
from internvl3_mlx.evaluation.tasks import TASKS

BOX_METRICS = ("iou", "point")


def reopen_items(settings: Mapping[str, Any]) -> ItemSource:
    """Open the data that an evaluation was made with.

    Raises ``DataError`` where the file is gone or has changed.
    """
    data, how = settings["data"], settings["how"]
    if "set" in data:
        return SyntheticItems.from_description(data)
    task = TASKS.get(settings["task"])
    layout = Layout(boxes=how["metric"] in BOX_METRICS) if task is None else task.layout
    source = open_items(data["path"], layout, data.get("split"))
    if source.description["digest"] != data["digest"]:
        raise DataError(f"{data['path']} has changed since the evaluation")
    return rotate_all(source, source.option_counts) if how["circular"] else source
