"""What a model reads in mid-training, and which of its weights each phase may move."""

import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_model import ID_TOKENS, save_tiny_model, tiny_model, tiny_tokenizer
from toy_recipe import copy_stages
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig

from rerank import base_model, baselines, midtrain, run_dir
from rerank.catalogue import Catalogue

NUM_ITEMS = 12
KINDS = ("drama", "comedy, crime", "crime", "")
CATALOGUE = Catalogue(
    [f"m{item}" for item in range(NUM_ITEMS)],
    [f"<s_a_{item // 4}><s_b_{item % 4}>" for item in range(NUM_ITEMS)],
    [f"Title {item}" for item in range(NUM_ITEMS)],
    [KINDS[item % 4] for item in range(NUM_ITEMS)],
)
HISTORIES = [np.arange(start, start + 8) % NUM_ITEMS for start in range(6)]
EMBEDDINGS = np.stack([[np.cos(a), np.sin(a)] for a in 0.4 * np.arange(NUM_ITEMS)]).astype(np.float32)
ID = re.compile(r"<s_a_\d><s_b_\d>")


def arguments(**options):
    return midtrain.MidtrainArguments(run_dir="run", **options)


def items_of(text):
    return [CATALOGUE.semantic_ids.index(found) for found in ID.findall(text)]


def test_a_sequence_is_cut_into_windows_that_overlap_by_half():
    documents = list(midtrain.sequence_documents([np.arange(5), np.array([7])], CATALOGUE, max_items=4))
    assert [items_of(document.answer) for document in documents] == [[0, 1, 2, 3], [2, 3, 4], [7]]
    assert all(document.prompt == "Next items:" and not document.ends for document in documents)


def test_captions_go_both_ways():
    documents = list(midtrain.caption_documents(CATALOGUE))
    assert len(documents) == 2 * NUM_ITEMS
    assert (documents[2].prompt, documents[2].answer) == ("Describe:<s_a_0><s_b_1>", "Title 1 | comedy, crime")
    assert (documents[3].prompt, documents[3].answer) == ("Which item: Title 1 | comedy, crime", "<s_a_0><s_b_1>")
    assert documents[6].answer == "Title 3"  # an item without a category


def test_a_persona_tells_true_facts_of_its_history():
    for document in midtrain.persona_documents(HISTORIES, CATALOGUE, np.random.default_rng(0)):
        shown, told = items_of(document.prompt), document.answer.removeprefix("likes ").split("; ")
        groups = [(part.split(" ")[0], items_of(part)) for part in told[:-1]]
        assert sorted(item for _, items in groups for item in items) == sorted(shown)
        assert [len(items) for _, items in groups] == sorted((len(items) for _, items in groups), reverse=True)
        for name, items in groups:
            assert all((CATALOGUE.categories[item].split(", ")[0] or "Other") == name for item in items)
        assert told[-1] == f"lately Title {shown[-1]}" + CATALOGUE.semantic_ids[shown[-1]]


@pytest.mark.parametrize("labels", ["semantic_id", "number"])
def test_a_list_to_sort_is_sorted_by_facts_that_are_true(labels):
    rng = np.random.default_rng(0)
    documents = list(midtrain.sorting_documents(HISTORIES, CATALOGUE, EMBEDDINGS, 40, rng, labels))
    counts = Counter(int(item) for history in HISTORIES for item in history)
    edges = baselines.fit_edges(np.array([float(counts[item]) for item in sorted(counts)]))
    facts = Counter()
    for document in documents:
        _, history, _, *lines = document.prompt.split("\n")
        items = [items_of(line)[0] for line in lines]
        (fact,) = {re.search(r" (\w+):\d$", line)[1] for line in lines}
        buckets = [int(line.rpartition(":")[2]) for line in lines]
        facts[fact] += 1
        if fact == "pop":
            assert buckets == [baselines.bucket(float(counts[item]), edges) for item in items]
        else:  # the nearer to the shown item, the higher the bucket
            nearest_last = np.argsort(EMBEDDINGS[items] @ EMBEDDINGS[items_of(history)[-1]], kind="stable")
            assert [buckets[i] for i in nearest_last] == sorted(buckets)
        # highest first; of equals the one shown first
        order = sorted(range(len(items)), key=lambda i: (-buckets[i], i))
        if labels == "number":
            assert [line.split(".")[0] for line in lines] == [str(n) for n in range(1, len(items) + 1)]
            assert document.answer == ",".join(str(i + 1) for i in order)
        else:
            assert items_of(document.answer) == [items[i] for i in order]
    assert facts.keys() == {"pop", "like"}


def test_general_text_is_the_file_in_passages_without_anything_like_a_tag(tmp_path):
    text = "x <think> y " * 100
    (tmp_path / "text.txt").write_text(text)
    documents = list(midtrain.text_documents(str(tmp_path / "text.txt"), length=400))
    assert [len(document.answer) for document in documents] == [400, 400, 400]
    assert "".join(document.answer for document in documents) == text.replace("<", "‹").replace(">", "›")


def test_general_text_needs_no_file():
    documents = list(midtrain.text_documents("packages"))
    assert len(documents) > 20 and not any("<" in document.answer for document in documents)


