"""The sft stage on its task next_item: rows, losses however a step is cut, what is saved, and who reads it."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toy_run import CATALOGUE, NUM_ITEMS, toy_sequences, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig

from rerank import base_model, run_dir, sft
from rerank.candidates import training_sequences
from rerank.catalogue import Catalogue
from rerank.compare import held_out_sets_table
from rerank.evaluate import EvaluateArguments, full_catalogue, held_out_sets, pruning, refuse_ranker
from rerank.evaluate import main as evaluate
from rerank.item_head import ItemHead
from rerank.item_rows import ItemRows
from rerank.losses import cllm4rec as cllm4rec_file
from rerank.losses import iirg as iirg_file
from rerank.losses import load_losses
from rerank.next_items import NextItemModel
from rerank.sft import forward as forward_file
from rerank.sft.forward import add_loss_forward

IIRG = {"name": "iirg", "kwargs": {"num_neighbours": 2, "collaborative_weight": 0.5, "semantic_weight": 2.0}}
CLLM4REC = {"name": "cllm4rec", "kwargs": {"regularisation": 3.0}}
MASKED = {"name": "cllm4rec", "kwargs": {"mask_share": 0.3, "regularisation": 0.5}}
MIXES = {
    "nll": [{"name": "nll"}],
    "lml": [{"name": "lml"}],
    "msl": [{"name": "msl"}],
    "bear": [{"name": "bear", "kwargs": {"num_beams": 2}}],
    "iirg": [{"name": "nll"}, IIRG],
    "iirg by tokens": [{"name": "bear"}, {"name": "iirg", "kwargs": {**IIRG["kwargs"], "divide_by": "tokens"}}],
    "cllm4rec": [{"name": "nll"}, CLLM4REC],
    "masked": [{"name": "msl"}, MASKED],
    "all": [{"name": "bear"}, IIRG, CLLM4REC],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with finished data, ids and a mid-trained model; each user's last two items are held out."""
    run = write_run(tmp_path_factory.mktemp("next") / "run")
    interactions, rows = [], []
    for user, walk in toy_sequences().items():
        walk = list(dict.fromkeys(walk.tolist()))
        splits = ["train"] * (len(walk) - 3) + ["rerank", "valid", "test"]
        for place, (item, split) in enumerate(zip(walk, splits, strict=True)):
            interactions.append({"user": user, "item": item, "position": place, "split": split})
            if split != "train":
                rows.append(
                    {"row_id": len(rows), "user": user, "split": split, "history": walk[:place], "target": item}
                )
    pq.write_table(pa.Table.from_pylist(interactions), run / "data/interactions.parquet")
    pq.write_table(pa.Table.from_pylist(rows), run / "data/rows.parquet")
    angles = 2 * np.pi * np.arange(NUM_ITEMS) / NUM_ITEMS  # items lie on a circle
    np.save(run / "semantic_ids/embeddings.npy", np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    counts = {"items": NUM_ITEMS, "users": 30, "interactions": len(interactions)}
    run_dir.write_json(run / "data/metrics.json", {"midtrain_has_seen_rerank_targets": False, **counts})
    return run


def load(run):
    return base_model.load_pretrained(str(run / "midtrain/model"))


def make_rows(run, **options):
    _, tokenizer = load(run)
    settings = {"catalogue": CATALOGUE, "item_text": "semantic_id", "max_items": 5, "run": str(run), **options}
    return ItemRows(tokenizer=tokenizer, **settings)


def make_trainer(run, folder, specs, num_rows=None, change=None, **options):
    settings = {"per_device_train_batch_size": 8, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, **options}
    config = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, max_grad_norm=1e9, logging_steps=1, lr_scheduler_type="constant",
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=64, **settings,
    )  # fmt: skip
    losses = load_losses(specs, "next_item")
    model, tokenizer = load(run)
    if change is not None:
        change(model)
    maker = ItemRows(CATALOGUE, tokenizer, "semantic_id", 5, losses.masks_first, str(run), max_length=64)
    rows = {"next_item": maker.next_item_rows("all")}
    for extra in losses.extras.values():
        rows |= extra.rows(maker)
    rows = {task: of_task[: num_rows or len(of_task)] for task, of_task in rows.items()}
    return sft.make_trainer(config, ModelConfig(), model, tokenizer, rows, losses, maker=maker)


