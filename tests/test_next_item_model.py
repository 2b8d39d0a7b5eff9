"""A trained model of next items: asked by beams, by its head and for given items; pruning, tables, held-out sets."""

import dataclasses
import json
import shutil
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from next_item_run import train, write_next_item_run
from toy_run import NUM_ITEMS, first_items, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from rerank.evaluate import EvaluateArguments, refuse_ranker
from rerank.evaluate import main as evaluate
from rerank.next_item import held_out_sets, pruning, recall
from rerank.next_item.encoder import NextItemEncoder
from rerank.next_item.item_head import ItemHead
from rerank.next_item.model import NextItemModel
from rerank.next_item.prefix_index import PrefixIndex

HISTORIES = [np.array([1, 2, 3]), np.array([5]), np.array([0, 1, 2, 3, 4, 5, 6])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(write_next_item_run(tmp_path_factory.mktemp("next") / "run"))


@pytest.fixture(scope="module")
def model(trained):
    return NextItemModel.load(trained / "sft/model")


def change(model, **options):
    """The same model with another encoder."""
    return dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, **options))


def test_the_trained_folder_is_a_plain_model_with_settings_and_head(trained):
    folder = trained / "sft/model"
    settings = json.loads((folder / "next_item.json").read_text())
    assert settings == {"item_text": "semantic_id", "max_items": 5, "constrained": True}
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<s_a_0>") > 0
    assert PrefixIndex.load(folder / "prefix_index").has(NextItemModel.load(folder).encoder.tokens)
    assert (folder / "item_head.safetensors").is_file() and not (folder / "loss_parameters.pt").exists()
    assert "model of next items" in (folder / "README.md").read_text()
    history = json.loads((trained / "sft/log_history.json").read_text())
    first, last = history[0], [entry for entry in history if "loss" in entry][-1]
    assert {"loss_next_item", "loss_content", "loss_semantic", "loss_item_head"} <= set(first)
    assert last["loss_next_item"] < first["loss_next_item"] and last["loss_item_head"] < first["loss_item_head"]


def test_the_head_ranks_the_catalogue_as_scoring_every_item_does(model):
    found = model.by_head(HISTORIES, 4)
    weights = model.model.get_input_embeddings().weight
    for history, items, logps in zip(HISTORIES, found.items, found.logps, strict=True):
        prompt = torch.tensor([model.encoder.next_item_prompt(history[-4:].tolist())])
        with torch.no_grad():
            state = model.model.base_model(prompt).last_hidden_state[0, -1]
            scores = [(weights[model.encoder.tokens[j]].mean(0) + model.head.own[j]) @ state for j in range(NUM_ITEMS)]
        expected = torch.log_softmax(torch.stack(scores), 0)
        order = [j for j in expected.argsort(descending=True).tolist() if j not in history][:4]
        assert items == order and logps == pytest.approx([expected[j].item() for j in order], rel=1e-4)


def test_an_item_is_read_at_its_last_token_wherever_a_slow_loop_finds_it():
    rng = np.random.default_rng(0)
    ids = [[3, 10, 21], [3, 11, 20], [4, 10, 20], [4, 10, 21], [5, 12, 22]]
    head = ItemHead(ids, 2, is_read=True)
    tokens = torch.tensor(rng.choice([0, 3, 4, 5, 10, 11, 12, 20, 21, 22, 99], (50, 12)))
    tokens[:, 2:5] = torch.tensor(ids)[rng.integers(0, 5, 50)]
    slow = [
        [ids.index(row[end - 2 : end + 1]) if row[end - 2 : end + 1] in ids else -1 for end in range(12)]
        for row in tokens.tolist()
    ]
    assert head.items_read(tokens).tolist() == slow and {0, 1, 2, 3, 4} <= set(sum(slow, []))
    assert head.items_read(tokens[:, :2]).tolist() == [[-1, -1]] * 50


@pytest.mark.parametrize(("ids", "message"), [
    ([[1, 2], [1]], "ids of one length; run the semantic_ids stage"), ([[1, 2], [1, 2]], "two items have one id"),
])  # fmt: skip
def test_ids_that_cannot_be_told_apart_are_not_read(ids, message):
    with pytest.raises(ValueError, match=message):
        ItemHead(ids, 2, is_read=True)
    ItemHead(ids, 2)


