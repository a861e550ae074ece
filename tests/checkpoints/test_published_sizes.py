"""The seven published sizes, from headers alone, have the published counts in every layout."""

import pytest
from fixtures.published_sizes import SIZES, write_headers
from mlx.utils import tree_flatten

from internvl3_mlx.checkpoints.reader import open_checkpoint, parameters_by_part
from internvl3_mlx.checkpoints.remap import plan_remap, resolve_rows
from internvl3_mlx.config import read_config
from internvl3_mlx.models.internvl import InternVL

DISK_LIMIT = 2_000_000


@pytest.mark.parametrize("layout", ["original", "hf", "mlx"])
@pytest.mark.parametrize("name", SIZES)
def test_published_parameters_and_tensors(tmp_path, name, layout):
    size = SIZES[name]
    file = write_headers(tmp_path, size, layout)
    checkpoint = open_checkpoint(tmp_path)
    config, rules = plan_remap(checkpoint, read_config(tmp_path))
    parts = parameters_by_part(checkpoint, config)
    assert sum(part.parameters for part in parts.values()) == size.parameters
    assert checkpoint.nbytes == 2 * size.parameters
    expected = size.hf_tensors if layout == "hf" else size.tensors
    assert expected is None or len(checkpoint.tensors) == expected
    assert file.stat().st_blocks * 512 < DISK_LIMIT
    assert config.num_image_token == 256
    assert not config.text.tie_word_embeddings
    rows = {name: info.shape[0] for name, info in checkpoint.tensors.items()}
    ours = {
        target: sum(part.count for part in parts)
        for rule in rules
        for target, parts in zip(rule.targets, resolve_rows(rule, rows, config.text), strict=True)
    }
    model = InternVL(config, image_id=0)  # lazily: nothing of it is computed
    assert ours == {name: x.shape[0] for name, x in tree_flatten(model.parameters())}
