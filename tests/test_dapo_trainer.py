"""The trainer of the dapo stage, on completions that a script writes in place of an engine."""

import inspect
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import requests
import torch
from scripted_dapo import CATALOGUE, LIMIT, SIZE, first_drawn, random_tokens, stream, useful_for
from scripted_trainer import assert_same, logged, make_trainer, plain_trainer, stored, tokenizer, weights
from tiny_model import tiny_model
from transformers import ProgressCallback
from trl.generation.vllm_generation import VLLMGeneration

from rerank.dapo.checkpoint import load_state
from rerank.dapo.consistency import consistency
from rerank.dapo.gap import FIRST_GAPS
from rerank.dapo.prepared import Prepared
from rerank.dapo.sampler import SamplingOptions
from rerank.dapo.tracking import GAP, ShortProgress
from rerank.dapo.trainer import DapoTrainer
from rerank.models import server as server_mode
from rerank.prompts import completion


def test_the_steps_that_the_trainer_names_are_its_methods_in_that_order():
    steps = re.findall(r"(?m)^    \d+\. `(\w+)`", DapoTrainer.__doc__)
    lines = [inspect.getsourcelines(vars(DapoTrainer)[step])[1] for step in steps]
    assert len(steps) == 10 and lines == sorted(lines)


def test_groups_that_are_not_trained_on_are_stored_and_metrics_logged(tmp_path):
    order = first_drawn(8, 8)
    trainer = make_trainer(tmp_path, useful_for(order[1:3]), rounds=3)
    trainer.train()
    groups = {(r["row_id"], r["round"], r["group"], r["kept"], r["discard_reason"]) for r in stored(tmp_path)}
    kept = {(order[1], 0, 1, True, None), (order[2], 1, 2, True, None)}
    # half of the first two were useful, so that two are sampled for the one that is missing
    equal = {(order[0], 0, 0, False, "all_equal"), (order[3], 1, 3, False, "all_equal")}
    assert groups == {*kept, *equal} and len(stored(tmp_path)) == 4 * SIZE
    metrics = {"groups/rounds": 2, "groups/prompts": 4, "groups/prompts_drawn": 4, "groups/missing": 0}
    metrics |= {"groups/discarded_all_equal": 2, "groups/discarded_surplus": 0, "groups/discarded_stale": 0}
    metrics |= {"groups/share_useful": 2 / 4, "rollouts/kept": 2 / 4, "rollouts/no_ranking": 1}  # random tokens
    metrics["rollouts/reward"] = np.mean([rollout["reward"] for rollout in stored(tmp_path)])
    found = {name: logged(trainer, name) for name in metrics}
    assert found == {name: [pytest.approx(value)] for name, value in metrics.items()}


@pytest.mark.parametrize("masked", [True, False])
def test_a_completion_that_is_cut_off_is_no_part_of_its_groups_mean(tmp_path, masked):
    def script(prompt, member):
        return LIMIT if member == 0 else 3 + member

    trainer = make_trainer(tmp_path, script, mask_truncated_completions=masked, scale_rewards="none")
    trainer.train()
    group = [rollout for rollout in stored(tmp_path) if rollout["group"] == 0]
    rewards = np.array([rollout["reward"] for rollout in group], dtype=float)
    assert np.isnan(rewards[0]) == masked and not np.isnan(rewards[1:]).any()
    expected = np.nan_to_num(rewards - np.nanmean(rewards))
    assert [rollout["advantage"] for rollout in group] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [rollout["kept"] for rollout in group] == [not masked, True, True, True]
    assert group[0]["discard_reason"] == ("truncated" if masked else None)


def test_trl_keeps_a_member_in_the_mean_while_one_of_its_rewards_is_a_number(tmp_path):
    """So that a masked completion must be without any reward."""
    trainer = make_trainer(tmp_path, scale_rewards="none")
    found, _ = trainer.sampler.collect(0, 2)
    nan = float("nan")
    for left, mean_of in (({"num_tokens": nan, "evenness": 0.0}, 4), ({"num_tokens": nan, "evenness": nan}, 3)):
        trainer.prepared = Prepared(trainer.prepared.resume_from, 1)
        found.kept[0].rollouts[0].rewards = left
        trainer.choose_groups(found, 2)
        advantages = trainer.compute_advantages()["advantages"][:SIZE]
        totals = torch.tensor([sum(r.rewards.values()) for r in found.kept[0].rollouts[1:]])
        assert totals[0] - advantages[1] == pytest.approx(totals.sum().item() / mean_of, abs=1e-5)


