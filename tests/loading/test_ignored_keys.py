"""``internvl3 info`` names what a model's files say and this package does not look at."""

import json

from fixtures.checkpoints import write_json
from fixtures.damaged_checkpoints import copied, edit_config
from fixtures.tiny import Recipe

from internvl3_mlx.loading.inspect import inspect_model


def test_keys_without_effect_are_listed_by_file_and_part(tmp_path):
    folder = copied(Recipe(layout="hf_a"), tmp_path)
    edit_config(folder, lambda config: config.update(shiny_option=3))
    edit_config(folder, lambda config: config["text_config"].update(logit_bias=0.5, use_cache=True))
    write_json(folder / "generation_config.json", {"temperature": 0.3, "eos_token_id": 5})
    ignored = inspect_model(str(folder)).to_dict()["ignored_keys"]
    assert ignored["config.json"] == ["shiny_option"]
    assert ignored["config.json text_config"] == ["logit_bias"]
    assert ignored["generation_config.json"] == ["temperature"]
    assert "tile" not in json.dumps(ignored)
