"""What a model reads in mid-training, and which of its weights each phase may move."""

import json
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_model import ID_TOKENS, model_with_ids, save_tiny_model, sft_config
from toy_recipe import copy_stages
from toy_run import NUM_ITEMS, SEMANTIC_IDS, write_interactions
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from rerank import midtrain
from rerank.catalogue import Catalogue
from rerank.grading import GRADES
from rerank.launch import run_dir
from rerank.losses.cllm4rec import content_rows
from rerank.midtrain import documents, encoding, exercises
from rerank.midtrain.mixture import _draw, mixed_documents
from rerank.models import base as base_model
from rerank.next_item import recall as full_catalogue
from rerank.next_item.encoder import NextItemEncoder, written_items
from rerank.prompts import parse_completion

TITLES, KINDS = [f"Title {item}" for item in range(NUM_ITEMS)], ["drama", "comedy, crime", "crime", ""] * 3
CATALOGUE = Catalogue([f"m{item}" for item in range(NUM_ITEMS)], SEMANTIC_IDS, TITLES, KINDS)
HISTORIES = [np.arange(start, start + 8) % NUM_ITEMS for start in range(6)]
FACTS = ["popularity", "near", "lift"]
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


def test_texts_of_items_hold_nothing_that_a_tokenizer_takes_for_a_token():
    bad = "Bad <|end|> <s_a_1>\n title"
    marked = replace(CATALOGUE, titles=[bad] * NUM_ITEMS, categories=["<think>, x"] * NUM_ITEMS)
    rng = np.random.default_rng(0)
    made = [*documents.caption_documents(marked), *documents.title_documents(marked)]
    made += documents.persona_documents(HISTORIES, marked, rng)
    texts = [document.prompt + document.answer for document in made] + written_items(marked, "title")
    texts += content_rows(SimpleNamespace(catalogue=marked, text_row=lambda prompt, item, text: text))
    texts += written_items(replace(CATALOGUE, titles=[""] * NUM_ITEMS, item_ids=["<s_a_1>"] * NUM_ITEMS), "title")
    assert not any("<" in ID.sub("", text) or "<s_a_1> title" in text for text in texts)
    assert made[0].answer == "Bad ‹|end|› ‹s_a_1› title | ‹think›, x" and texts[-1] == "‹s_a_1›\n"
    assert written_items(marked, "title")[0] == "Bad ‹|end|› ‹s_a_1› title\n"
    told = [item.answer for item in documents.persona_documents(HISTORIES, marked, rng)]
    assert all(answer.startswith("likes ‹think› <s_a_") and "lately Bad ‹|end|› ‹s" in answer for answer in told)


@pytest.mark.parametrize("labels", ["semantic_id", "number"])
@pytest.mark.parametrize(("layout", "before"), [("history_first", "Candidates:\n"), ("candidates_first", "Facts:\n")])
def test_an_exercise_grades_by_the_mean_of_the_facts_shown_and_ranks_by_grade(labels, layout, before):
    made = list(exercises.list_documents(200, FACTS, labels, CATALOGUE, np.random.default_rng(0), layout=layout))
    seen, sizes = set(), []
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
        lines = document.prompt.partition(before)[2].split("\n")
        heads, codes = zip(*(line.split(maxsplit=1) for line in lines), strict=True)
        assert [head.rstrip(".") for head in heads] == names
        facts = [dict(code.split(":") for code in line.split()) for line in codes]
        assert len({tuple(words) for words in facts}) == 1
        seen.update(facts[0])
        means = [np.mean([int(bucket) for bucket in words.values()]) for words in facts]
        for low in range(len(names)):  # a higher mean never has a lower grade
            assert all(grades[low] <= grades[high] for high in range(len(names)) if means[low] < means[high])
        best = re.search(r" best ?(<s_a_\d><s_b_\d>|\d+) (.*?)</think>", text)
        assert names.index(best[1]) == parsed.order[0]
        assert set(best[2].split()) <= set(codes[parsed.order[0]].split())
    assert seen == {"pop", "soon", "lift"}
    assert max(sizes[:20]) <= 3 and max(sizes[120:]) == 10
    assert 40 < sum(bool(document.given) for document in made) < 120


def test_exercises_are_as_long_and_as_often_to_be_sorted_alone_as_the_recipe_says():
    given = 400, FACTS, "number", CATALOGUE, 12, 20, "history_first", 6, 0.75

    def sizes(made):
        return [len(re.findall(rf" \d+ (?:{'|'.join(GRADES)})\b", one.given + one.answer)) for one in made]

    for made in (exercises.list_documents(*given[:4], np.random.default_rng(0), *given[4:]),
                 exercises.lists_on_read(*given[:4], 0, *given[4:])):  # fmt: skip
        made = list(made)
        lengths = sizes(made)
        assert max(lengths[:30]) <= 4, "lists grow from two"
        assert min(lengths[200:]) == 6 and max(lengths) == 12
        assert 0.68 < np.mean([bool(one.given) for one in made]) < 0.82