def test_what_the_store_tells_of_sampling(tmp_path):
    make_trainer(tmp_path).train()
    for rollout in stored(tmp_path):
        assert rollout["epoch"] == 0 and rollout["seed"] is None  # transformers takes no seed a completion
        assert rollout["outcome"] == len(rollout["completion_ids"])


def test_surplus_is_trained_on_while_the_weights_are_those_that_sampled_it_and_stale_then(tmp_path):
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, count=20, **options)
    trainer.sampler.state.share_useful = 0.6  # four prompts for two groups
    trainer.train()
    order = first_drawn(20, 8)
    first = {(r["row_id"], r["discard_reason"]) for r in stored(tmp_path) if r["step"] == 0}
    assert first == {(row_id, None) for row_id in order[:4]}  # one sampling for both generations
    assert trainer.sampler.state.num_drawn == 8
    alone = make_trainer(tmp_path / "alone", count=20)  # a step that samples once
    alone.sampler.options = SamplingOptions(SIZE, "num_tokens", is_dynamic=True, keeps_surplus=True)
    alone.sampler.state.share_useful = 0.6
    alone.train()
    stale = {(r["step"], r["row_id"]) for r in stored(tmp_path / "alone") if r["discard_reason"] == "stale"}
    assert stale == {(0, order[2]), (0, order[3])}


def test_a_short_step_trains_on_what_there_is(tmp_path, caplog):
    order = first_drawn(8, 8)
    short = make_trainer(tmp_path / "short", useful_for(order[:1]), rounds=2)
    short.train()
    assert "step 0 lacks 1 groups after 2 rounds" in caplog.text
    assert logged(short, "groups/missing") == [1]
    alone = make_trainer(tmp_path / "alone", per_device_train_batch_size=SIZE)
    alone.train()
    assert {r["row_id"] for r in stored(tmp_path / "short") if r["kept"]} == {order[0]}
    assert logged(short, "loss") == pytest.approx(logged(alone, "loss"), abs=1e-6)
    assert logged(short, "reward") == pytest.approx(logged(alone, "reward"))
    assert_same(short, alone)


def test_a_step_without_any_useful_group_moves_nothing_and_the_third_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, useful_for([]), rounds=2, max_steps=5, weight_decay=0.0)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"in 3 steps no group differed in the outcome 'num_tokens' \(the last is 5"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_dynamic_sampling_a_step_is_that_of_plain_trl(tmp_path, accumulation, grouped):
    batch = {"per_device_train_batch_size": 2 * SIZE // accumulation, "gradient_accumulation_steps": accumulation}
    ours = make_trainer(tmp_path, rounds=0, max_steps=2, grouped=grouped, **batch)

    plain = plain_trainer(tmp_path, max_steps=2, **batch)
    ours.train()
    plain.train()
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
    assert logged(ours, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)
    assert_same(ours, plain, atol=1e-5)


def test_what_is_stored_is_what_was_trained_on(tmp_path):
    trainer = make_trainer(tmp_path, logp=-1.5, max_logp_gap=100.0)
    model = tiny_model(trainer.processing_class)
    model.load_state_dict(weights(trainer), strict=False)
    trainer.train()
    found = stored(tmp_path)
    for rollout in found:
        ids = trainer.processing_class(rollout["prompt"]).input_ids
        whole = torch.tensor([ids + rollout["completion_ids"]])
        logps = model(whole).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
        wanted = logps.gather(1, whole[0, len(ids) :, None])[:, 0].tolist()
        assert rollout["policy_logps"] == pytest.approx(wanted, abs=1e-4)
        assert rollout["sampling_logps"] == [-1.5] * len(rollout["completion_ids"])
        assert rollout["reward_components"]["num_tokens"] == len(rollout["completion_ids"])
        assert rollout["reward"] == pytest.approx(sum(rollout["reward_components"].values()), abs=1e-5)
        assert rollout["target"] == 4 * (rollout["row_id"] - 10) + 2 and not rollout["truncated"]
    for _, group in pd.DataFrame(found).groupby("row_id"):
        wanted = (group["reward"] - group["reward"].mean()) / (group["reward"].std() + 1e-4)
        assert group["advantage"].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    gaps = [abs(a - b) for r in found for a, b in zip(r["policy_logps"], r["sampling_logps"], strict=True)]
    assert logged(trainer, GAP) == [pytest.approx(np.mean(gaps), abs=1e-4)]


def test_rollouts_of_other_weights_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path, logp=-1.5, max_logp_gap=0.05)
    with pytest.raises(ValueError, match=r"step 0: sampling and training log-probabilities differ by \d\.\d+ a token"):
        trainer.train()
    assert len(stored(tmp_path)) == 2 * SIZE  # what was sampled is there to be looked at


