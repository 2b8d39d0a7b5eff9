"""The loss of each task, packed documents, recall on validation rows: what mid-training adds to TRL's trainer."""

import pytest
import quirks
import torch
from tiny_model import ID_TOKENS, model_with_ids, save_tiny_model, sft_config
from transformers import AutoTokenizer, EarlyStoppingCallback, Trainer
from trl import SFTTrainer

from rerank import midtrain
from rerank.launch import stopping
from rerank.midtrain import encoding
from rerank.midtrain.documents import Document
from rerank.midtrain.trainer import MidtrainTrainer, collate_with_tasks
from rerank.models import base as base_model

DOCUMENTS = [
    Document("sequence", "Next items:", "".join(ID_TOKENS), ends=False),
    Document("caption", "Describe:<s_a_1>", "the drama of a title"),
    Document("text", "", "of the title a drama"),
    Document("sequence", "Next items:", "<s_a_0><s_b_1>", ends=False),
    Document("caption", "Describe:<s_b_1>", "drama"),
]


def config(folder, **options):
    settings = dict(
        per_device_train_batch_size=5, max_steps=1, logging_steps=1, max_length=64, learning_rate=0.01,
        train_sampling_strategy="sequential", lr_scheduler_type="constant",
    )  # fmt: skip
    return sft_config(folder, **{**settings, **options})


def trainer(folder, recall=None, callbacks=None, **options):
    model, tokenizer, _ = model_with_ids()
    settings = config(folder, **options)
    dataset, _ = encoding.encoded_dataset(DOCUMENTS, tokenizer, settings)
    data = {"train_dataset": dataset, "eval_dataset": dataset if recall else None}
    return MidtrainTrainer(model, settings, recall, processing_class=tokenizer, callbacks=callbacks, **data)


def loss_of_each_token(document):
    """One document alone, no padding, plain cross-entropy."""
    model, tokenizer, _ = model_with_ids()
    row = encoding.encode(document, tokenizer)
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels, reduction="none")
    return losses[labels != -100]


PACKED = [{}, {"packing": True}]


@pytest.mark.parametrize("options", PACKED, ids=["padded", "packed"])
def test_the_log_has_each_tasks_loss_and_tokens_and_no_document_sees_another(tmp_path, options):
    made = trainer(tmp_path, **options)
    stopping.train(made)
    logged = made.state.log_history[0]
    everything = torch.cat([loss_of_each_token(document) for document in DOCUMENTS])
    assert logged["loss"] == pytest.approx(everything.mean().item(), abs=1e-5)
    for task in ("sequence", "caption", "text"):
        losses = torch.cat([loss_of_each_token(document) for document in DOCUMENTS if document.task == task])
        assert logged[f"tokens_{task}"] == len(losses)
        assert logged[f"loss_{task}"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert "loss_lists" not in logged


def test_packed_rows_train_as_the_same_documents_padded(tmp_path):
    trained = []
    for number, options in enumerate(PACKED):
        made = trainer(tmp_path / str(number), max_steps=3, **options)
        assert len(made.train_dataset) == (2 if options else len(DOCUMENTS))
        stopping.train(made)
        trained.append(made.model.state_dict())
    start = model_with_ids()[0].state_dict()
    for name, value in trained[0].items():
        assert torch.allclose(value, trained[1][name], atol=1e-4), name
        assert not torch.equal(value, start[name]), name


@pytest.mark.parametrize("options", PACKED, ids=["padded", "packed"])
def test_a_tokenizer_without_a_token_for_padding_trains_alike(tmp_path, options):
    losses = []
    for change in (lambda tokenizer: tokenizer, quirks.without_pad):
        folder = save_tiny_model(tmp_path / change.__name__)
        change(AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
        model, tokenizer = base_model.load_pretrained(str(folder))
        settings = config(tmp_path / "out", **options)
        dataset, _ = encoding.encoded_dataset(DOCUMENTS, tokenizer, settings)
        made = MidtrainTrainer(model, settings, processing_class=tokenizer, train_dataset=dataset)
        stopping.train(made)
        losses.append(made.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_losses_of_tasks_are_means_since_the_last_log(tmp_path):
    made = trainer(tmp_path, max_steps=2, learning_rate=0.0, logging_steps=2)
    stopping.train(made)
    assert made.state.log_history[0]["tokens_sequence"] == 2 * sum(
        len(loss_of_each_token(document)) for document in DOCUMENTS if document.task == "sequence"
    )


def recalls(*values):
    """A stand-in for the search: the next value at each call, and the model's weight at that moment."""
    remaining, seen = list(values), []

    def recall(model):
        seen.append(model.get_input_embeddings().weight.detach().clone())
        return {"R@10": remaining.pop(0), "N@10": 0.0}

    return recall, seen


def test_training_stops_without_a_gain_and_keeps_the_best_weights(tmp_path):
    recall, seen = recalls(0.1, 0.3, 0.2, 0.3, 0.9)
    options = midtrain.recall_options(config(tmp_path, eval_steps=2))
    made = trainer(tmp_path, recall, [EarlyStoppingCallback(2)], max_steps=100, eval_steps=2, **options)
    stopping.train(made)
    assert made.state.global_step == 8  # after steps 2, 4, 6 and 8; .3 of step 4 is not exceeded in two more
    assert [entry["eval_R@10"] for entry in made.state.log_history if "eval_R@10" in entry] == [0.1, 0.3, 0.2, 0.3]
    assert (made.state.best_metric, made.state.best_global_step) == (0.3, 4)
    assert torch.equal(made.model.get_input_embeddings().weight, seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_tasks_and_evaluations_change_nothing_in_what_is_trained(tmp_path):
    model, tokenizer, _ = model_with_ids()
    settings = config(tmp_path / "trl", max_steps=4)
    dataset, _ = encoding.encoded_dataset(DOCUMENTS, tokenizer, settings)
    plain = SFTTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer)
    recall, _ = recalls(0.1, 0.2)
    options = midtrain.recall_options(config(tmp_path, eval_steps=2))
    ours = trainer(tmp_path / "ours", recall, max_steps=4, eval_steps=2, **options)
    for made in (plain, ours):
        stopping.train(made)
    assert all(torch.equal(value, ours.model.state_dict()[name]) for name, value in plain.model.state_dict().items())
    losses = [[e["loss"] for e in made.state.log_history if "loss" in e] for made in (plain, ours)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("name", ["compute_loss", "log", "evaluate"])
def test_trl_still_has_what_is_overridden(name):
    assert name in vars(SFTTrainer) and name in vars(MidtrainTrainer)
    assert name != "evaluate" or "on_evaluate" in Trainer.evaluate.__code__.co_names


def test_a_collator_of_flat_batches_gets_flat_tasks():
    rows = [{"task": [1, 1]}, {"task": [0, 2, 2]}]
    for flattens, tasks in ((True, [[1, 1, 0, 2, 2]]), (False, [[1, 1, 0], [0, 2, 2]])):
        assert collate_with_tasks(lambda rows: {}, flattens, rows)["task"].tolist() == tasks