def test_grades_of_exercises_are_about_equally_frequent():
    made = exercises.list_documents(2000, FACTS, "number", CATALOGUE, np.random.default_rng(0))
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
    made = list(documents.text_documents("packages"))  # which needs no file
    assert len(made) > 20 and not any("<" in document.answer for document in made)
    words = [sys.executable, "-c", "import importlib_metadata; from rerank.midtrain import documents; "
             "print(''.join(one.answer for one in documents.text_documents('packages')))"]  # fmt: skip
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert shown.split() == "".join(document.answer for document in made).split(), "a backport changes nothing"


# 8 items in windows of 4, each 2 on: starts 0, 2, 4, of 6 users 18 made; 18 * 0.2 / 0.5 = 7.2, 18 * 0.15 / 0.5 = 5.4
@pytest.mark.parametrize(("mixture", "num_documents", "wanted"), [
    ([0.5, 0.2, 0.15, 0.05, 0.1], 0, [18, 7, 5, 2, 4]), ([2, 1, 1], 100, [50, 25, 25]), ([1], 0, [18]),
])  # fmt: skip
def test_the_mixture_shares_out_the_documents(mixture, num_documents, wanted):
    mixture, wanted = (dict(zip(documents.TASKS[: len(of)], of, strict=True)) for of in (mixture, wanted))
    args = arguments(mixture=mixture, num_documents=num_documents, max_items=4)
    made = mixed_documents(HISTORIES, CATALOGUE, args, seed=0)
    assert Counter(d.task for d in made) == wanted
    assert made == mixed_documents(HISTORIES, CATALOGUE, args, seed=0)
    assert made != mixed_documents(HISTORIES, CATALOGUE, args, seed=1)


def test_lists_keep_their_order_in_the_mixture():
    args = arguments(mixture={"sequence": 0.5, "lists": 0.5}, num_documents=400, max_items=4, list_labels="number")
    made = mixed_documents(HISTORIES, CATALOGUE, args, seed=0)
    lengths = [len(d.given + d.answer) for d in made if d.task == "lists"]
    assert np.mean(lengths[:50]) < 0.7 * np.mean(lengths[-50:])
    assert {d.task for d in made[:20]} == {"sequence", "lists"}


def test_documents_of_a_batch_are_of_like_length_and_move_little():
    lengths = np.random.default_rng(0).integers(1, 100, 1003).tolist()  # three are left over
    order = encoding.in_batches(lengths, 8, np.random.default_rng(0))
    assert sorted(order) == list(range(1003))
    assert max(abs(place - i) for place, i in enumerate(order)) < 8 * encoding.WINDOW
    spread = [np.ptp([lengths[i] for i in order[start : start + 8]]) for start in range(0, 1000, 8)]
    assert np.mean(spread) < 10  # in random order 78
    assert order != encoding.in_batches(lengths, 8, np.random.default_rng(1))


def test_documents_are_repeated_evenly_where_there_are_too_few():
    letters = documents.Documents(np.array([1, 2, 3]), "abc".__getitem__)
    drawn = _draw(letters, 7, np.random.default_rng(0))
    assert sorted(Counter(drawn).values()) == [2, 2, 3]
    assert drawn.lengths.tolist() == ["abc".index(letter) + 1 for letter in drawn]
    assert list(_draw(documents.Documents(np.array([]), "".__getitem__), 7, np.random.default_rng(0))) == []


@pytest.mark.parametrize(("has_seen", "items"), [(False, [[3, 1], [2]]), (True, [[3, 1, 4], [2]])])
def test_targets_of_the_reranker_are_read_only_when_the_summary_says_so(tmp_path, has_seen, items):
    splits = ["train", "train", "rerank", "valid", "test", "train"]
    write_interactions(tmp_path / "data", {0: [3, 1, 4, 5, 6], 1: [2]}, splits, seen=has_seen)
    assert [sequence.tolist() for sequence in midtrain.sequences(tmp_path / "data")] == items