def test_a_trained_model_reads_the_items_own_vectors(model):
    prompt = torch.tensor([model.encoder.next_item_prompt([3, 1])])
    end = len(model.encoder.prompt("Next items:"))
    plain = torch.nn.functional.embedding(prompt, model.model.get_input_embeddings().weight)
    read = (model.model.get_input_embeddings()(prompt) - plain)[0].detach()
    num_tokens = len(model.encoder.tokens[3])
    expected = torch.zeros_like(read)
    expected[end + num_tokens - 1], expected[end + 2 * num_tokens - 1] = model.head.own.detach()[[3, 1]]
    assert model.head.own.abs().sum() > 0 and torch.allclose(read, expected, atol=1e-6)


@pytest.mark.parametrize(("max_history", "constrained"), [(4, True), (3, False)])
def test_beams_of_a_model_that_reads_items_find_every_item_in_its_order(model, max_history, constrained):
    model = change(model.with_max_history(max_history), constrained=constrained)
    assert model.encoder.max_items == max_history + 1
    found = model.by_beams(HISTORIES, NUM_ITEMS, NUM_ITEMS)
    for history, items, logps in zip(HISTORIES, found.items, found.logps, strict=True):
        assert items == slow_order(model, history)
        slow = item_logps(model, history)
        assert logps == pytest.approx([slow[item] for item in items], abs=1e-4)


@pytest.mark.parametrize("constrained", [True, False])
def test_both_add_the_heads_and_the_tokens_log_probability_of_each_item(model, constrained):
    model = change(model, constrained=constrained)
    found = model.by_both(HISTORIES, 3, num_pooled=5)
    head, tokens = model.by_head(HISTORIES, NUM_ITEMS), model.by_beams(HISTORIES, NUM_ITEMS, NUM_ITEMS)
    for row in range(len(HISTORIES)):
        by_tokens = dict(zip(tokens.items[row], tokens.logps[row], strict=True))
        pool = zip(head.items[row][:5], head.logps[row][:5], strict=True)
        both = {item: logp + by_tokens[item] for item, logp in pool}
        best = sorted(both, key=both.get, reverse=True)[:3]
        assert found.items[row] == best
        assert found.logps[row] == pytest.approx([both[item] for item in best], rel=1e-4)


def test_both_find_nothing_after_a_history_of_every_item(model):
    for others in ([], [np.array([5])]):  # a batch of its own, and beside another row
        found = model.by_both([np.arange(NUM_ITEMS), *others], 3)
        assert found.items[0] == found.logps[0] == [] and all(len(items) == 3 for items in found.items[1:])


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("item_text", ["semantic_id", "title"])
def test_log_probabilities_of_given_items_are_those_of_a_slow_loop(model, item_text, constrained):
    model = change(model, item_text=item_text, constrained=constrained)
    asked = [[7, 0, 11], [4], [8, 9]]
    found = [model.token_logps(HISTORIES, asked, batch_size) for batch_size in (1, 64)]
    scores = model.token_scores(HISTORIES, asked)
    for row, (history, items) in enumerate(zip(HISTORIES, asked, strict=True)):
        slow = item_logps(model, history)
        for of_batch in found:
            assert of_batch[row].tolist() == pytest.approx([slow[item] for item in items], abs=1e-4)
        for place, item in enumerate(items):
            better = num_better(model, history, item)
            assert scores[row][1][place, : len(better)].tolist() == better
            assert not scores[row][1][place, len(better) :].any()  # after its end
    lengths = {len(model.encoder.tokens[item]) for items in asked for item in items}
    assert (len(lengths) > 1) == (item_text == "title")


def test_a_saved_prefix_index_is_read_where_it_is_of_the_models_items(trained, tmp_path):
    folder = shutil.copytree(trained / "sft/model", tmp_path / "model")

    def is_read() -> bool:
        encoder = NextItemEncoder.load(folder)
        assert encoder.index.has(encoder.tokens)
        return isinstance(encoder.index.tokens, np.memmap)

    assert is_read()
    first_items(9).save(folder)
    assert not is_read()
    shutil.rmtree(folder / "prefix_index")  # as in an older folder, whose settings had another name, too
    for constrained in (True, False):
        settings = {"item_text": "semantic_id", "max_items": 5, "mask_first": constrained}
        (folder / "next_item.json").write_text(json.dumps(settings))
        assert not is_read() and NextItemEncoder.load(folder).constrained == constrained
    with pytest.raises(FileNotFoundError, match="vocabulary.npy does not exist; save a prefix index there first"):
        PrefixIndex.load(folder / "prefix_index")


