"""Documents of mid-training that are made when they are read are those that were made beforehand."""

import numpy as np
import pytest
from tiny_model import model_with_ids, sft_config
from toy_run import CATALOGUE
from trl import ModelConfig

from rerank import midtrain
from rerank.midtrain import encoding, exercises, mixture
from rerank.midtrain.documents import Documents
from rerank.midtrain.trainer import MidtrainTrainer
from rerank.prompts import parse_completion
from rerank.rows.dataset import RowDataset

HISTORIES = [np.arange(start, start + 3 + start) % 12 for start in range(9)]
MIXTURE = {"sequence": 0.5, "persona": 0.2, "caption": 0.2, "titles": 0.1}


def mixed(**options):
    args = midtrain.MidtrainArguments(run_dir="run", **{"mixture": MIXTURE, "max_items": 4, **options})
    return mixture.mixed_documents(HISTORIES, CATALOGUE, args, seed=0)


@pytest.fixture
def reads(monkeypatch):
    """Make documents when they are read, however few there are."""
    monkeypatch.setattr(mixture, "KEPT_DOCUMENTS", 0)


def with_true_lengths(documents, tokenizer):
    """Documents that are read, put in order by the lengths that those made beforehand go by."""
    lengths = [min(64, len(encoding.encode(document, tokenizer)["input_ids"])) for document in documents]
    return Documents(np.array(lengths), list(documents).__getitem__)


def test_documents_are_the_same_and_their_rough_lengths_tell_long_from_short(monkeypatch):
    made = mixed()
    monkeypatch.setattr(mixture, "KEPT_DOCUMENTS", 0)
    read = mixed()
    assert isinstance(made, list) and isinstance(read, Documents) and list(read) == made
    lengths = with_true_lengths(made, model_with_ids()[1]).lengths
    assert np.corrcoef(lengths, read.lengths)[0, 1] > 0.5
    assert len(mixture.texts_of(read)) == len(made)
    monkeypatch.setattr(mixture, "VOCABULARY_DOCUMENTS", 5)
    assert len(mixture.texts_of(read)) == 5 and len(mixture.texts_of(made)) == len(made)


def test_lists_that_are_read_grow_and_are_drawn_alike_each_time(reads):
    read = mixed(mixture={"lists": 0.8, "caption": 0.2}, num_documents=500, list_labels="number", longest_list=20)
    lists = [document for document in read if document.task == "lists"]
    assert len(lists) == 400 and list(read) == list(read)
    sizes = [len(document.answer.partition("</think>")[2].split()) for document in lists]
    assert max(sizes[:20]) <= 3 and max(sizes) == 20 and np.mean(sizes[:100]) < 0.7 * np.mean(sizes[-100:])
    for document, size in zip(lists, sizes, strict=True):
        labels = [str(number + 1) for number in range(size)]
        assert parse_completion(document.given + document.answer, labels).order is not None
    rough = exercises.lists_on_read(400, ["near"], "number", CATALOGUE, 0, 20, 7, "history_first", 1, 0.4).lengths
    assert np.corrcoef(rough, sizes)[0, 1] > 0.99


@pytest.mark.parametrize("training", [
    {"train_sampling_strategy": "sequential"}, {"packing": True}, {"dataloader_num_workers": 1},
], ids=str)  # fmt: skip
def test_what_is_read_trains_as_what_was_made(tmp_path, training):
    documents, losses = mixed(), []
    for is_read in (False, True):
        model, tokenizer, _ = model_with_ids()
        config = sft_config(tmp_path / str(is_read), max_length=64, max_steps=4, logging_steps=1, **training)
        given = with_true_lengths(documents, tokenizer) if is_read else documents
        dataset, counts = encoding.encoded_dataset(given, tokenizer, config)
        assert isinstance(dataset, RowDataset) == (is_read and not config.packing)
        trainer = MidtrainTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [counts])
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_rows_are_grouped_by_rough_lengths_without_being_made(tmp_path, reads):
    config = sft_config(tmp_path, max_length=64, train_sampling_strategy="group_by_length")
    model, tokenizer, _ = model_with_ids()
    dataset, _ = encoding.encoded_dataset(mixed(), tokenizer, config)
    made, own = [], dataset.rows.make
    dataset.rows.make = lambda place: made.append(place) or own(place)
    trainer = MidtrainTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    made.clear()
    lengths = [len(dataset[place]["input_ids"]) for place in trainer.get_train_dataloader().batch_sampler.sampler]
    assert sorted(made) == list(range(len(dataset)))
    pairs = np.abs(np.diff(lengths)).reshape(-1)[::2]
    assert pairs.mean() < 0.5 * np.abs(np.diff(np.random.default_rng(0).permutation(lengths))).mean()


def test_the_stage_trains_and_leaves_no_file_of_rows(toy_run, tmp_path, reads):
    config = sft_config(tmp_path / "checkpoints", max_length=64, max_steps=2, packing=True)
    args = midtrain.MidtrainArguments(run_dir=str(toy_run.run), max_items=4, mixture={"sequence": 0.8, "caption": 0.2})
    metrics = midtrain.main(args, config, ModelConfig(), tmp_path)
    assert metrics["steps"] == 2 and set(metrics["tokens_under_loss"]) == {"sequence", "caption"}
    assert not (tmp_path / "checkpoints/rows").exists()