def test_a_row_of_a_window_has_its_items_nodes_and_first_tokens(run):
    rows = make_rows(run)
    row = rows.row("Next items:", [3, 4, 7], num_given=1)
    prompt = rows.prompt("Next items:")
    names = ["<s_a_0>", "<s_b_3>", "<s_a_1>", "<s_b_0>", "<s_a_1>", "<s_b_3>"]
    tokens = rows.tokenizer.convert_tokens_to_ids(names)
    assert row["input_ids"] == prompt + tokens
    assert row["labels"] == [-100] * (len(prompt) + 2) + tokens[2:]
    below = rows.index.find([tokens[2]])
    assert row["nodes"] == [-1] * (len(prompt) + 2) + [rows.index.root, below] * 2
    assert row["items"] == [-1] * (len(prompt) + 2) + [4, -1, 7, -1]


def test_labels_without_an_alternative_are_dropped_where_the_loss_masks_first(run):
    tokens = [CATALOGUE.semantic_ids[item] for item in (0, 4, 5)]
    few = Catalogue(["a", "b", "c"], tokens, ["", "", ""], ["", "", ""])
    rows = make_rows(run, catalogue=few, drops_forced=True)
    labels = rows.row("Next items:", [2, 0, 1], num_given=1)["labels"][-4:]
    first, _, third, fourth = (rows.tokens[0] + rows.tokens[1])[:1] + [0] + rows.tokens[1]
    assert labels == [first, -100, third, fourth]  # below <s_a_0> there is item 0 alone


def test_titles_are_lines_of_tokens_and_share_a_path_where_they_are_equal(run):
    titles = ["Same title", "Same  title", ""]
    titled = Catalogue(["m0", "m1", "m2"], CATALOGUE.semantic_ids[:3], titles, [""] * 3)
    rows = make_rows(run, catalogue=titled, item_text="title")
    assert rows.tokens[0] == rows.tokens[1]
    assert rows.tokenizer.decode(rows.tokens[2]) == "m2\n"
    assert rows.index.items_at(np.array([rows.index.find(rows.tokens[0])]))[1].tolist() == [0, 1]


def test_next_item_rows_know_training_interactions_only(run):
    rows = make_rows(run)
    held_out = pq.read_table(run / "data/rows.parquet").to_pylist()
    for user, window in zip(*rows.training_interactions(), strict=True):
        targets = [row["target"] for row in held_out if row["user"] == user and row["split"] in ("valid", "test")]
        assert window not in targets
    last = rows.next_item_rows("last")
    wanted = [row for row in held_out if row["split"] == "rerank"]
    assert [row["sequence"] for row in last] == [[*row["history"][-4:], row["target"]] for row in wanted]
    assert all(sum(label != -100 for label in row["labels"]) == 2 for row in last)
    windows = [row["sequence"] for row in rows.next_item_rows("all")]
    assert all(2 <= len(window) <= 5 for window in windows)
    assert {tuple(w) for w in windows} == {tuple(w.tolist()) for w in rows.windows()}


def test_a_target_that_is_not_in_the_catalogue_is_refused(run, tmp_path):
    few = Catalogue(*(column[:9] for column in vars(CATALOGUE).values()))
    message = r"rows.parquet, row \d+ of the split rerank: item \d+ is not in the catalogue of 9"
    with pytest.raises(ValueError, match=message):
        make_rows(run, catalogue=few).next_item_rows("last")
    message = r"interactions.parquet, user \d+: item \d+ is not in the catalogue of 9 items; run the data and"
    with pytest.raises(ValueError, match=message):
        make_rows(run, catalogue=few).next_item_rows("all")


def test_a_batch_of_unlike_lengths_trains_in_two_passes_as_in_one(run, tmp_path, monkeypatch):
    passes, original = [], forward_file.length_groups

    def counted(lengths):
        passes.append(len(original(lengths)))
        return original(lengths)

    monkeypatch.setattr(forward_file, "length_groups", counted)
    monkeypatch.setattr(forward_file, "LEAST_SAVED", 0.0)
    options = {"num_rows": 8, "per_device_train_batch_size": 24}
    two, one = (make_trainer(run, tmp_path / name, MIXES["iirg"], **options) for name in ("two", "one"))
    two.train()
    assert passes == [2]
    one.args.gradient_checkpointing, one.args.gradient_checkpointing_kwargs = True, {"use_reentrant": True}
    one.train()
    assert passes == [2]  # a layer that is computed again by reentry is not called twice
    for name in ("loss", "grad_norm"):
        assert two.state.log_history[0][name] == pytest.approx(one.state.log_history[0][name], rel=1e-4)


@pytest.mark.parametrize("name", MIXES)
def test_a_step_does_not_depend_on_how_its_batch_is_cut(run, tmp_path, name):
    whole, cut = (
        make_trainer(
            run, tmp_path / str(size), MIXES[name], num_rows=8, per_device_train_batch_size=size,
            gradient_accumulation_steps=24 // size,
        )
        for size in (24, 3)
    )  # fmt: skip
    before = {key: value.clone() for key, value in cut.model.named_parameters()}
    for trainer in (whole, cut):
        trainer.train()
    first, second = (trainer.state.log_history[0] for trainer in (whole, cut))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
    for (key, one), other in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), key
    assert all(not torch.equal(value, before[key]) for key, value in cut.model.named_parameters() if "own" not in key)
    terms = [key for key in first if key.startswith(("loss_item_head", "loss_mutual"))]
    assert [second[key] for key in terms] == pytest.approx([first[key] for key in terms], rel=1e-3)