def test_evaluation_writes_metrics_lists_and_pruning(trained, tmp_path):
    options = {"task": "next_item", "split": "valid", "num_beams": 3, "pruning": True, "num_bootstrap": 20}
    metrics = evaluate(EvaluateArguments(run_dir=str(trained), **options), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rows"]) == {"popularity", "transitions", "midtrained", "sft", "sft_head", "sft_both"}
    assert metrics["n"] == 30 and metrics["R@10"]["sft"] == results["rows"]["sft"]["all"]["R@10"]
    lines = pq.read_table(tmp_path / "lists.parquet").to_pylist()
    hits = [line["target"] in line["items"][:5] for line in lines if line["ranker"] == "sft"]
    assert results["rows"]["sft"]["all"]["R@5"] == pytest.approx(np.mean(hits))
    assert results["pruning"]["n"] == 30 and "Pruning, 30 rows, 3 beams" in (tmp_path / "results.md").read_text()
    ids = [line["row_id"] for line in lines if line["ranker"] == "sft"]
    assert pruning.Pruning.read(tmp_path / pruning.FILE, ids).summary() == results["pruning"]
    with pytest.raises(ValueError, match="pruning.parquet is of other rows than the lists beside it"):
        pruning.Pruning.read(tmp_path / pruning.FILE, ids[::-1])


def test_models_that_a_recipe_leaves_out_are_not_asked(trained):
    found = recall.find_lists(trained, "valid", {}, ["sft"], num_beams=4)
    assert [*found.lists] == ["popularity", "transitions", "sft", "sft_head", "sft_both"]
    assert [*recall.find_lists(trained, "valid", {}, ["midtrained"]).lists][2:] == ["midtrained"]


@pytest.mark.parametrize(("first_width", "batch_beams"), [(1, 64), (100, 8192)], ids=["widened", "wide at once"])
def test_pruning_equals_a_slow_search_for_the_target(trained, monkeypatch, caplog, first_width, batch_beams):
    monkeypatch.setattr(pruning, "FIRST_WIDTH", first_width)
    monkeypatch.setattr(pruning, "BATCH_BEAMS", batch_beams)
    model, beams = NextItemModel.load(trained / "sft/model"), 2
    with torch.no_grad():  # peaked at random, so that beams differ from an exact search
        model.model.get_output_embeddings().weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    rows = pq.read_table(trained / "data/rows.parquet", filters=[("split", "==", "valid")]).to_pylist()
    histories, targets = [np.array(row["history"]) for row in rows], np.array([row["target"] for row in rows])
    with patch.object(pruning, "most_probable", wraps=pruning.most_probable) as search:
        found = pruning.measure_pruning(model, histories, targets, beams)
    assert 0 < len(search.call_args_list[0].args[1]) < len(rows)  # some rows are settled without a wide search
    exact, by_beams = pruning.most_probable(model, histories, beams), model.by_beams(histories, beams, beams).items
    assert exact != by_beams
    for row, (history, target) in enumerate(zip(histories, targets, strict=True)):
        best = slow_order(model, history)[:beams]
        assert exact[row] == best and found.is_top[row] == (target in best)
        assert found.is_found[row] == (target in by_beams[row])
        assert found.violates[row].tolist() == [num >= beams for num in num_better(model, history, target)]
    assert not caplog.records  # no search with more beams than there are items
    assert 0 < found.is_top.sum() < len(rows)
    summary = found.summary()
    assert summary["pruning_rate"] == pytest.approx((found.is_top & ~found.is_found).sum() / found.is_top.sum())
    assert sum(summary["first_violations_by_step"]) == pytest.approx(summary["violation_rate"])


def item_logps(model, history):
    """Log-probability of every item after a history, one token at a time."""
    total = [0.0] * NUM_ITEMS
    for item in range(NUM_ITEMS):
        for scores, valid, token in steps(model, history, item):
            normal = torch.logsumexp(scores[valid] if model.encoder.constrained else scores, 0)
            total[item] += (scores[token] - normal).item()
    return total


def slow_order(model, history):
    """The items that the history does not hold, most probable first."""
    logps = item_logps(model, history)
    return [item for item in sorted(range(NUM_ITEMS), key=lambda j: -logps[j]) if item not in history]


def num_better(model, history, item):
    """At each token of an item, how many valid tokens are more probable."""
    taken = steps(model, history, item)
    return [sum(scores[other] > scores[token] for other in valid) for scores, valid, token in taken]


def steps(model, history, item):
    """At each token of an item: all scores, the valid tokens, the token."""
    prompt = model.encoder.next_item_prompt(history[1 - model.encoder.max_items :].tolist())
    for place, token in enumerate(model.encoder.tokens[item]):
        prefix = model.encoder.tokens[item][:place]
        with torch.no_grad():
            scores = model.model(torch.tensor([prompt + prefix])).logits[0, -1]
        longer = [tokens for tokens in model.encoder.tokens if tokens[:place] == prefix and len(tokens) > place]
        yield scores, sorted({tokens[place] for tokens in longer}), token


def test_a_summary_without_a_reachable_target_has_no_pruning_rate():
    none = np.zeros(3, dtype=bool)
    summary = pruning.Pruning(none, none, np.array([[False, True], [True, True], [False, False]])).summary()
    assert summary["pruning_rate"] is None and summary["violation_rate"] == pytest.approx(2 / 3)
    assert summary["violations_by_step"] == pytest.approx([1 / 3, 2 / 3])
    assert summary["first_violations_by_step"] == pytest.approx([1 / 3, 1 / 3])


def test_a_model_of_the_other_task_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="sft/model has no next_item.json; train it with task next_item"):
        refuse_ranker(run / "sft/model")
    with pytest.raises(ValueError, match="the model has no item head; train it with the loss cllm4rec"):
        NextItemModel.load_midtrained(run).by_head([np.array([1])], 2)


