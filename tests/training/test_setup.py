"""The setup of a run: its model and data, resolved and validated before any weights are loaded."""

import json

import pytest
from fixtures.records import chat_record, write_jsonl
from fixtures.train_sessions import small_session, small_setup, write_data

from internvl3_mlx.errors import UserError


def test_augmented_images_cannot_have_a_precomputed_reference(tmp_path):
    write_data(tmp_path / "data", 3, pairs=True)
    source = {"root": "data", "annotation": "data/train.jsonl", "data_augment": True}
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"pairs": source}))
    settings = {"method": "mpo", "data": str(meta), "cache_reference": True}
    assert small_setup(tmp_path, **settings).images_vary
    with pytest.raises(UserError, match="augment changes the images"):
        small_setup(tmp_path, train="lora,mlp1", **settings)


def test_a_meta_file_with_other_sampling_is_other_data(tmp_path):
    write_data(tmp_path / "data", 4)
    meta = tmp_path / "meta.json"

    def identity(**use):
        meta.write_text(
            json.dumps({"a": {"annotation": "data/train.jsonl", "root": "data", **use}})
        )
        return small_setup(tmp_path, data=str(meta)).identity

    uses = ({}, {"repeat_time": 2}, {"data_augment": True}, {"max_dynamic_patch": 1})
    assert len({identity(**use)["use of the data"] for use in uses}) == len(uses)
    assert identity() == identity()


def test_a_reward_file_that_was_edited_is_another_run(tmp_path):
    write_data(tmp_path / "data", 3)
    file = tmp_path / "reward.py"
    settings = {"method": "grpo", "reward": f"{file}:worth"}

    def identity(body):
        file.write_text(f"def worth(answer, expected):\n    return {body}\n")
        return small_setup(tmp_path, **settings).identity

    first, second = identity(0), identity(1)
    assert {name for name in first if first[name] != second[name]} == {"file of the reward"}
    assert "file of the reward" not in small_setup(tmp_path, method="grpo", reward="exact").identity


def test_a_folder_without_training_data_is_reported(tmp_path):
    write_jsonl(tmp_path / "data" / "valid.jsonl", [chat_record()])
    with pytest.raises(UserError, match=r"no train.jsonl in"):
        small_session(tmp_path)


@pytest.mark.parametrize("setting", [{"patience": 2}, {"eval_accuracy": True}])
def test_settings_that_need_validation_data_say_so(tmp_path, setting):
    write_data(tmp_path / "data", 3)
    with pytest.raises(UserError, match="need validation data, and .* has none; add valid.jsonl"):
        small_setup(tmp_path, **setting)