def test_weights_of_iirg_are_those_of_the_tasks_means(run, tmp_path):
    trainer = make_trainer(run, tmp_path, MIXES["iirg"], num_rows=8, per_device_train_batch_size=24)
    trainer.train()
    logged = trainer.state.log_history[0]
    parts = {task: logged[f"loss_{task}"] for task in ("next_item", "collaborative", "semantic")}
    assert len(set(parts.values())) == 3
    wanted = parts["next_item"] + 0.5 * parts["collaborative"] + 2.0 * parts["semantic"]
    assert logged["loss"] == pytest.approx(wanted, rel=1e-4)


def test_the_content_weight_is_that_of_the_mean_of_texts(run, tmp_path):
    specs = [{"name": "nll"}, {"name": "cllm4rec", "kwargs": {"head_weight": 0, "content_weight": 0.25}}]
    trainer = make_trainer(run, tmp_path, specs, num_rows=8, per_device_train_batch_size=24)
    trainer.train()
    logged = trainer.state.log_history[0]
    wanted = logged["loss_next_item"] + 0.25 * logged["loss_content"] + logged["loss_mutual_regularisation"]
    assert logged["loss"] == pytest.approx(wanted, rel=1e-4)
    assert logged["loss_content"] != pytest.approx(logged["loss_next_item"])


def test_weights_by_tokens_are_divided_by_all_of_them(run, tmp_path):
    specs = [{"name": "nll"}, {"name": "iirg", "kwargs": {**IIRG["kwargs"], "divide_by": "tokens"}}]
    trainer = make_trainer(run, tmp_path, specs, num_rows=8, per_device_train_batch_size=24)
    trainer.train()
    logged, counts = trainer.state.log_history[0], trainer.step_counts
    weights = {"next_item": 1.0, "collaborative": 0.5, "semantic": 2.0}
    total = sum(weight * counts[task] * logged[f"loss_{task}"] for task, weight in weights.items())
    assert logged["loss"] == pytest.approx(total / sum(counts.values()), rel=1e-4)


def test_relation_rows_ask_for_the_neighbours_of_every_item(run):
    extra, rows = iirg_file.iirg(num_neighbours=3), make_rows(run)
    found = extra.rows(rows)
    assert set(found) == {"collaborative", "semantic"} and len(found["semantic"]) == NUM_ITEMS
    for item, row in enumerate(found["collaborative"]):
        assert row["sequence"][0] == item and row["num_given"] == 1 and len(set(row["sequence"])) == 4
    # on a circle the two beside an item are nearest
    assert set(found["semantic"][4]["sequence"][1:3]) == {3, 5}


def test_the_controls_replace_neighbours_or_add_as_many_tokens(run):
    rows = make_rows(run)
    mined, random, more = (
        iirg_file.iirg(num_neighbours=3, neighbours=kind).rows(rows) for kind in ("mined", "random", "next_item")
    )
    count = {name: sum(iirg_file._num_labels(r) for r in found.values()) for name, found in
             {"mined": mined, "random": random, "more": more}.items()}  # fmt: skip
    assert count["random"] == count["mined"]
    longest = max(iirg_file._num_labels([row]) for row in more["next_item"])
    assert count["mined"] <= count["more"] < count["mined"] + longest
    assert [row["sequence"] for row in random["semantic"]] != [row["sequence"] for row in mined["semantic"]]


def test_mining_that_leaves_an_item_without_neighbours_is_refused(run, tmp_path):
    rows = make_rows(run)
    lonely = np.array([0, 1, 2]), np.array([0, 1, 2])  # nobody took two items
    object.__setattr__(rows, "training_interactions", lambda: lonely)
    with pytest.raises(ValueError, match="12 of 12 items have no neighbour, the first is m0"):
        iirg_file.iirg(num_neighbours=1).rows(rows)


