"""The stage on its task rerank: `nll` against TRL's loss and against a slow loop, its rows, and what is refused."""

import inspect
import json

import pytest
import torch
from datasets import Dataset
from tiny_model import save_tiny_model, sft_config, tiny_model, tiny_tokenizer
from trl import ModelConfig, SFTTrainer

from rerank import sft
from rerank.catalogue import Catalogue
from rerank.launch import run_dir
from rerank.losses import load_losses
from rerank.models import base as base_model
from rerank.models.saving import check_model
from rerank.rows import Prompter, training_rows
from rerank.sft.forward import LEAST_SAVED, length_groups, states_by_length
from rerank.sft.trainer import LossTrainer

THINK_END = 9
# A prompt of unequal length, a trace up to and with token 9, a ranking.
ROWS = [
    {"input_ids": [5, 6, 20, 21, 9, 30, 31], "labels": [-100, -100, 20, 21, 9, 30, 31]},
    {"input_ids": [5, 22, 9, 32, 33, 34], "labels": [-100, 22, 9, 32, 33, 34]},
    {"input_ids": [7, 7, 7, 7, 23, 24, 25, 9, 35], "labels": [-100, -100, -100, -100, 23, 24, 25, 9, 35]},
    {"input_ids": [5, 6, 9, 36, 37], "labels": [-100, -100, 9, 36, 37]},
]


def make_trainer(folder, weights=(0.5, 1.0), trainer=LossTrainer):
    tokenizer = tiny_tokenizer()
    extra = {}
    if trainer is LossTrainer:
        kwargs = dict(zip(("reasoning_weight", "ranking_weight"), weights, strict=True))
        losses = load_losses([{"name": "nll", "kwargs": kwargs}], "rerank")
        extra = {"losses": losses, "tasks": ["rerank"], "trace_end": THINK_END}
    options = {"train_dataset": Dataset.from_list(ROWS), "processing_class": tokenizer, **extra}
    return trainer(tiny_model(tokenizer), sft_config(folder), **options)


def batch_and_loss(trainer, num_items=None):
    batch = trainer.data_collator([row | {"task": 0} for row in ROWS])
    trainer.step_counts, trainer.current_gradient_accumulation_steps = {"rerank": num_items}, 1
    return batch, trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)


def test_equal_weights_equal_trls_own_loss(tmp_path):
    trls = make_trainer(tmp_path, trainer=SFTTrainer)
    own = trls.compute_loss(trls.model, trls.data_collator(ROWS))
    _, one = batch_and_loss(make_trainer(tmp_path, (1.0, 1.0)))
    _, two = batch_and_loss(make_trainer(tmp_path, (2.0, 2.0)))
    assert one.item() == pytest.approx(own.item(), rel=1e-6)
    assert two.item() == pytest.approx(2 * own.item(), rel=1e-6)


@pytest.mark.parametrize("num_items", [None, 40])
def test_the_loss_equals_a_slow_loop_over_the_logits(tmp_path, num_items):
    trainer = make_trainer(tmp_path, (0.5, 2.0))
    batch, loss = batch_and_loss(trainer, num_items)
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, count = 0.0, 0
    for row, labels in enumerate(batch["labels"].tolist()):
        ended = False
        for place in range(1, len(labels)):
            if labels[place] != -100:
                nll = -torch.log_softmax(logits[row, place - 1], dim=-1)[labels[place]].item()
                total, count = total + (2.0 if ended else 0.5) * nll, count + 1
            ended = ended or labels[place] == THINK_END
    assert count == 5 + 5 + 5 + 3
    assert loss.item() == pytest.approx(total / (num_items or count), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_of_rows_pad_as_little_as_any_cut_by_length(seed):
    lengths = torch.randint(1, 60, (9,), generator=torch.Generator().manual_seed(seed))
    groups = length_groups(lengths)
    ranked = sorted(lengths.tolist(), reverse=True)
    cuts = [size * ranked[0] + (9 - size) * ranked[size] for size in range(1, 9)]
    assert sorted(torch.cat(groups).tolist()) == list(range(9))
    assert sum(len(rows) * int(lengths[rows].max()) for rows in groups) == min(cuts)  # all seeds are worth a cut
    assert min(cuts) <= (1 - LEAST_SAVED) * 9 * ranked[0]


@pytest.mark.parametrize("lengths", [[7], [10, 9, 9, 8], [5, 5, 5]])
def test_rows_of_like_lengths_stay_together(lengths):
    (rows,) = length_groups(torch.tensor(lengths))
    assert sorted(rows.tolist()) == list(range(len(lengths)))


def test_states_by_length_and_their_gradients_are_those_of_the_whole_batch():
    model = tiny_model(tiny_tokenizer()).double()
    ids = torch.randint(5, 40, (6, 30), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(30) < torch.tensor([4, 30, 6, 28, 1, 5])[:, None]).long()
    found = []
    for states in (
        states_by_length(model.base_model, mask, input_ids=ids, inputs_embeds=None),  # peft gives all names
        model.base_model(ids, attention_mask=mask).last_hidden_state,
    ):
        states = states * mask[..., None]
        model.zero_grad()
        (states**2).sum().backward()
        found.append([states, *(parameter.grad for parameter in model.base_model.parameters())])
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in zip(*found, strict=True))