def test_the_mixture_counts_documents_against_the_sequences():
    args = arguments(
        mixture={"sequence": 0.5, "persona": 0.3, "caption": 0.15, "text": 0.05}, sorting_share=0.5, max_items=4
    )
    documents = midtrain.mixed_documents(HISTORIES, CATALOGUE, EMBEDDINGS, args, seed=0)
    # 8 items in windows of 4, each 2 on: starts 0, 2, 4, of 6 users 18 documents; 18 * 0.3 / 0.5 = 10.8,
    # 18 * 0.15 / 0.5 = 5.4, 18 * 0.05 / 0.5 = 1.8; of 11 persona documents round(5.5) = 6 are lists to sort
    assert Counter(d.task for d in documents) == {"sequence": 18, "persona": 11, "caption": 5, "text": 2}
    assert sum(document.prompt.startswith("Sort") for document in documents) == 6
    assert documents == midtrain.mixed_documents(HISTORIES, CATALOGUE, EMBEDDINGS, args, seed=0)
    assert documents != midtrain.mixed_documents(HISTORIES, CATALOGUE, EMBEDDINGS, args, seed=1)


def test_a_number_of_documents_is_shared_out_by_the_mixture():
    args = arguments(mixture={"sequence": 2.0, "persona": 1.0, "caption": 1.0}, num_documents=100, max_items=4)
    documents = midtrain.mixed_documents(HISTORIES, CATALOGUE, EMBEDDINGS, args, seed=0)
    assert Counter(d.task for d in documents) == {"sequence": 50, "persona": 25, "caption": 25}


def test_a_task_left_out_of_the_mixture_has_no_documents():
    args = arguments(mixture={"sequence": 1.0}, max_items=4)
    documents = midtrain.mixed_documents(HISTORIES, CATALOGUE, EMBEDDINGS, args, seed=0)
    assert Counter(d.task for d in documents) == {"sequence": 18}


def test_documents_are_repeated_evenly_where_there_are_too_few():
    drawn = midtrain._draw(["a", "b", "c"], 7, np.random.default_rng(0))
    assert sorted(Counter(drawn).values()) == [2, 2, 3]
    assert midtrain._draw([], 7, np.random.default_rng(0)) == []


@pytest.mark.parametrize(("has_seen", "items"), [(False, [[3, 1], [2]]), (True, [[3, 1, 4], [2]])])
def test_targets_of_the_reranker_are_read_only_when_the_summary_says_so(tmp_path, has_seen, items):
    (tmp_path / "data").mkdir()
    run_dir.write_json(tmp_path / "data/metrics.json", {"midtrain_has_seen_rerank_targets": has_seen})
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
    row = midtrain.encode(midtrain.Document("caption", "Describe:<s_a_1>", "drama"), tokenizer, None)
    prompt = tokenizer("<|user|>Describe:<s_a_1><|assistant|>").input_ids
    answer = [*tokenizer("drama").input_ids, tokenizer.eos_token_id]
    assert row == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    document = midtrain.Document("sequence", "Next items:", "<s_a_1><s_b_0>", ends=False)
    assert midtrain.encode(document, tokenizer, None)["labels"][-2:] == tokenizer("<s_a_1><s_b_0>").input_ids
    assert len(midtrain.encode(document, tokenizer, 3)["input_ids"]) == 3


def test_the_prompt_of_the_next_item_is_how_a_sequence_begins():
    tokenizer = tokenizer_with_ids()
    text = midtrain.next_item_prompt([9, 1, 4], CATALOGUE, 2, tokenizer)
    assert text == "<|user|>Next items:<|assistant|><s_a_0><s_b_1><s_a_1><s_b_0>"


def sft_config(folder, **options):
    return SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, per_device_train_batch_size=2, dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_phase_one_moves_the_new_rows_and_nothing_else(tmp_path, tied):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, tied)
    ids = base_model.add_tokens(model, tokenizer, ID_TOKENS, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    documents = [midtrain.Document("sequence", "Next items:", "".join(ID_TOKENS)) for _ in range(4)]
    dataset = Dataset.from_list([midtrain.encode(document, tokenizer, None) for document in documents])
    args = arguments(token_learning_rate=0.05)
    trained = midtrain.train_new_rows(model, tokenizer, ids, dataset, args, sft_config(tmp_path / "checkpoints"))
    after = trained.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
        old = [row for row in range(len(value)) if row not in ids] if is_table else ...
        assert torch.equal(value[old], after[name][old]), name
        if is_table:
            assert all(not torch.equal(value[row], after[name][row]) for row in ids), name
    assert (trained.get_output_embeddings().weight is trained.get_input_embeddings().weight) == tied


def run_main(toy_run, folder, model_args, **options):
    run = copy_stages(toy_run.run, folder / "run", "semantic_ids")
    args = midtrain.MidtrainArguments(run_dir=str(run), max_items=8, token_learning_rate=0.01)
    out = folder / "out"
    out.mkdir()
    config = sft_config(out / "checkpoints", max_steps=2, max_length=128, logging_steps=1, **options)
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


@pytest.mark.parametrize(
    "mixture", [{"sequence": 1.0, "captions": 1.0}, {"caption": 1.0}, {"sequence": 1, "text": -1}]
)
def test_a_mixture_of_no_use_is_refused(mixture):
    with pytest.raises(ValueError, match=r"mixture is .*; give shares of sequence, persona, caption, text, that of"):
        arguments(mixture=mixture)


def test_what_is_not_there_is_refused_before_the_stage_starts(tmp_path):
    config = sft_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"general_text nowhere.txt is not there; give a text file"):
        midtrain.check(arguments(general_text="nowhere.txt"), config, ModelConfig())
    with pytest.raises(FileNotFoundError, match=r"model folder \./nowhere is not there"):
        midtrain.check(arguments(), config, ModelConfig(model_name_or_path="./nowhere"))