def test_the_regulariser_of_two_items_by_hand(run, tmp_path):
    trainer = make_trainer(run, tmp_path, [{"name": "nll"}, CLLM4REC])
    extra, maker = trainer.losses.extras["cllm4rec"], trainer.data_collator.maker
    embedding = trainer.model.get_input_embeddings()
    ids = maker.index.vocabulary.tolist()
    with torch.no_grad():  # the first table holds 1 everywhere, the second 3, but 4 for the last token
        embedding.weight[ids] = 1.0
        extra.module.content.fill_(3.0)
        extra.module.content[-1] = 4.0
    history = maker.row("Next items:", [0, 1], num_given=1) | {"task": 0}
    # item 11 ends in the last token of the catalogue
    text = maker.text_row("Describe:", 11, "drama") | {"task": trainer.tasks.index("content")}
    batch = trainer.data_collator([history | {"number": 0}, text | {"number": 1}])
    inputs = trainer._inputs(batch, trainer._counts(batch), torch.zeros(2, batch["input_ids"].shape[1], 32), None)
    assert inputs.counts["history_ids"] == 4 and inputs.counts["content_ids"] == 2
    # histories: 4 tokens at distance 2 in 32 columns, mean 4 * 32; content: one at 2, one at 3, mean (4 + 9) / 2 * 32
    value = extra.terms(without_head_targets(inputs), embedding)["mutual_regularisation"]
    assert value.item() == pytest.approx(3.0 / 2 * (4 * 32 + 6.5 * 32))
    embedding.weight.grad = None
    value.backward()
    # the first table is pulled by histories only: lambda * (1 - 3) / 4 for each occurrence of a token
    occurrences = sum(batch["input_ids"][0].tolist().count(token) for token in [ids[0]])
    assert embedding.weight.grad[ids[0], 0].item() == pytest.approx(3.0 * (1 - 3) * occurrences / 4)
    # the second by content only
    assert extra.module.content.grad[-1, 0].item() == pytest.approx(3.0 * (4 - 1) / 2)
    assert extra.module.content.grad[0, 0].item() == 0.0


def test_second_embeddings_are_scaled_as_the_model_scales_its_own(run, tmp_path):
    trainer = make_trainer(run, tmp_path, [{"name": "nll"}, CLLM4REC])
    extra, maker, embedding = (
        trainer.losses.extras["cllm4rec"],
        trainer.data_collator.maker,
        torch.nn.Embedding(999, 32),
    )
    text = maker.text_row("Describe:", 11, "drama") | {"task": trainer.tasks.index("content"), "number": 0}
    batch = trainer.data_collator([text])
    plain = extra.embed(embedding, batch)
    is_second = (plain != embedding(batch["input_ids"])).any(dim=2)
    assert is_second.sum() == 2  # the item's tokens
    embedding.embed_scale = 5.0  # as Gemma's
    scaled = extra.embed(embedding, batch)
    assert torch.allclose(scaled[is_second], 5 * plain[is_second])
    assert torch.equal(scaled[~is_second], plain[~is_second])


def freeze_embedding(model):
    model.get_input_embeddings().weight.requires_grad_(False)


def test_a_loss_beside_an_embedding_that_is_not_trained_says_so(run, tmp_path, caplog):
    make_trainer(run, tmp_path, [{"name": "nll"}, CLLM4REC], change=freeze_embedding)
    assert "beside the model's embedding, which is not trained" in caplog.text
    caplog.clear()
    make_trainer(run, tmp_path, [{"name": "nll"}, CLLM4REC])
    make_trainer(run, tmp_path, [{"name": "nll"}], change=freeze_embedding)  # nothing that would pull it
    assert "which is not trained" not in caplog.text


def without_head_targets(inputs):
    """The same inputs without a target for the item head, whose states here are zero."""
    counts = {**inputs.counts, "head_targets": 0}
    return dataclasses.replace(inputs, items=torch.full_like(inputs.items, -1), counts=counts)


def test_the_heads_loss_is_cross_entropy_over_all_items(run, tmp_path):
    specs = [{"name": "nll"}, {"name": "cllm4rec", "kwargs": {"regularisation": 0}}]
    trainer = make_trainer(run, tmp_path, specs, num_rows=4)
    extra, maker = trainer.losses.extras["cllm4rec"], trainer.data_collator.maker
    with torch.no_grad():
        extra.module.head.own.normal_()
    rows = [row for row in trainer.train_dataset]
    batch = trainer.data_collator(rows)
    weights = trainer.model.get_input_embeddings().weight
    with torch.no_grad():
        states = trainer.model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    total, count = 0.0, 0
    for row, line in enumerate(rows):
        for place, item in enumerate(line["items"]):
            if item >= 0:
                own = extra.module.head.own
                vectors = torch.stack([weights[maker.tokens[j]].mean(0) + own[j] for j in range(NUM_ITEMS)])
                total -= torch.log_softmax(vectors @ states[row, place - 1], 0)[item].item()
                count += 1
    inputs = trainer._inputs(batch, trainer._counts(batch), states, None)
    value = extra.terms(inputs, trainer.model.get_input_embeddings())["item_head"]
    assert inputs.counts["head_targets"] == count and value.item() == pytest.approx(total / count, rel=1e-5)