def test_a_gap_that_grows_far_beyond_that_of_the_first_steps_stops_the_run_at_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, max_logp_gap=0.05, max_steps=FIRST_GAPS + 9)
    gaps = [*[0.002] * FIRST_GAPS, 0.005, 0.008, 0.003, *[0.008] * 9]  # once above is chance, three times in a row not

    def measured(inputs):
        trainer.prepared.gaps = [torch.tensor([gaps[trainer.state.global_step]])]

    trainer.measure_gap = measured
    step = FIRST_GAPS + 5
    with pytest.raises(ValueError, match=rf"step {step}: .* differ by 0.0080 .* 3 times the 0.0020 of the first"):
        trainer.train()
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    assert load_state(checkpoint) == trainer.prepared.resume_from  # the step is sampled again
    assert not list(checkpoint.glob("batch-*.pt"))


def test_a_model_that_says_nan_stops_the_run_and_an_engine_that_says_nothing_does_not(tmp_path):
    silent = make_trainer(tmp_path / "silent", logp=float("nan"), max_logp_gap=0.05)
    silent.train()
    assert silent.state.global_step == 1 and not logged(silent, GAP)
    broken = make_trainer(tmp_path / "broken", logp=-1.5, max_logp_gap=100.0)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"log-probabilities differ by nan a token on average"):
        broken.train()


def test_resumed_equals_uninterrupted(tmp_path):
    script = useful_for(first_drawn(8, 8)[2:])
    whole = make_trainer(tmp_path / "whole", script, rounds=3, max_steps=4)
    whole.train()
    saved = {"save_strategy": "steps", "save_steps": 2}
    first = make_trainer(tmp_path / "parts", script, rounds=3, max_steps=2, **saved)
    first.train()
    checkpoint = tmp_path / "parts/out/checkpoint-2"
    assert json.loads((checkpoint / "sampling.json").read_text()) == vars(first.sampler.state)
    second = make_trainer(tmp_path / "parts", script, rounds=3, max_steps=4)
    second.continue_from(str(checkpoint))
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.sampler.state == whole.sampler.state
    assert logged(second, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    assert_same(second, whole)
    same = ("step", "round", "group", "row_id", "completion_ids", "kept", "discard_reason")
    parts = [[{name: r[name] for name in same} for r in stored(tmp_path / name)] for name in ("whole", "parts")]
    assert sorted(parts[0], key=str) == sorted(parts[1], key=str)


def ranked_by(key):
    """A policy: each prompt's candidates sorted by `key` of their place and item."""

    def rank(prompt):
        items = [int(item) for item in re.findall(r"<s_a_(\d+)>", prompt.partition("Candidates:")[2])]
        order = sorted(range(len(items)), key=lambda place: key(place, items[place]))
        return completion("", order, [CATALOGUE.semantic_ids[item] for item in items])

    return lambda prompts: [rank(prompt) for prompt in prompts]


def test_rankings_of_the_same_rows_in_two_orders_are_compared():
    def agreement(policy):
        found = consistency(stream(20), policy)
        return [found[f"rollouts/consistency/{name}"] for name in ("both_ranked", "kendall_tau", "same_first")]

    assert agreement(ranked_by(lambda place, item: item)) == [1.0, 1.0, 1.0]  # reads the candidates
    copies = ranked_by(lambda place, item: place)
    both_ranked, tau, _ = agreement(copies)
    assert both_ranked == 1.0 and tau < 0.7 and agreement(copies)[1] == tau
    assert agreement(lambda prompts: ["junk"] * len(prompts))[0] == 0.0


def test_a_step_prints_a_few_figures_and_logs_all(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=False)
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(ShortProgress())
    trainer.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert "'rollouts/no_ranking': '1'" in line and len(line) < 250
    assert len(trainer.state.log_history[0]) > 30


def test_the_completions_of_a_prompt_stay_in_one_micro_batch(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=SIZE, gradient_accumulation_steps=2)
    trainer.train()
    assert [len(batch["prompt_ids"].unique(dim=0)) for batch in trainer._buffered_inputs] == [1, 1]


class Server:
    """TRL's client of a vLLM server that misses its first calls, and is gone once it has sampled so often.

    It takes weights as long as it has sampled less than `max_weights` times.
    """

    def __init__(self, calls_missed=0, max_samples=99, max_weights=99):
        self.calls_missed, self.max_samples, self.max_weights = calls_missed, max_samples, max_weights
        self.seeds = []  # one for each time it sampled
        self.session = requests.Session()

    def update_named_params(self, metadata, weights):
        if len(self.seeds) == self.max_weights:
            raise requests.ConnectionError("connection refused")

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, n, generation_kwargs, temperature, **options):
        if self.calls_missed > 0 or (temperature and len(self.seeds) == self.max_samples):
            self.calls_missed -= 1
            raise requests.ConnectionError("connection refused")
        if temperature:
            self.seeds.append(generation_kwargs["seed"])
        else:
            assert n == 1, "vLLM: n must be 1 when using greedy sampling"
        ids = [random_tokens(0, 3 + member, eos=1) for _ in prompts for member in range(n)]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": [[[-1.0]] * len(one) for one in ids]}


