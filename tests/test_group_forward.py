"""Which forward pass a dapo training takes by its option `group_forward`, and what it says of it."""

import logging

import pytest
import torch
from scripted_dapo import SIZE
from scripted_trainer import assert_same, make_trainer, tokenizer
from tiny_model import tiny_model
from transformers import Qwen3ForCausalLM

from rerank.models import group_attention
from rerank.models.group_attention import ATTENTION


def sliding_model():
    config = tiny_model(tokenizer()).config
    config.layer_types, config.sliding_window = ["full_attention", "sliding_attention"], 8
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


def test_auto_groups_where_the_model_can_and_is_the_default(tmp_path, caplog):
    caplog.set_level(logging.INFO, "rerank.dapo.checks")
    trainer = make_trainer(tmp_path, grouped="auto")
    assert trainer.group_forward and trainer.group_obstacle is None
    assert trainer.model.config._attn_implementation == ATTENTION
    assert "a prompt is computed once for the completions of its group" in caplog.text


@pytest.mark.parametrize(
    ("model", "rows", "obstacle"),
    [
        (sliding_model, 2 * SIZE, "it has layers of type sliding_attention; use a model with full attention"),
        (None, SIZE // 2, f"per_device_train_batch_size is {SIZE // 2}, but group_forward takes whole groups of num"),
    ],
    ids=["model", "batch"],
)
def test_auto_trains_as_trl_does_where_something_speaks_against_groups_and_says_what(
    tmp_path, caplog, monkeypatch, model, rows, obstacle
):
    caplog.set_level(logging.INFO, "rerank.dapo.checks")
    monkeypatch.setattr(group_attention, "_score", lambda *args: pytest.fail("a group was computed as one row"))
    batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 2 * SIZE // rows}
    trainers = [
        make_trainer(tmp_path / str(setting), grouped=setting, model=model and model(), **batch)
        for setting in ("auto", False)
    ]
    assert caplog.text.count(f"each completion is computed with its own prompt, as TRL does: {obstacle}") == 1
    assert [trainer.group_forward for trainer in trainers] == [False, False]
    assert trainers[0].group_obstacle.startswith(obstacle) and trainers[1].group_obstacle is None
    for trainer in trainers:
        trainer.train()
    assert_same(*trainers, atol=0)


def test_true_is_refused_where_something_speaks_against_it(tmp_path):
    with pytest.raises(ValueError, match="layers of type sliding_attention; use a model with full attention, or set"):
        make_trainer(tmp_path, grouped=True, model=sliding_model())