def test_a_masked_prompt_hides_a_share_and_is_drawn_anew_each_epoch(run, tmp_path):
    trainer = make_trainer(run, tmp_path, [{"name": "nll"}, {"name": "cllm4rec", "kwargs": {"mask_share": 0.4}}])
    task, collator = trainer.tasks.index("masked"), trainer.data_collator
    rows = [row for row in trainer.train_dataset if row["task"] == task][:6]
    first, again = collator(rows), collator(rows)
    collator.epoch[0] = 1
    other = collator(rows)
    assert torch.equal(first["input_ids"], again["input_ids"]) and torch.equal(first["targets"], again["targets"])
    assert first["targets"].tolist() != other["targets"].tolist()
    for place, row in enumerate(rows):
        hidden = {item for item in first["targets"][place].tolist() if item >= 0}
        assert len(hidden) == max(1, round(0.4 * len(row["sequence"]))) and hidden < set(row["sequence"])
        shown = set(row["sequence"]) - hidden
        text = collator.maker.tokenizer.decode(first["input_ids"][place])
        assert all(CATALOGUE.semantic_ids[item] in text for item in shown) or len(shown) > 5
        assert not any(CATALOGUE.semantic_ids[item] in text for item in hidden)


def test_all_items_can_be_the_target_of_a_masked_prompt(run):
    row = cllm4rec_file.masked_prompt([3, 1, 2], 0.3, "all", np.random.default_rng(0), make_rows(run))
    assert row["targets"] == [1, 2, 3]


def test_histories_are_shuffled_where_that_is_asked_for(run):
    rng, rows = np.random.default_rng(1), make_rows(run)
    extra = cllm4rec_file.cllm4rec(shuffle_history=True)
    whole = rows.row("Next items:", [0, 1, 2, 3, 4], num_given=1)
    drawn = [extra.redraw("next_item", whole, rng, rows)["sequence"] for _ in range(4)]
    assert all(sorted(items) == [0, 1, 2, 3, 4] for items in drawn) and len({tuple(items) for items in drawn}) > 1
    last = rows.row("Next items:", [0, 1, 2, 3, 4], num_given=4)
    assert all(extra.redraw("next_item", last, rng, rows)["sequence"][-1] == 4 for _ in range(4))
    assert extra.redraw("content", whole, rng, rows) is whole and not cllm4rec_file.cllm4rec().redraws


def test_a_row_of_one_item_and_a_target_is_not_shuffled(run):
    rows = make_rows(run)
    row = rows.row("Next items:", [0, 1], num_given=1)
    extra, rng = cllm4rec_file.cllm4rec(shuffle_history=True), np.random.default_rng(0)
    assert all(extra.redraw("next_item", row, rng, rows)["sequence"] == [0, 1] for _ in range(8))


def test_a_masked_prompt_shows_no_item_that_it_hides(run):
    maker = make_rows(run)
    for seed in range(8):
        row = cllm4rec_file.masked_prompt([3, 3, 3, 1, 2], 0.4, "held_out", np.random.default_rng(seed), maker)
        text = maker.tokenizer.decode(row["input_ids"])
        assert len(row["targets"]) == 1 and CATALOGUE.semantic_ids[row["targets"][0]] not in text


