"""What a model reads in mid-training, and which of its weights each phase may move."""

import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_model import ID_TOKENS, save_tiny_model, tiny_model, tiny_tokenizer
from toy_recipe import copy_stages
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig

from rerank import midtrain
from rerank.catalogue import Catalogue
from rerank.grading import GRADES
from rerank.launch import run_dir
from rerank.launch.files import write_json
from rerank.midtrain import documents
from rerank.models import base as base_model
from rerank.next_item import recall as full_catalogue
from rerank.next_item.encoder import NextItemEncoder
from rerank.prompts import parse_completion

NUM_ITEMS = 12
KINDS = ("drama", "comedy, crime", "crime", "")
CATALOGUE = Catalogue(
    [f"m{item}" for item in range(NUM_ITEMS)],
    [f"<s_a_{item // 4}><s_b_{item % 4}>" for item in range(NUM_ITEMS)],
    [f"Title {item}" for item in range(NUM_ITEMS)],
    [KINDS[item % 4] for item in range(NUM_ITEMS)],
)
HISTORIES = [np.arange(start, start + 8) % NUM_ITEMS for start in range(6)]
ID = re.compile(r"<s_a_\d><s_b_\d>")


def arguments(**options):
    return midtrain.MidtrainArguments(run_dir="run", **options)


def items_of(text):
    return [CATALOGUE.semantic_ids.index(found) for found in ID.findall(text)]


def test_a_sequence_is_cut_into_windows_that_overlap_by_half():
    made = list(documents.sequence_documents([np.arange(5), np.array([7])], CATALOGUE, max_items=4))
    assert [items_of(document.answer) for document in made] == [[0, 1, 2, 3], [2, 3, 4], [7]]
    assert all(document.prompt == "Next items:" and not document.ends for document in made)


def test_captions_go_both_ways():
    made = list(documents.caption_documents(CATALOGUE))
    assert len(made) == 2 * NUM_ITEMS
    assert (made[2].prompt, made[2].answer) == ("Describe:<s_a_0><s_b_1>", "Title 1 | comedy, crime")
    assert (made[3].prompt, made[3].answer) == ("Which item: Title 1 | comedy, crime", "<s_a_0><s_b_1>")
    assert made[6].answer == "Title 3"  # an item without a category


def test_a_persona_tells_true_facts_of_its_history():
    for document in documents.persona_documents(HISTORIES, CATALOGUE, np.random.default_rng(0)):
        shown, told = items_of(document.prompt), document.answer.removeprefix("likes ").split("; ")
        groups = [(part.split(" ")[0], items_of(part)) for part in told[:-1]]
        assert sorted(item for _, items in groups for item in items) == sorted(shown)
        assert [len(items) for _, items in groups] == sorted((len(items) for _, items in groups), reverse=True)
        for name, items in groups:
            assert all((CATALOGUE.categories[item].split(", ")[0] or "Other") == name for item in items)
        assert told[-1] == f"lately Title {shown[-1]}" + CATALOGUE.semantic_ids[shown[-1]]


def parse_line(line, labels):
    head, *codes = line.split()
    return head.rstrip("."), [code.split(":") for code in codes]


@pytest.mark.parametrize("labels", ["semantic_id", "number"])
def test_an_exercise_grades_by_the_mean_of_the_facts_shown_and_ranks_by_grade(labels):
    made = list(
        documents.list_documents(200, ["popularity", "near", "lift"], labels, CATALOGUE, np.random.default_rng(0))
    )
    seen, sizes = Counter(), []
    for document in made:
        text = document.given + document.answer
        trace = text.removeprefix("<think>").partition(" best")[0].partition("</think>")[0]
        graded = re.findall(r"(<s_a_\d><s_b_\d>| \d+) (\w+)", trace)
        names, grades = [name.strip() for name, _ in graded], [GRADES.index(word) for _, word in graded]
        sizes.append(len(names))
        parsed = parse_completion(text, names)
        assert parsed.order == sorted(range(len(names)), key=lambda i: (-grades[i], i))
        if document.given:
            assert document.prompt == "Rank:"
            continue
        lines = [parse_line(line, labels) for line in document.prompt.split("\n")[3:]]
        assert [head for head, _ in lines] == names
        means = []
        for _, codes in lines:
            seen.update(word for word, _ in codes)
            means.append(sum(int(bucket) for _, bucket in codes) / len(codes))
        assert len({tuple(word for word, _ in codes) for _, codes in lines}) == 1
        for low in range(len(names)):  # a higher mean never has a lower grade
            assert all(grades[low] <= grades[high] for high in range(len(names)) if means[low] < means[high])
        best = re.search(r" best ?(<s_a_\d><s_b_\d>|\d+) (.*?)</think>", text)
        assert [code.split(":") in lines[parsed.order[0]][1] for code in best[2].split()]
        assert names.index(best[1]) == parsed.order[0]
    assert seen.keys() == {"pop", "soon", "lift"}
    assert max(sizes[:20]) <= 3 and max(sizes[120:]) == 10
    assert 40 < sum(bool(document.given) for document in made) < 120