def test_only_the_answer_of_a_document_has_loss_and_a_prompt_is_how_a_sequence_begins():
    _, tokenizer, _ = model_with_ids()
    row = encoding.encode(documents.Document("caption", "Describe:<s_a_1>", "drama"), tokenizer)
    prompt = tokenizer("<|user|>Describe:<s_a_1><|assistant|>").input_ids
    answer = [*tokenizer("drama").input_ids, tokenizer.eos_token_id]
    assert row == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    document = documents.Document("sequence", "Next items:", "<s_a_1><s_b_0>", ends=False)
    assert encoding.encode(document, tokenizer)["labels"][-2:] == tokenizer("<s_a_1><s_b_0>").input_ids
    prompt = NextItemEncoder(CATALOGUE, tokenizer, "semantic_id", 2).next_item_prompt([4])
    assert prompt == encoding.encode(document, tokenizer)["input_ids"]  # asked as a sequence begins
    assert tokenizer.decode(prompt) == "<|user|>Next items:<|assistant|><s_a_1><s_b_0>"


@pytest.mark.parametrize("tied", [True, False])
def test_phase_one_moves_the_new_rows_alone_as_training_the_whole_table_would(tmp_path, tied):
    model, tokenizer, ids = model_with_ids(tied)
    (trained, *_), (slow, *_) = model_with_ids(tied), model_with_ids(tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = sft_config(tmp_path / "checkpoints", lr_scheduler_type="constant")
    text = documents.Document("sequence", "Next items:", "".join(ID_TOKENS))
    dataset, _ = encoding.encoded_dataset([text] * 6, tokenizer, config)
    args = arguments(token_learning_rate=0.05)
    midtrain.train_new_rows(model, tokenizer, ids, dataset, args, config, tmp_path / "rows.safetensors")
    midtrain.load_rows(trained, ids, tmp_path / "rows.safetensors")
    tables = {id(t): t for t in (slow.get_input_embeddings().weight, slow.get_output_embeddings().weight)}.values()
    optimizer = torch.optim.AdamW(tables, lr=0.05, weight_decay=0.0)
    batch = {name: torch.tensor([dataset[0][name]] * 2) for name in ("input_ids", "labels")}
    for _ in range(3):  # six equal documents in batches of two
        slow.zero_grad()
        slow(**batch).loss.backward()
        for table in tables:
            table.grad[[row for row in range(len(table)) if row not in ids]] = 0
        torch.nn.utils.clip_grad_norm_(tables, 1.0)
        optimizer.step()
    wanted, after = slow.state_dict(), trained.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        moved = [row for row in range(len(value)) if not torch.equal(value[row], after[name][row])]
        assert moved == (ids if name in ("model.embed_tokens.weight", "lm_head.weight") else []), name
        assert torch.allclose(after[name], wanted[name], atol=1e-5), name
    assert (trained.get_output_embeddings().weight is trained.get_input_embeddings().weight) == tied


def test_phase_one_ends_with_its_epochs_or_with_max_steps(tmp_path):
    def steps(**options):
        return midtrain.num_steps(11, 2.0, sft_config(tmp_path, **options))

    assert steps() == 11  # two epochs of 11 documents in batches of 2
    assert steps(gradient_accumulation_steps=2) == 6  # 22 documents by 4, rounded up
    assert (steps(max_steps=4), steps(max_steps=40)) == (4, 11)


@pytest.fixture
def train(toy_run, tmp_path):
    """The stage on the toy's data: its folder, and its log."""
    run, out = copy_stages(toy_run.run, tmp_path / "run", "semantic_ids"), tmp_path / "out"
    out.mkdir()

    def train(options=None, name=None, lora=None, **training):
        args = midtrain.MidtrainArguments(run_dir=str(run), max_items=8, token_learning_rate=0.01, **(options or {}))
        config = sft_config(out / "checkpoints", **{"max_steps": 2, "max_length": 128, "logging_steps": 1, **training})
        midtrain.main(args, config, ModelConfig(model_name_or_path=name, **(lora or {})), out)
        return out, json.loads((out / "log_history.json").read_text())

    return train


@pytest.fixture
def base(tmp_path):
    """A pretrained model that knows no ids."""
    return str(save_tiny_model(tmp_path / "base", id_tokens=False))


@pytest.mark.parametrize("tied", [True, False])
def test_phase_two_moves_everything_of_a_pretrained_model(train, tmp_path, tied):
    base = save_tiny_model(tmp_path / "base", tied, id_tokens=False)
    out, _ = train(name=str(base), learning_rate=0.01)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert [name for name, value in before.items() if torch.equal(value, after[name][: len(value)])] == []


def test_an_adapter_of_phase_two_is_merged_on_saving(train, base):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}
    out, _ = train(name=base, lora=lora, learning_rate=0.05)
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
    drawn, tokenizer = base_model.load_pretrained(base)
    merged_rows = merged.get_input_embeddings().weight[-len(rows) :]
    assert torch.equal(merged_rows, rows)  # what phase one trained, and LoRA leaves alone
    base_model.add_tokens(drawn, tokenizer, [f"<s_z_{number}>" for number in range(len(rows))], seed=0)
    assert not torch.allclose(merged_rows, drawn.get_input_embeddings().weight[-len(rows) :], atol=1e-3)