def test_training_resumes_with_the_losses_own_parameters(run, tmp_path):
    specs = [{"name": "nll"}, {"name": "cllm4rec", "kwargs": {"mask_share": 0.4}}]
    options = {"num_rows": 12, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = make_trainer(run, tmp_path / "whole", specs, max_steps=6, **options)
    whole.train()
    half = make_trainer(run, tmp_path / "half", specs, max_steps=3, **options)
    half.args.save_strategy, half.args.save_steps = "steps", 3
    half.train()
    rest = make_trainer(run, tmp_path / "half", specs, max_steps=6, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "half/checkpoint-3"))
    for (key, one), other in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), key


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The run with a model that the stage trained: bear, iirg and cllm4rec together."""
    folder = run_dir.partial_dir(run, "sft")
    args = sft.SftArguments(run_dir=str(run), task="next_item", losses=MIXES["all"], max_items=5)
    config = SFTConfig(
        output_dir=str(folder / "checkpoints"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        max_steps=80, learning_rate=5e-3, per_device_train_batch_size=16, gradient_checkpointing=False, max_length=64,
        logging_steps=20, save_strategy="no", seed=0,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    shutil.rmtree(run / "sft")
    metrics = sft.main(args, config, ModelConfig(), folder)
    folder.rename(run / "sft")
    run_dir.write_json(run / "sft/metrics.json", metrics)
    return run


def test_the_trained_folder_is_a_plain_model_with_settings_and_head(trained):
    folder = trained / "sft/model"
    assert json.loads((folder / "next_item.json").read_text()) == {
        "item_text": "semantic_id", "max_items": 5, "mask_first": True,
    }  # fmt: skip
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<s_a_0>") > 0
    assert (folder / "item_head.safetensors").is_file() and not (folder / "loss_parameters.pt").exists()
    assert "model of next items" in (folder / "README.md").read_text()
    history = json.loads((trained / "sft/log_history.json").read_text())
    first, last = history[0], [entry for entry in history if "loss" in entry][-1]
    assert {"loss_next_item", "loss_content", "loss_semantic", "loss_item_head"} <= set(first)
    assert last["loss_next_item"] < first["loss_next_item"] and last["loss_item_head"] < first["loss_item_head"]


def test_the_head_ranks_the_catalogue_as_scoring_every_item_does(trained):
    model = NextItemModel.load(trained / "sft/model")
    histories = [np.array([1, 2, 3]), np.array([5]), np.array([0, 1, 2, 3, 4, 5, 6])]
    found = model.by_head(histories, 4)
    head, weights = ItemHead.load(trained / "sft/model"), model.model.get_input_embeddings().weight
    for history, items, logps in zip(histories, found.items, found.logps, strict=True):
        prompt = torch.tensor([model.rows.next_item_prompt(history[-4:].tolist())])
        with torch.no_grad():
            state = model.model.base_model(prompt).last_hidden_state[0, -1]
            scores = [(weights[model.rows.tokens[j]].mean(0) + head.own[j]) @ state for j in range(NUM_ITEMS)]
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


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[1, 2], [1]], "ids of one length; set read_items: false"), ([[1, 2], [1, 2]], "two items have one id")],
)
def test_ids_that_cannot_be_told_apart_are_not_read(ids, message):
    with pytest.raises(ValueError, match=message):
        ItemHead(ids, 2, is_read=True)
    ItemHead(ids, 2)


def test_a_trained_model_reads_the_items_own_vectors(trained):
    model = NextItemModel.load(trained / "sft/model")
    prompt = torch.tensor([model.rows.next_item_prompt([3, 1])])
    end = len(model.rows.prompt("Next items:"))
    plain = torch.nn.functional.embedding(prompt, model.model.get_input_embeddings().weight)
    read = (model.model.get_input_embeddings()(prompt) - plain)[0].detach()
    num_tokens = len(model.rows.tokens[3])
    expected = torch.zeros_like(read)
    expected[end + num_tokens - 1], expected[end + 2 * num_tokens - 1] = model.head.own.detach()[[3, 1]]
    assert model.head.own.abs().sum() > 0 and torch.allclose(read, expected, atol=1e-6)


def test_beams_of_a_model_that_reads_items_find_every_item_in_its_order(trained):
    model = NextItemModel.load(trained / "sft/model")
    histories = [np.array([1, 2, 3]), np.array([5]), np.array([0, 1, 2, 3, 4, 5, 6])]
    found = model.by_beams(histories, NUM_ITEMS, NUM_ITEMS)
    for history, items, logps in zip(histories, found.items, found.logps, strict=True):
        slow = item_logps(model, history)
        order = [item for item in sorted(range(NUM_ITEMS), key=lambda j: -slow[j]) if item not in history]
        assert items == order and logps == pytest.approx([slow[item] for item in order], abs=1e-4)


def test_whether_items_are_read_is_an_option_and_not_for_titles(run, tmp_path):
    for name, kwargs, item_text, is_read in (
        ("on", {}, "semantic_id", True),
        ("off", {"read_items": False}, "semantic_id", False),
        ("titles", {}, "title", False),
    ):
        extra = cllm4rec_file.cllm4rec(regularisation=0, **kwargs)
        model, _ = load(run)
        rows = dataclasses.replace(make_rows(run), item_text=item_text)
        extra.parameters(model, rows)
        folder = tmp_path / name
        folder.mkdir()
        extra.save(folder)
        assert bool(ItemHead.load(folder).is_read) == is_read
        assert len(model.get_input_embeddings()._forward_hooks) == is_read


@pytest.mark.parametrize("mask_first", [True, False])
def test_both_add_the_heads_and_the_tokens_log_probability_of_each_item(trained, mask_first):
    model = dataclasses.replace(NextItemModel.load(trained / "sft/model"), mask_first=mask_first)
    histories = [np.array([1, 2, 3]), np.array([5]), np.array([0, 1, 2, 3, 4, 5, 6])]
    found = model.by_both(histories, 3, num_pooled=5)
    head, tokens = model.by_head(histories, NUM_ITEMS), model.by_beams(histories, NUM_ITEMS, NUM_ITEMS)
    for row in range(len(histories)):
        by_tokens = dict(zip(tokens.items[row], tokens.logps[row], strict=True))
        pool = zip(head.items[row][:5], head.logps[row][:5], strict=True)
        both = {item: logp + by_tokens[item] for item, logp in pool}
        best = sorted(both, key=both.get, reverse=True)[:3]
        assert found.items[row] == best
        assert found.logps[row] == pytest.approx([both[item] for item in best], rel=1e-4)


def test_both_find_nothing_after_a_history_of_every_item(trained):
    model = NextItemModel.load(trained / "sft/model")
    for others in ([], [np.array([5])]):  # a batch of its own, and beside another row
        found = model.by_both([np.arange(NUM_ITEMS), *others], 3)
        assert found.items[0] == found.logps[0] == [] and all(len(items) == 3 for items in found.items[1:])


@pytest.mark.parametrize("mask_first", [True, False])
@pytest.mark.parametrize("item_text", ["semantic_id", "title"])
def test_log_probabilities_of_given_items_are_those_of_an_exact_search(trained, item_text, mask_first):
    model = dataclasses.replace(NextItemModel.load(trained / "sft/model"), mask_first=mask_first)
    rows = dataclasses.replace(model.rows, item_text=item_text)  # titles are of unlike lengths
    model = dataclasses.replace(model, rows=rows)
    histories = [np.array([1, 2, 3]), np.array([5]), np.array([0, 1, 2, 3, 4, 5, 6])]
    asked = [[7, 0, 11], [4], [8, 9]]
    tokens = model.by_beams(histories, NUM_ITEMS, NUM_ITEMS)
    found = model.token_logps(model.prompts(histories), asked)
    for row, (items, logps) in enumerate(zip(asked, found, strict=True)):
        exact = dict(zip(tokens.items[row], tokens.logps[row], strict=True))
        assert logps.tolist() == pytest.approx([exact[item] for item in items], abs=1e-4)
    num_lengths = len({len(model.rows.tokens[item]) for items in asked for item in items})
    assert (num_lengths > 1) == (item_text == "title")


def test_evaluation_writes_metrics_lists_and_pruning(trained, tmp_path):
    args = EvaluateArguments(
        run_dir=str(trained), task="next_item", split="valid", num_beams=3, pruning=True, num_bootstrap=20
    )
    metrics = evaluate(args, tmp_path)
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
    found = full_catalogue.find_lists([trained], "valid", {}, num_beams=4, models=["sft"])
    assert [*found.lists] == ["popularity", "transitions", "sft", "sft_head", "sft_both"]
    assert [*full_catalogue.find_lists([trained], "valid", {}, models=["midtrained"]).lists][2:] == ["midtrained"]


@pytest.mark.parametrize(("first_width", "batch_beams"), [(1, 64), (100, 8192)], ids=["widened", "wide at once"])
def test_pruning_equals_a_slow_search_for_the_target(trained, monkeypatch, caplog, first_width, batch_beams):
    monkeypatch.setattr(pruning, "FIRST_WIDTH", first_width)
    monkeypatch.setattr(pruning, "BATCH_BEAMS", batch_beams)
    most_probable, searched = pruning.most_probable, []

    def counted(model, histories, num_items):
        searched.append(len(histories))
        return most_probable(model, histories, num_items)

    monkeypatch.setattr(pruning, "most_probable", counted)
    model, beams = NextItemModel.load(trained / "sft/model"), 2
    with torch.no_grad():  # peaked at random, so that beams differ from an exact search
        model.model.get_output_embeddings().weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    rows = pq.read_table(trained / "data/rows.parquet", filters=[("split", "==", "valid")]).to_pylist()
    histories, targets = [np.array(row["history"]) for row in rows], np.array([row["target"] for row in rows])
    found = pruning.measure_pruning(model, histories, targets, beams)
    assert 0 < searched[0] < len(rows)  # some rows are settled without a wide search
    exact, by_beams = most_probable(model, histories, beams), model.by_beams(histories, beams, beams).items
    assert exact != by_beams
    for row, (history, target) in enumerate(zip(histories, targets, strict=True)):
        logps = item_logps(model, history)
        order = [item for item in sorted(range(NUM_ITEMS), key=lambda j: -logps[j]) if item not in history]
        assert exact[row] == order[:beams] and found.is_top[row] == (target in order[:beams])
        assert found.is_found[row] == (target in by_beams[row])
        assert found.violates[row].tolist() == step_violations(model, history, target, beams)
    assert not caplog.records  # no search with more beams than there are items
    assert 0 < found.is_top.sum() < len(rows)
    summary = found.summary()
    assert summary["pruning_rate"] == pytest.approx((found.is_top & ~found.is_found).sum() / found.is_top.sum())
    assert sum(summary["first_violations_by_step"]) == pytest.approx(summary["violation_rate"])


def item_logps(model, history):
    """Log-probability of every item after a history, over legal tokens, one at a time."""
    total = []
    for item in range(NUM_ITEMS):
        logp = 0.0
        for scores, legal, token in steps(model, history, item):
            logp += (scores[token] - torch.logsumexp(scores[legal], 0)).item()
        total.append(logp)
    return total


def step_violations(model, history, target, beams):
    found = steps(model, history, target)
    return [sum(scores[other] > scores[token] for other in legal) >= beams for scores, legal, token in found]


def steps(model, history, item):
    """At each token of an item: all scores, the legal tokens, the token."""
    prompt = model.rows.next_item_prompt(history[-4:].tolist())
    for place, token in enumerate(model.rows.tokens[item]):
        prefix = model.rows.tokens[item][:place]
        with torch.no_grad():
            scores = model.model(torch.tensor([prompt + prefix])).logits[0, -1]
        legal = model.rows.index.children(np.array([model.rows.index.find(prefix)]))[1].tolist()
        yield scores, legal, token


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
    with pytest.raises(FileNotFoundError, match="has no next_item.json; give a model of the sft stage"):
        NextItemModel.load(run / "sft/model")
    with pytest.raises(ValueError, match="the model has no item head; train it with the loss cllm4rec"):
        NextItemModel.load_midtrained(run).by_head([np.array([1])], 2)


@pytest.mark.parametrize(("keys", "message"), [
    ({"task": "rank"}, "task is 'rank'; choose rerank or next_item"),
    ({"task": "next_item", "item_text": "name"}, "item_text is 'name'; choose semantic_id or title"),
    ({"task": "next_item", "targets": "first"}, "targets is 'first'; choose all or last"),
    ({"task": "next_item", "max_items": 1}, "max_items is 1 but must be at least 2"),
    ({"task": "next_item", "dropout": 1.0}, "dropout is 1.0 but must be at least 0 and below 1"),
    ({"task": "next_item", "no_trace_control": True}, "no_trace_control is for the task rerank"),
])  # fmt: skip
def test_bad_options_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        sft.SftArguments(run_dir="run", **keys)


def test_models_that_scale_their_logits_are_refused(run, tmp_path):
    model, _ = load(run)
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="the model's logit_scale is 0.5, but losses take logits as they are"):
        add_loss_forward(model)


def test_models_that_balance_experts_are_refused(run, tmp_path):
    def balance(model):
        model.config.output_router_logits = True  # what TRL reads
        model.config.router_aux_loss_coef = 0.001

    with pytest.raises(
        ValueError, match="losses leave out the load balancing of experts; set router_aux_loss_coef to 0"
    ):
        make_trainer(run, tmp_path, [{"name": "nll"}], change=balance)


def test_metrics_of_sets_by_hand():
    lists = np.full((2, 100), -1)
    lists[0, :3], lists[1, [0, 1, 2, 25]] = [7, 8, 9], [1, 2, 3, 4]
    values = held_out_sets.metrics_of_sets(lists, [np.array([8]), np.array([1, 4, 5])])
    # the first user's one item is second: 1 / log2(3); the second finds two of three, at places 1 and 26
    assert values["R@20"].tolist() == pytest.approx([1, 1 / 3]) and values["R@40"].tolist() == pytest.approx(
        [1, 2 / 3]
    )
    ideal = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    assert values["N@100"].tolist() == pytest.approx([1 / np.log2(3), (1 + 1 / np.log2(27)) / ideal])


def test_recall_of_many_targets_is_bounded_by_the_cut():
    lists = np.arange(100)[None]
    values = held_out_sets.metrics_of_sets(lists, [np.arange(30)])
    # 20 of the first 20 are among 30 targets: 20 / min(20, 30)
    assert [values[name].tolist() for name in ("R@20", "R@40", "N@100")] == [[1.0], [1.0], [pytest.approx(1.0)]]


def load_held_out(run, max_users=0):
    data_dir = run / "data"
    return held_out_sets.HeldOut.load(data_dir, training_sequences(data_dir), "valid", max_users)


def test_held_out_sets_are_ranked_from_training_items_alone(trained, tmp_path):
    found = load_held_out(trained)
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
    assert "30 users, valid" in (tmp_path / "results.md").read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/evaluate").symlink_to(tmp_path)
    held_out, values = held_out_sets_table.load(tmp_path / "run")
    assert held_out == [(user, items.tolist()) for user, items in zip(found.users, found.targets, strict=True)]
    for name, row in metrics["rows"].items():  # the lists that were written have the same worth
        assert values[name]["N@100"].mean() == pytest.approx(row["N@100"])
    assert len(load_held_out(trained, 5).users) == 5