def test_grades_of_exercises_are_about_equally_frequent():
    rng = np.random.default_rng(0)
    made = documents.list_documents(2000, ["popularity", "near", "lift"], "number", CATALOGUE, rng)
    text = " ".join(document.answer.partition(" best")[0] for document in made if not document.given)
    shares = np.array([text.count(f" {grade}") for grade in GRADES])
    shares = shares / shares.sum()
    assert shares.min() > 0.08 and shares.max() < 0.22


def test_general_text_is_the_file_in_passages_without_anything_like_a_tag(tmp_path):
    text = "x <think> y " * 100
    (tmp_path / "text.txt").write_text(text)
    made = list(documents.text_documents(str(tmp_path / "text.txt"), length=400))
    assert [len(document.answer) for document in made] == [400, 400, 400]
    assert "".join(document.answer for document in made) == text.replace("<", "‹").replace(">", "›")


def test_general_text_needs_no_file():
    made = list(documents.text_documents("packages"))
    assert len(made) > 20 and not any("<" in document.answer for document in made)


def test_the_mixture_counts_documents_against_the_sequences():
    args = arguments(
        mixture={"sequence": 0.5, "persona": 0.2, "caption": 0.15, "text": 0.05, "lists": 0.1}, max_items=4
    )
    made = documents.mixed_documents(HISTORIES, CATALOGUE, args, seed=0)
    # 8 items in windows of 4, each 2 on: starts 0, 2, 4, of 6 users 18 made; 18 * 0.2 / 0.5 = 7.2,
    # 18 * 0.15 / 0.5 = 5.4, 18 * 0.05 / 0.5 = 1.8, 18 * 0.1 / 0.5 = 3.6
    assert Counter(d.task for d in made) == {"sequence": 18, "persona": 7, "caption": 5, "text": 2, "lists": 4}
    assert made == documents.mixed_documents(HISTORIES, CATALOGUE, args, seed=0)
    assert made != documents.mixed_documents(HISTORIES, CATALOGUE, args, seed=1)


def test_lists_keep_their_order_in_the_mixture():
    args = arguments(mixture={"sequence": 0.5, "lists": 0.5}, num_documents=400, max_items=4, list_labels="number")
    made = documents.mixed_documents(HISTORIES, CATALOGUE, args, seed=0)
    lengths = [len(d.given + d.answer) for d in made if d.task == "lists"]
    assert np.mean(lengths[:50]) < 0.7 * np.mean(lengths[-50:])
    assert {d.task for d in made[:20]} == {"sequence", "lists"}


def test_documents_of_a_batch_are_of_like_length_and_move_little():
    lengths = np.random.default_rng(0).integers(1, 100, 1000).tolist()
    order = documents.in_batches(lengths, 8, np.random.default_rng(0))
    assert sorted(order) == list(range(1000))
    assert max(abs(place - i) for place, i in enumerate(order)) < 8 * documents.WINDOW
    spread = [np.ptp([lengths[i] for i in order[start : start + 8]]) for start in range(0, 1000, 8)]
    assert np.mean(spread) < 10  # in random order 78
    assert order != documents.in_batches(lengths, 8, np.random.default_rng(1))


def test_a_number_of_documents_is_shared_out_by_the_mixture():
    args = arguments(mixture={"sequence": 2.0, "persona": 1.0, "caption": 1.0}, num_documents=100, max_items=4)
    made = documents.mixed_documents(HISTORIES, CATALOGUE, args, seed=0)
    assert Counter(d.task for d in made) == {"sequence": 50, "persona": 25, "caption": 25}