def test_metrics_of_sets_by_hand():
    lists = np.full((2, 100), -1)
    lists[0, :3], lists[1, [0, 1, 2, 25]] = [7, 8, 9], [1, 2, 3, 4]
    values = held_out_sets.metrics_of_sets(lists, [np.array([8]), np.array([1, 4, 5])])
    # the first user's one item is second: 1 / log2(3); the second finds two of three, at places 1 and 26
    assert values["R@20"].tolist() == pytest.approx([1, 1 / 3])
    assert values["R@40"].tolist() == pytest.approx([1, 2 / 3])
    ideal = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    assert values["N@100"].tolist() == pytest.approx([1 / np.log2(3), (1 + 1 / np.log2(27)) / ideal])
    values = held_out_sets.metrics_of_sets(np.arange(100)[None], [np.arange(30)])
    assert np.ravel([*values.values()]).tolist() == pytest.approx([1.0] * 3)  # R@20: 20 / min(20, 30)


def test_held_out_sets_are_ranked_from_training_items_alone(trained, tmp_path):
    found = held_out_sets.HeldOut.load(trained, "valid")
    table = pq.read_table(trained / "data/interactions.parquet").to_pandas()
    for user, history, targets in zip(found.users, found.histories, found.targets, strict=True):
        own = table[table["user"] == user]
        assert history.tolist() == own[own["split"].isin(["train", "rerank"])]["item"].tolist()
        assert targets.tolist() == own[own["split"] == "valid"]["item"].tolist()
    args = EvaluateArguments(run_dir=str(trained), task="held_out_sets", split="valid", num_bootstrap=20)
    metrics = evaluate(args, tmp_path)
    assert metrics["n"] == len(found.users) == 30
    assert set(metrics["rows"]) == {"popularity", "transitions", "sft_head"}
    lists = NextItemModel.load(trained / "sft/model").by_head(found.histories, 20).items
    hits = [len(set(items) & set(t.tolist())) / len(t) for items, t in zip(lists, found.targets, strict=True)]
    assert metrics["rows"]["sft_head"]["R@20"] == pytest.approx(np.mean(hits))
    text = (tmp_path / "results.md").read_text()
    assert "30 users, valid" in text and "of one training seed: another seed may lie outside." in text
    lines = pq.read_table(tmp_path / "lists.parquet").to_pandas()
    for name, of_ranker in lines.groupby("ranker"):  # the lists that were written have the same worth
        assert of_ranker["user"].tolist() == found.users.tolist()
        lists = recall.filled(of_ranker["items"].tolist(), held_out_sets.LIST_LENGTH)
        values = held_out_sets.metrics_of_sets(lists, of_ranker["targets"].tolist())
        assert values["N@100"].mean() == pytest.approx(metrics["rows"][name]["N@100"])
    slices = json.loads((tmp_path / "results.json").read_text())["slices"]
    lengths = np.array([len(history) for history in found.histories])
    short = lengths <= np.percentile(lengths, 25, method="lower")
    assert slices["of"]["short"]["rows"] == short.sum() > 0
    assert slices["rankers"]["sft_head"]["short"]["value"] == pytest.approx(np.mean(np.array(hits)[short]))
    assert "mean of the held-out items" in text
    assert len(held_out_sets.HeldOut.load(trained, "valid", max_users=5).users) == 5