def test_trace_and_ranking_are_logged_apart(tmp_path):
    trainer = make_trainer(tmp_path)
    batch, loss = batch_and_loss(trainer)
    (reasoning, num_reasoning), (ranking, num_ranking) = trainer.means.take().values()
    # 10 trace tokens (with the 4 that end it) and 8 of rankings: loss * 18 = 0.5 * 10 * first + 1 * 8 * second
    assert (num_reasoning, num_ranking) == (10, 8)
    assert 18 * loss.item() == pytest.approx(5 * reasoning + 8 * ranking, rel=1e-5)


def test_overridden_methods_are_as_the_pinned_trl_has_them():
    for name in ("compute_loss", "get_batch_samples", "log", "_save", "_load_from_checkpoint"):
        theirs = list(inspect.signature(getattr(SFTTrainer, name)).parameters)
        assert list(inspect.signature(getattr(LossTrainer, name)).parameters) == theirs, name
        assert name in vars(LossTrainer)


def test_a_model_of_another_catalogue_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    own, other = (Catalogue(["m0"], [f"<s_a_1><s_b_{code}>"], [""], [""]) for code in (0, 7))
    check_model(folder, own)
    with pytest.raises(ValueError, match=r"semantic ids of another catalogue than the model's: .* lacks <s_b_7>"):
        check_model(folder, other)
    with pytest.raises(FileNotFoundError, match="absent is not there"):
        check_model(tmp_path / "absent", own)


def test_an_example_is_a_prompt_without_loss_and_a_completion_that_ends(toy_run):
    _, tokenizer = base_model.load_pretrained(str(toy_run.run / "midtrain/model"))
    prompter = Prompter.of_run(toy_run.run, tokenizer)
    row = training_rows(toy_run.run, "sft")[0]
    for trace in ("because", None):
        example = prompter.example(row, trace, [3, 1, 0, 2])
        length = sum(label == -100 for label in example["labels"])
        assert example["labels"][length:] == example["input_ids"][length:]
        assert tokenizer.decode(example["input_ids"][:length]) == prompter.prompt(row)
        ranking = "".join(prompter.labels(row)[position] for position in (3, 1, 0, 2))
        answer = tokenizer.decode(example["input_ids"][length:])
        assert answer == f"<think>{trace or ''}</think>{ranking}<|end|>"


def test_rows_for_sft_and_for_dapo_are_hits_and_have_no_user_in_common(toy_run):
    parts = {use: training_rows(toy_run.run, use) for use in ("sft", "dapo")}
    users = {use: {row.user for row in rows} for use, rows in parts.items()}
    assert users["sft"] and users["dapo"] and not users["sft"] & users["dapo"]
    assert all(row.is_hit for rows in parts.values() for row in rows)


def test_rows_that_do_not_fit_are_refused_with_their_number(toy_run, tmp_path):
    args, config = sft.SftArguments(run_dir=str(toy_run.run)), sft_config(tmp_path, max_length=20)
    with pytest.raises(ValueError, match=r"(\d+) of \1 rows are longer than max_length 20; raise it"):
        sft.fit(args, config, ModelConfig(), tmp_path / "model", with_trace=True)


def test_the_control_without_traces_trains_as_many_steps(toy_run):
    metrics = run_dir.read_metrics(toy_run.run, "sft")
    assert metrics["no_trace"]["steps"] == metrics["steps"] == 40
    assert metrics["no_trace"]["rows"] == metrics["rows"]
    assert metrics["no_trace"]["max_completion_tokens"] < metrics["max_completion_tokens"]
    history = json.loads((toy_run.run / "sft/log_history_no_trace.json").read_text())
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 41))


@pytest.mark.parametrize(("options", "message"), [
    ({"packing": True}, "packing is not for the sft stage"),
    ({"loss_type": "dft"}, "loss_type and label_smoothing_factor are TRL's; the recipe's losses: say"),
    ({"label_smoothing_factor": 0.1}, "loss_type and label_smoothing_factor are TRL's"),
])  # fmt: skip
def test_what_the_losses_would_ignore_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sft.check(sft.SftArguments(run_dir=str(tmp_path)), sft_config(tmp_path, **options), None)