def test_a_task_left_out_of_the_mixture_has_no_documents():
    args = arguments(mixture={"sequence": 1.0}, max_items=4)
    made = documents.mixed_documents(HISTORIES, CATALOGUE, args, seed=0)
    assert Counter(d.task for d in made) == {"sequence": 18}


def test_documents_are_repeated_evenly_where_there_are_too_few():
    drawn = documents._draw(["a", "b", "c"], 7, np.random.default_rng(0))
    assert sorted(Counter(drawn).values()) == [2, 2, 3]
    assert documents._draw([], 7, np.random.default_rng(0)) == []


@pytest.mark.parametrize(("has_seen", "items"), [(False, [[3, 1], [2]]), (True, [[3, 1, 4], [2]])])
def test_targets_of_the_reranker_are_read_only_when_the_summary_says_so(tmp_path, has_seen, items):
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data/metrics.json", {"midtrain_has_seen_rerank_targets": has_seen})
    table = {
        "user": [1, 0, 0, 0, 0, 0],
        "item": [2, 1, 3, 4, 5, 6],
        "position": [0, 1, 0, 2, 3, 4],
        "split": ["train", "train", "train", "rerank", "valid", "test"],
    }
    pq.write_table(pa.table(table), tmp_path / "data/interactions.parquet")
    assert [sequence.tolist() for sequence in midtrain.sequences(tmp_path / "data")] == items


def tokenizer_with_ids():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(ID_TOKENS)
    return tokenizer


def test_only_the_answer_of_a_document_has_loss():
    tokenizer = tokenizer_with_ids()
    row = documents.encode(documents.Document("caption", "Describe:<s_a_1>", "drama"), tokenizer, None)
    prompt = tokenizer("<|user|>Describe:<s_a_1><|assistant|>").input_ids
    answer = [*tokenizer("drama").input_ids, tokenizer.eos_token_id]
    assert row == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    document = documents.Document("sequence", "Next items:", "<s_a_1><s_b_0>", ends=False)
    assert documents.encode(document, tokenizer, None)["labels"][-2:] == tokenizer("<s_a_1><s_b_0>").input_ids
    assert len(documents.encode(document, tokenizer, 3)["input_ids"]) == 3


def test_the_prompt_of_the_next_item_is_how_a_sequence_begins():
    tokenizer = tokenizer_with_ids()
    prompt = NextItemEncoder(CATALOGUE, tokenizer, "semantic_id", 2).next_item_prompt([1, 4])
    document = documents.Document("sequence", "Next items:", "<s_a_0><s_b_1><s_a_1><s_b_0>", ends=False)
    assert prompt == documents.encode(document, tokenizer, None)["input_ids"]
    assert tokenizer.decode(prompt) == "<|user|>Next items:<|assistant|><s_a_0><s_b_1><s_a_1><s_b_0>"


def sft_config(folder, **options):
    return SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, per_device_train_batch_size=2, dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )  # fmt: skip