def test_phase_one_is_not_repeated_where_its_rows_are_saved(toy_run, train, base, tmp_path):
    shape = run_dir.read_metrics(toy_run.run, "semantic_ids")
    num_new = shape["levels"] * shape["codebook_size"] + 2  # and the two tags of a trace
    save_file({"rows": torch.full((num_new, 32), 7.0)}, tmp_path / "out/new_rows.safetensors")
    out, _ = train(name=base, learning_rate=0.0)
    rows = AutoModelForCausalLM.from_pretrained(out / "model").get_input_embeddings().weight[-num_new:]
    assert torch.equal(rows, torch.full((num_new, 32), 7.0))


def test_recall_on_validation_rows_is_logged(train):
    _, history = train({"eval_recall_rows": 6, "patience": 5}, eval_steps=1)
    found = [entry["eval_R@10"] for entry in history if "eval_R@10" in entry]
    assert len(found) == 2 and all(0 <= value <= 1 for value in found)
    assert any("loss_sequence" in entry for entry in history)


def test_dropout_is_on_in_phase_two(train):
    losses = [train({"dropout": dropout}, max_steps=1)[1][0]["loss"] for dropout in (0.0, 0.5)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_patience_outlives_an_interruption(train, monkeypatch):
    monkeypatch.setattr(full_catalogue.ValidationRecall, "__call__", lambda self, model: {"R@10": 0.5})
    options = {"eval_recall_rows": 6, "patience": 2}
    train(options, eval_steps=1, max_steps=2)  # a best value, and one no better
    _, history = train(options, eval_steps=1, max_steps=9)
    assert max(entry["step"] for entry in history) == 3


@pytest.mark.parametrize(("options", "message"), [
    ({"dropout": -0.1}, "dropout is -0.1 but must be at least 0 and below 1"),
    ({"dropout": 1.0}, "dropout is 1.0 but must be at least 0 and below 1"),
    ({"max_items": 1}, "max_items is 1 but must be at least 2"),  # one item is no history
    ({"eval_recall_rows": -1}, "eval_recall_rows is -1 but must be at least 0"),
    ({"patience": 2}, "patience is 2 but nothing is evaluated; set eval_recall_rows"),
    ({"mixture": {"sequence": 1.0, "captions": 1.0}}, "mixture is .*; give shares of sequence, .*, lists, titles"),
    ({"mixture": {"caption": 1.0}}, "num_documents is 0, every sequence once, but mixture"),
    ({"mixture": {"sequence": 1, "text": -1}}, "mixture is .*; give shares of sequence"),
])  # fmt: skip
def test_options_of_no_use_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        arguments(**options)


PACKING = {"packing": True, "max_length": 64}
LORA = "use_peft trains an adapter in phase two and the new tokens' rows in phase one"


@pytest.mark.parametrize(("options", "training", "model", "message"), [
    ({}, {}, {"use_peft": True}, LORA),
    ({"token_epochs": 0.0}, {}, {"use_peft": True, "model_name_or_path": "HuggingFaceTB/SmolLM2-135M"}, LORA),
    ({"general_text": "nowhere.txt"}, {}, {}, "general_text nowhere.txt is not there; give a text file"),
    ({}, {}, {"model_name_or_path": "./nowhere"}, r"\./nowhere is not there"),
    ({"eval_recall_rows": 100}, {}, {}, "eval_recall_rows is 100 but eval_steps is not set; set it, such as 500"),
    ({"mixture": {"sequence": 1.0, "lists": 1.0}}, PACKING, {}, "packing puts documents out of order but lists"),
    ({}, {**PACKING, "packing_strategy": "wrapped"}, {}, "packing_strategy wrapped cuts documents; use bfd"),
    ({}, {**PACKING, "max_length": None}, {}, "packing needs max_length, the length of a packed row; set it"),
    ({}, PACKING, {"attn_implementation": "flex_attention"}, "flex_attention may not keep packed documents apart"),
    ({}, PACKING, {"attn_implementation": "flash_attention_2"}, None),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_the_stage_starts(tmp_path, options, training, model, message):
    refused = nullcontext() if message is None else pytest.raises((ValueError, FileNotFoundError), match=message)
    with refused:
        midtrain.check(arguments(**options), sft_config(tmp_path, **training), ModelConfig(**model))
