"""An item head is refused for a large catalogue, before a model loads."""

import json
import re

import pytest
from next_item_run import write_next_item_run
from tiny_model import sft_config
from toy_run import NUM_ITEMS
from trl import ModelConfig

from rerank import sft
from rerank.next_item import item_head
from rerank.next_item.item_head import refuse_many_items


def test_the_memory_of_a_million_items_is_said_and_a_hundred_thousand_are_taken():
    refuse_many_items(100_000, 4096, 1000)
    # a million times (16 + 8) x 1000 for vectors and 12 x 100 for scores
    with pytest.raises(
        ValueError, match=r"score 1000000 items at up to 100 targets at once, which takes 25.2 GB beside"
    ):
        refuse_many_items(1_000_000, 1000, 100)
    with pytest.raises(ValueError, match=r"takes at least 1.2 GB beside the model, and is for 100000 items at most; "):
        refuse_many_items(1_000_000, 0, 100)


def test_the_sft_stage_refuses_it_with_the_sizes_of_its_recipe_and_takes_the_cure(tmp_path, monkeypatch):
    run = write_next_item_run(tmp_path / "run")
    (run / "midtrain/model/model.safetensors").unlink()  # nothing is loaded
    width = json.loads((run / "midtrain/model/config.json").read_text())["hidden_size"]
    config = sft_config(tmp_path, per_device_train_batch_size=16)
    losses = [{"name": "nll"}, {"name": "cllm4rec"}]

    def check(losses):
        sft.check(
            sft.SftArguments(run_dir=str(run), task="next_item", losses=losses, max_items=5), config, ModelConfig()
        )

    check(losses)
    monkeypatch.setattr(item_head, "MOST_ITEMS", NUM_ITEMS - 1)
    monkeypatch.setattr(item_head, "GB", 1.0)
    size = NUM_ITEMS * (24 * width + 12 * 16 * 4)
    words = f"score {NUM_ITEMS} items at up to 64 targets at once, which takes {size:.1f} GB beside the model"
    with pytest.raises(ValueError, match=re.escape(words) + ".*take cllm4rec out of losses"):
        check(losses)
    check(losses[:1])