def phase_one(tmp_path, tied, documents_made, **options):
    """A model before phase one, its new ids, the dataset, and the same model with the rows that were trained."""
    tokenizer = tiny_tokenizer()
    model, after = tiny_model(tokenizer, tied), tiny_model(tokenizer, tied)
    ids = base_model.add_tokens(model, tokenizer, ID_TOKENS, seed=0)
    base_model.add_tokens(after, tokenizer, ID_TOKENS, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = sft_config(tmp_path / "checkpoints", **options)
    dataset, _ = midtrain.encoded_dataset(documents_made, tokenizer, config)
    args = arguments(token_learning_rate=0.05)
    midtrain.train_new_rows(model, tokenizer, ids, dataset, args, config, tmp_path / "rows.safetensors")
    midtrain.load_rows(after, ids, tmp_path / "rows.safetensors")
    return before, ids, dataset, after


IDS_IN_ORDER = documents.Document("sequence", "Next items:", "".join(ID_TOKENS))


@pytest.mark.parametrize("tied", [True, False])
def test_phase_one_moves_the_new_rows_and_nothing_else(tmp_path, tied):
    before, ids, _, trained = phase_one(tmp_path, tied, [IDS_IN_ORDER] * 4)
    after = trained.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
        old = [row for row in range(len(value)) if row not in ids] if is_table else ...
        assert torch.equal(value[old], after[name][old]), name
        if is_table:
            assert all(not torch.equal(value[row], after[name][row]) for row in ids), name
    assert (trained.get_output_embeddings().weight is trained.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_phase_one_is_training_the_whole_table_with_the_gradients_of_old_rows_set_to_zero(tmp_path, tied):
    _, ids, dataset, trained = phase_one(tmp_path, tied, [IDS_IN_ORDER] * 6, lr_scheduler_type="constant")
    tokenizer = tiny_tokenizer()
    slow = tiny_model(tokenizer, tied)
    base_model.add_tokens(slow, tokenizer, ID_TOKENS, seed=0)
    tables = {id(t): t for t in (slow.get_input_embeddings().weight, slow.get_output_embeddings().weight)}.values()
    optimizer = torch.optim.AdamW(tables, lr=0.05, weight_decay=0.0)
    batch = torch.tensor([dataset[0]["input_ids"]] * 2), torch.tensor([dataset[0]["labels"]] * 2)
    for _ in range(3):  # six equal documents in batches of two
        slow.zero_grad()
        slow(input_ids=batch[0], labels=batch[1]).loss.backward()
        for table in tables:
            table.grad[[row for row in range(len(table)) if row not in ids]] = 0
        torch.nn.utils.clip_grad_norm_(tables, 1.0)
        optimizer.step()
    for layer, wanted in (
        (trained.get_input_embeddings(), slow.get_input_embeddings()),
        (trained.lm_head, slow.lm_head),
    ):
        assert torch.allclose(layer.weight, wanted.weight, atol=1e-5)


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
def test_only_new_rows_are_parameters_of_phase_one(tied, tables):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, tied)
    ids = base_model.add_tokens(model, tokenizer, ID_TOKENS, seed=0)
    midtrain.train_only_rows(model, ids)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in trainable] == [(len(ids), 32)] * tables


def test_phase_one_ends_with_its_epochs_or_with_max_steps(tmp_path):
    def steps(**options):
        return midtrain.num_steps(11, 2.0, sft_config(tmp_path, **options))

    assert steps() == 11  # two epochs of 11 documents in batches of 2
    assert steps(gradient_accumulation_steps=2) == 6  # 22 documents by 4, rounded up
    assert (steps(max_steps=4), steps(max_steps=40)) == (4, 11)


def run_main(toy_run, folder, model_args, arguments=None, **options):
    run = folder / "run"
    if not run.exists():
        copy_stages(toy_run.run, run, "semantic_ids")
    args = midtrain.MidtrainArguments(run_dir=str(run), max_items=8, token_learning_rate=0.01, **(arguments or {}))
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    config = sft_config(out / "checkpoints", **{"max_steps": 2, "max_length": 128, "logging_steps": 1, **options})
    midtrain.main(args, config, model_args, out)
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_phase_two_moves_everything_of_a_pretrained_model(toy_run, tmp_path, tied):
    base = save_tiny_model(tmp_path / "base", tied, id_tokens=False)
    out = run_main(toy_run, tmp_path, ModelConfig(model_name_or_path=str(base)), learning_rate=0.01)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert [name for name, value in before.items() if torch.equal(value, after[name][: len(value)])] == []


def test_an_adapter_of_phase_two_is_merged_on_saving(toy_run, tmp_path):
    base = save_tiny_model(tmp_path / "base", id_tokens=False)
    lora = ModelConfig(model_name_or_path=str(base), use_peft=True, lora_r=4, lora_target_modules=["all-linear"])
    out = run_main(toy_run, tmp_path, lora, learning_rate=0.05)
    assert not list((out / "model").glob("adapter*"))
    merged = AutoModelForCausalLM.from_pretrained(out / "model")
    plain = AutoModelForCausalLM.from_pretrained(out / "base")
    ids = torch.tensor([[5, 6, 7, len(merged.get_input_embeddings().weight) - 1]])
    with torch.no_grad():
        wanted, without = merged(ids).logits, plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, out / "model_adapter").eval()(ids).logits
    assert torch.allclose(wanted, adapted, atol=1e-5)
    assert not torch.allclose(wanted, without, atol=1e-3)
    rows = load_file(out / "new_rows.safetensors")["rows"]
    drawn, tokenizer = base_model.load_pretrained(str(base))
    merged_rows = merged.get_input_embeddings().weight[-len(rows) :]
    assert torch.equal(merged_rows, rows)  # what phase one trained, and LoRA leaves alone
    base_model.add_tokens(drawn, tokenizer, [f"<s_z_{number}>" for number in range(len(rows))], seed=0)
    assert not torch.allclose(merged_rows, drawn.get_input_embeddings().weight[-len(rows) :], atol=1e-3)


