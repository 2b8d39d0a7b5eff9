"""Several updates on the same rollouts, and the KL term: as in plain TRL, held on-policy, and resumed exactly."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from scripted_dapo import SIZE, first_drawn, useful_for
from scripted_trainer import Scripted, assert_same, logged, make_trainer, plain_trainer, stored, tokenizer, weights
from tiny_model import tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer import grpo_trainer

from rerank.dapo.checkpoint import BatchInUse, load_batch
from rerank.dapo.consistency import EVERY, is_due
from rerank.dapo.tracking import GAP

TWICE = {"num_iterations": 2}  # each completion in both updates
HALVES = {"steps_per_generation": 2}  # each half of the completions in one
UPDATES = [pytest.param(TWICE, id="twice"), pytest.param(HALVES, id="halves")]
LR = {"learning_rate": 3.0}  # of SGD; far enough for ratios to leave the clip range


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """TRL's own trainer takes completions into its micro-batches in the order of sampling, as ours does."""
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)


class Recorded(Scripted):
    """Notes the largest difference of a ratio from 1 in each micro-batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        log_ratio = (self.prepared.logps - inputs["old_per_token_logps"]) * inputs["completion_mask"]
        self.ratios = [*getattr(self, "ratios", []), (log_ratio.exp() - 1).abs().max().item()]
        return loss


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("updates", UPDATES)
def test_both_updates_are_those_of_plain_trl_clipped_at_epsilon_high(tmp_path, updates, grouped):
    options = {**LR, **updates, "max_steps": 4}
    ours = make_trainer(tmp_path / "ours", rounds=0, grouped=grouped, kind=Recorded, **options)
    plain = plain_trainer(tmp_path / "plain", **options)
    for trainer in (ours, plain):
        trainer.train()
    for name in ("loss", "grad_norm", "clip_ratio/high_mean", "clip_ratio/low_mean"):
        assert logged(ours, name) == pytest.approx(logged(plain, name), rel=1e-3, abs=1e-5), name
    assert_same(ours, plain, atol=1e-4)
    first, second = ours.ratios[::2], ours.ratios[1::2]
    assert max(first) < 1e-4 and min(second) > 0.1
    clipped = logged(ours, "clip_ratio/high_mean")
    assert clipped[0] == clipped[2] == 0 and min(clipped[1], clipped[3]) > 0
    wide = make_trainer(tmp_path / "wide", rounds=0, grouped=grouped, **options, epsilon=0.999, epsilon_high=100.0)
    wide.train()
    assert abs(logged(wide, "loss")[1] - logged(ours, "loss")[1]) > 1e-3


def test_with_one_update_neither_clip_range_does_anything(tmp_path):
    narrow = make_trainer(tmp_path / "narrow", **LR, max_steps=2, epsilon=1e-6, epsilon_high=1e-6)
    wide = make_trainer(tmp_path / "wide", **LR, max_steps=2, epsilon=0.999, epsilon_high=100.0)
    for trainer in (narrow, wide):
        trainer.train()
        assert logged(trainer, "clip_ratio/region_mean") == [0, 0]
    assert_same(narrow, wide, atol=0)


@pytest.mark.parametrize("updates", UPDATES)
def test_the_gap_is_that_of_the_weights_that_sampled(tmp_path, updates):
    trainer = make_trainer(tmp_path, logp=-1.5, max_logp_gap=100.0, **LR, **updates, max_steps=3)
    model = tiny_model(trainer.processing_class)
    model.load_state_dict(weights(trainer), strict=False)
    trainer.train()
    gaps = {0: [], 2: []}
    for rollout in stored(tmp_path):
        gaps[rollout["step"]] += [abs(logp + 1.5) for logp in rollout["policy_logps"]]
        if rollout["step"] == 0:
            ids = trainer.processing_class(rollout["prompt"]).input_ids
            whole = torch.tensor([ids + rollout["completion_ids"]])
            logps = model(whole).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
            wanted = logps.gather(1, whole[0, len(ids) :, None])[:, 0].tolist()
            assert rollout["policy_logps"] == pytest.approx(wanted, abs=1e-4)
    assert logged(trainer, GAP) == pytest.approx([np.mean(gap) for gap in gaps.values()], abs=1e-4)


@pytest.mark.parametrize("updates", UPDATES)
def test_rollouts_of_other_weights_stop_the_run_before_the_first_update(tmp_path, updates):
    trainer = make_trainer(tmp_path, logp=-1.5, max_logp_gap=0.05, **LR, **updates)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"step 0: sampling and training log-probabilities differ by \d\.\d+ a token"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert {rollout["step"] for rollout in stored(tmp_path)} == {0}  # what was sampled is there to be looked at


def test_surplus_is_discarded_at_once_where_the_next_sampling_has_other_weights(tmp_path):
    trainer = make_trainer(tmp_path, count=20, **TWICE, max_steps=3)
    trainer.sampler.state.share_useful = 0.6  # four prompts for two groups
    trainer.train()
    order = first_drawn(20, 8)
    first = {(r["row_id"], r["discard_reason"]) for r in stored(tmp_path) if r["step"] == 0}
    assert first == {*((row_id, None) for row_id in order[:2]), *((row_id, "surplus") for row_id in order[2:4])}
    assert {r["step"] for r in stored(tmp_path)} == {0, 2}
    assert "stale" not in {r["discard_reason"] for r in stored(tmp_path)}


def saved_model(folder):
    """A folder of the tiny model, from which TRL loads the reference."""
    tiny_model(tokenizer()).save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("updates", UPDATES)
@pytest.mark.parametrize("last", [2, 3])
def test_a_run_resumed_at_or_between_updates_equals_an_uninterrupted_one(tmp_path, updates, last):
    script, model = useful_for(first_drawn(8, 8)[2:]), saved_model(tmp_path / "model")

    def trainer(name, max_steps, **options):
        settings = {**LR, **updates, "beta": 0.1, "max_steps": max_steps, **options}
        return make_trainer(tmp_path / name, script, rounds=3, model=load(model), **settings)

    whole = trainer("whole", 6)
    whole.train()
    first = trainer("parts", last, save_strategy="steps", save_steps=last)
    first.train()
    checkpoint = tmp_path / f"parts/out/checkpoint-{last}"
    assert (load_batch(checkpoint, 0, 1) is None) == (last % 2 == 0)
    second = trainer("parts", 6)
    second.continue_from(str(checkpoint))
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.sampler.state == whole.sampler.state
    for name in ("loss", "kl", "clip_ratio/high_mean"):
        assert len(logged(whole, name)) == 6
        assert logged(second, name) == pytest.approx(logged(whole, name), rel=1e-4, abs=1e-6)
    assert_same(second, whole)
    assert_same_rollouts(tmp_path / "whole", tmp_path / "parts")


def assert_same_rollouts(*folders):
    same = ("step", "round", "group", "row_id", "completion_ids", "kept", "discard_reason")
    one, two = ([{name: r[name] for name in same} for r in stored(folder)] for folder in folders)
    assert sorted(one, key=str) == sorted(two, key=str)


class KilledAfterSaving(TrainerCallback):
    def on_save(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_useful_groups_that_a_checkpoint_leaves_behind_are_stored(tmp_path):
    script = useful_for(first_drawn(20, 20)[1:])
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "count": 20}

    def trainer(name, max_steps, **more):
        made = make_trainer(tmp_path / name, script, rounds=3, max_steps=max_steps, **options, **more)
        made.sampler.state.share_useful = 0.6
        return made

    trainer("whole", 2).train()
    killed = trainer("parts", 2, save_strategy="steps", save_steps=1)
    killed.add_callback(KilledAfterSaving())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    second = trainer("parts", 2)
    checkpoint = str(tmp_path / "parts/out/checkpoint-1")
    second.continue_from(checkpoint)
    second.train(resume_from_checkpoint=checkpoint)
    stale = [r for r in stored(tmp_path / "whole") if (r["step"], r["discard_reason"]) == (0, "stale")]
    assert len(stale) == SIZE
    assert_same_rollouts(tmp_path / "whole", tmp_path / "parts")


def test_a_batch_in_use_is_not_shared_out_anew(tmp_path):
    assert load_batch(tmp_path, 0, 2) is None
    for process in range(2):
        BatchInUse(5, [{"completion_ids": torch.tensor([[process]])}]).save(tmp_path, process)
    found = load_batch(tmp_path, 1, 2)
    assert found.step == 5 and found.inputs[0]["completion_ids"].tolist() == [[1]]
    with pytest.raises(
        ValueError, match=r"between two updates on the rollouts of 2 processes, not of 1; continue wit"
    ):
        load_batch(tmp_path, 0, 1)


def test_the_check_of_consistency_falls_into_every_period_whatever_the_number_of_updates():
    for num_updates in range(1, EVERY + 1):
        sampled = range(0, 20 * EVERY, num_updates)
        due = [step for step in sampled if is_due(step, num_updates)]
        assert [-(-step // EVERY) for step in due] == [*range(len(due))] and len(due) >= 20


@pytest.mark.parametrize("updates", [pytest.param({}, id="once"), *UPDATES])
@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
def test_the_kl_term_is_that_of_plain_trl(tmp_path, peft, updates):
    folder = saved_model(tmp_path / "model")
    options = {**LR, **updates, "beta": 0.1, "max_steps": 4}
    ours = make_trainer(tmp_path / "ours", rounds=0, model=load(folder), peft=peft, **options)
    plain = plain_trainer(tmp_path / "plain", load(folder), peft, **options)
    assert_same(ours, plain, atol=0)  # an adapter starts at random
    for trainer in (ours, plain):
        trainer.train()
    for name in ("loss", "kl"):
        *first, last = zip(logged(ours, name), logged(plain, name), strict=True)
        for our, their in first:
            assert our == pytest.approx(their, rel=1e-5, abs=1e-5), name
        # a loss of 35, after three steps as large as these, was once apart by 2e-5
        assert last[0] == pytest.approx(last[1], rel=1e-4, abs=1e-5), name
    start, *later = logged(ours, "kl")
    assert start == pytest.approx(0, abs=1e-6) and min(later) > 1e-4
    assert_same(ours, plain, atol=1e-4)