def served(folder, server, max_steps=2):
    """A trainer whose own code asks this server; weights are not sent."""
    trainer = make_trainer(folder, kind=DapoTrainer, max_steps=max_steps, max_logp_gap=100.0)
    trainer.use_vllm, trainer.args.vllm_mode, trainer.args.vllm_server_timeout = True, "server", 0.2
    generation = object.__new__(VLLMGeneration)
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "logprobs": 0}
    options |= {"max_completion_length": 16, "structured_outputs_regex": None, "enable_sleep_mode": False}
    options |= {"accelerator": trainer.accelerator, "mode": "server", "vllm_client": server, "generation_kwargs": {}}
    vars(generation).update(options, _weight_metadata=[], _iter_named_params=lambda: iter([]))
    trainer.vllm_generation, trainer._last_loaded_step = generation, -1
    server_mode.add_retries(server, 0.2)
    return trainer


def test_a_server_that_is_away_for_a_while_is_asked_again_with_the_same_seed(tmp_path):
    steady, away = Server(), Server(calls_missed=2)
    for name, server in (("steady", steady), ("away", away)):
        trainer = served(tmp_path / name, server)
        trainer.train()
        assert trainer.state.global_step == 2
    assert steady.seeds == away.seeds and len(set(steady.seeds)) == 2


@pytest.mark.parametrize(("options", "last"), [({"max_samples": 2}, 2), ({"max_weights": 1}, 1)])
def test_a_server_that_stays_away_or_takes_no_weights_ends_the_run_with_a_checkpoint(tmp_path, options, last):
    server = Server(**options)
    trainer = served(tmp_path, server, max_steps=3)
    message = rf"the vLLM server at http://\S+ is gone; start it again, .* from step {last}"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert len(server.seeds) == last
    checkpoint = tmp_path / f"out/checkpoint-{last}"
    sampling = json.loads((checkpoint / "sampling.json").read_text())
    assert sampling["num_drawn"] == 2 * last  # two prompts a step: those of the next are drawn again
    assert (checkpoint / "trainer_state.json").is_file()


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sampling.json is missing: no checkpoint of this stage; delete"):
        make_trainer(tmp_path).continue_from(str(tmp_path / "checkpoint-2"))


def test_the_outcome_follows_from_the_training_rows_and_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, "rerank.dapo.trainer")
    single, several = (stream(8, tokenizer=tokenizer()) for _ in range(2))
    several.rows = [replace(row, relevance=(0.0, 1.0, 2.0, 0.0)) for row in several.rows]
    for prompts, given, outcome in (
        (single, None, "rank_gain"),
        (several, None, "num_tokens"),  # the first of two rewards of one weight
        (several, "rank_gain", "rank_gain"),
        (single, "evenness", "evenness"),
    ):
        caplog.clear()
        made = make_trainer(tmp_path, prompts=prompts, outcome=given)
        assert made.sampler.options.outcome == outcome
        assert f"completions of a useful group differ in {outcome}" in caplog.text