def test_phase_one_is_not_repeated_where_its_rows_are_saved(toy_run, tmp_path):
    base = save_tiny_model(tmp_path / "base", id_tokens=False)
    shape = run_dir.read_metrics(toy_run.run, "semantic_ids")
    num_new = shape["levels"] * shape["codebook_size"] + 2  # and the two tags of a trace
    (tmp_path / "out").mkdir()
    save_file({"rows": torch.full((num_new, 32), 7.0)}, tmp_path / "out/new_rows.safetensors")
    model_args = ModelConfig(model_name_or_path=str(base))
    out = run_main(toy_run, tmp_path, model_args, learning_rate=0.0)
    rows = AutoModelForCausalLM.from_pretrained(out / "model").get_input_embeddings().weight[-num_new:]
    assert torch.equal(rows, torch.full((num_new, 32), 7.0))


def test_recall_on_validation_rows_is_logged_and_the_best_kept(toy_run, tmp_path):
    out = run_main(toy_run, tmp_path, ModelConfig(), {"eval_recall_rows": 6, "patience": 5}, eval_steps=1)
    history = json.loads((out / "log_history.json").read_text())
    found = [entry["eval_R@10"] for entry in history if "eval_R@10" in entry]
    assert len(found) == 2 and all(0 <= value <= 1 for value in found)
    assert any("loss_sequence" in entry for entry in history)


def test_dropout_is_on_in_phase_two(toy_run, tmp_path):
    losses = []
    for dropout in (0.0, 0.5):
        out = run_main(toy_run, tmp_path / str(dropout), ModelConfig(), {"dropout": dropout}, max_steps=1)
        losses.append(json.loads((out / "log_history.json").read_text())[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_must_leave_something(dropout):
    with pytest.raises(ValueError, match=r"dropout is .* but must be at least 0 and below 1"):
        arguments(dropout=dropout)


def test_one_item_is_no_history():
    with pytest.raises(ValueError, match="max_items is 1 but must be at least 2"):
        arguments(max_items=1)


@pytest.mark.parametrize(("name", "token_epochs"), [(None, 1.0), ("HuggingFaceTB/SmolLM2-135M", 0.0)])
def test_an_adapter_beside_untrained_rows_is_refused(tmp_path, name, token_epochs):
    lora = ModelConfig(model_name_or_path=name, use_peft=True)
    with pytest.raises(ValueError, match="use_peft trains an adapter in phase two and the new tokens' rows in phase"):
        midtrain.check(arguments(token_epochs=token_epochs), sft_config(tmp_path), lora)


def test_patience_outlives_an_interruption(toy_run, tmp_path, monkeypatch):
    monkeypatch.setattr(full_catalogue.ValidationRecall, "__call__", lambda self, model: {"R@10": 0.5})
    options = {"eval_recall_rows": 6, "patience": 2}
    run_main(toy_run, tmp_path, ModelConfig(), options, eval_steps=1, max_steps=2)  # a best value, and one no better
    out = run_main(toy_run, tmp_path, ModelConfig(), options, eval_steps=1, max_steps=9)
    history = json.loads((out / "log_history.json").read_text())
    assert max(entry["step"] for entry in history) == 3


@pytest.mark.parametrize(
    "mixture", [{"sequence": 1.0, "captions": 1.0}, {"caption": 1.0}, {"sequence": 1, "text": -1}]
)
def test_a_mixture_of_no_use_is_refused(mixture):
    with pytest.raises(ValueError, match=r"mixture is .*; give shares of sequence, .*, lists, that of sequence above"):
        arguments(mixture=mixture)


def test_what_is_not_there_is_refused_before_the_stage_starts(tmp_path):
    config = sft_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"general_text nowhere.txt is not there; give a text file"):
        midtrain.check(arguments(general_text="nowhere.txt"), config, ModelConfig())
    with pytest.raises(FileNotFoundError, match=r"\./nowhere is not there"):
        midtrain.check(arguments(), config, ModelConfig(model_name_or_path="./nowhere"))
