"""The sft stage on its task next_item: rows, and losses however a step is cut."""

from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from next_item_run import LOSSES, load, make_encoder, write_next_item_run
from tiny_model import sft_config
from toy_run import CATALOGUE, NUM_ITEMS, first_items
from trl import ModelConfig

from rerank import sft
from rerank.catalogue import Catalogue
from rerank.losses import cllm4rec as cllm4rec_file
from rerank.losses import iirg as iirg_file
from rerank.losses import load_losses
from rerank.next_item.encoder import NextItemEncoder
from rerank.next_item.item_head import ItemHead
from rerank.rows import by_user
from rerank.sft import forward as forward_file

_, IIRG, CLLM4REC = LOSSES
MASKED = {"name": "cllm4rec", "kwargs": {"mask_share": 0.3, "regularisation": 0.5}}
MIXES = {
    "nll": [{"name": "nll"}],
    "lml": [{"name": "lml"}],
    "msl": [{"name": "msl"}],
    "bear": [{"name": "bear", "kwargs": {"num_beams": 2}}],
    "iirg": [{"name": "nll"}, IIRG],
    "cllm4rec": [{"name": "nll"}, CLLM4REC],
    "masked": [{"name": "msl"}, MASKED],
    "all": LOSSES,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_next_item_run(tmp_path_factory.mktemp("next") / "run")


def make_trainer(run, folder, specs, num_rows=None, change=None, **options):
    settings = {"per_device_train_batch_size": 8, "max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    settings |= {"max_grad_norm": 1e9, "logging_steps": 1, "lr_scheduler_type": "constant", "max_length": 64}
    config = sft_config(folder, **{**settings, **options})
    losses = load_losses(specs, "next_item")
    model, tokenizer = load(run)
    if change is not None:
        change(model)
    encoder = NextItemEncoder(CATALOGUE, tokenizer, "semantic_id", 5, losses.constrained, str(run), max_length=64)
    rows = {"next_item": encoder.next_item_rows("all")}
    for extra in losses.auxiliary.values():
        rows |= extra.rows(encoder)
    rows = {task: of_task[: num_rows or len(of_task)] for task, of_task in rows.items()}
    return sft.make_trainer(config, ModelConfig(), model, tokenizer, rows, losses, encoder=encoder)


def test_a_row_of_a_window_has_its_items_nodes_and_first_tokens(run):
    rows = make_encoder(run)
    row = rows.row("Next items:", [3, 4, 7], num_given=1)
    prompt = rows.prompt("Next items:")
    names = ["<s_a_0>", "<s_b_3>", "<s_a_1>", "<s_b_0>", "<s_a_1>", "<s_b_3>"]
    tokens = rows.tokenizer.convert_tokens_to_ids(names)
    assert row["input_ids"] == prompt + tokens
    assert row["labels"] == [-100] * (len(prompt) + 2) + tokens[2:]
    below = rows.index.find([tokens[2]])
    assert row["nodes"] == [-1] * (len(prompt) + 2) + [rows.index.root, below] * 2
    assert row["items"] == [-1] * (len(prompt) + 2) + [4, -1, 7, -1]


def test_labels_without_an_alternative_are_dropped_where_the_loss_is_constrained(run):
    tokens = [CATALOGUE.semantic_ids[item] for item in (0, 4, 5)]
    few = Catalogue(["a", "b", "c"], tokens, ["", "", ""], ["", "", ""])
    rows = make_encoder(run, catalogue=few, constrained=True)
    labels = rows.row("Next items:", [2, 0, 1], num_given=1)["labels"][-4:]
    first, _, third, fourth = (rows.tokens[0] + rows.tokens[1])[:1] + [0] + rows.tokens[1]
    assert labels == [first, -100, third, fourth]  # below <s_a_0> there is item 0 alone


def test_titles_are_lines_of_tokens_and_share_a_path_where_they_are_equal(run):
    titles = ["Same title", "Same  title", ""]
    titled = Catalogue(["m0", "m1", "m2"], CATALOGUE.semantic_ids[:3], titles, [""] * 3)
    rows = make_encoder(run, catalogue=titled, item_text="title")
    assert rows.tokens[0] == rows.tokens[1]
    assert rows.tokenizer.decode(rows.tokens[2]) == "m2\n"
    _, places = rows.index.places_at(np.array([rows.index.find(rows.tokens[0])]))
    assert rows.index.items[places].tolist() == [0, 1]


def test_next_item_rows_know_training_interactions_only(run):
    rows = make_encoder(run)
    held_out = pq.read_table(run / "data/rows.parquet").to_pylist()
    for user, window in zip(*rows.training_interactions(), strict=True):
        targets = [row["target"] for row in held_out if row["user"] == user and row["split"] in ("valid", "test")]
        assert window not in targets
    last = rows.next_item_rows("last")
    wanted = [row for row in held_out if row["split"] == "rerank"]
    assert [row["sequence"] for row in last] == [[*row["history"][-4:], row["target"]] for row in wanted]
    assert all(sum(label != -100 for label in row["labels"]) == 2 for row in last)
    windows = [
        history[start : start + 5]
        for history in (items.tolist() for items in by_user(*rows.training_interactions()))
        for start in range(0, len(history), 2)  # half of five items on
        if start == 0 or len(history) - start > 2  # what is left is not all in the window before
    ]
    assert [row["sequence"] for row in rows.next_item_rows("all")] == [w for w in windows if len(w) > 1]


@pytest.mark.parametrize(("targets", "where"), [
    ("last", r"rows.parquet, row \d+ of the split rerank"), ("all", r"interactions.parquet, user \d+"),
])  # fmt: skip
def test_a_target_that_is_not_in_the_catalogue_is_refused(run, targets, where):
    few = first_items(9)
    with pytest.raises(ValueError, match=rf"{where}: item \d+ is not in the catalogue of 9 items; run the data and"):
        make_encoder(run, catalogue=few).next_item_rows(targets)


def test_a_batch_of_unlike_lengths_trains_in_two_passes_as_in_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(forward_file, "LEAST_SAVED", 0.0)
    options = {"num_rows": 8, "per_device_train_batch_size": 24}
    two, one = (make_trainer(run, tmp_path / name, MIXES["iirg"], **options) for name in ("two", "one"))
    one.args.gradient_checkpointing, one.args.gradient_checkpointing_kwargs = True, {"use_reentrant": True}
    with patch.object(forward_file, "length_groups", wraps=forward_file.length_groups) as cut:
        two.train()
        one.train()  # a layer that is computed again by reentry is not called twice
    assert [len(forward_file.length_groups(*call.args)) for call in cut.call_args_list] == [2]
    for name in ("loss", "grad_norm"):
        assert two.state.log_history[0][name] == pytest.approx(one.state.log_history[0][name], rel=1e-4)


@pytest.mark.parametrize("name", MIXES)
def test_a_step_does_not_depend_on_how_its_batch_is_cut(run, tmp_path, name):
    sizes = [{"per_device_train_batch_size": 24 // cuts, "gradient_accumulation_steps": cuts} for cuts in (1, 8)]
    whole, cut = (make_trainer(run, tmp_path, MIXES[name], num_rows=8, **size) for size in sizes)
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


@pytest.mark.parametrize(("loss", "weights", "terms"), [
    (IIRG, {"next_item": 1, "collaborative": 0.5, "semantic": 2.0}, ()),
    ({"name": "cllm4rec", "kwargs": {"content_weight": 0.25}}, {"next_item": 1, "content": 0.25},
     ("item_head", "mutual_regularisation")),
])  # fmt: skip
def test_weights_are_those_of_the_tasks_means(run, tmp_path, loss, weights, terms):
    trainer = make_trainer(run, tmp_path, [{"name": "nll"}, loss], num_rows=8, per_device_train_batch_size=24)
    trainer.train()
    logged = trainer.state.log_history[0]
    means = {logged[f"loss_{task}"]: weight for task, weight in weights.items()}
    assert len(means) == len(weights)  # all different
    wanted = sum(weight * mean for mean, weight in means.items()) + sum(logged[f"loss_{name}"] for name in terms)
    assert logged["loss"] == pytest.approx(wanted, rel=1e-4)


def test_relation_rows_ask_for_the_neighbours_of_every_item(run):
    extra, rows = iirg_file.iirg(), make_encoder(run)
    found = extra.rows(rows)
    assert set(found) == {"collaborative", "semantic"} and len(found["semantic"]) == NUM_ITEMS
    for item, row in enumerate(found["collaborative"]):
        assert row["sequence"][0] == item and row["num_given"] == 1 and len(set(row["sequence"])) == 6
    # on a circle the two beside an item are nearest
    assert set(found["semantic"][4]["sequence"][1:3]) == {3, 5}


def test_the_controls_replace_neighbours_or_add_as_many_tokens(run):
    rows = make_encoder(run)
    mined, random, more = (iirg_file.iirg(neighbours=kind).rows(rows) for kind in ("mined", "random", "next_item"))
    wanted, same, more_labels = (sum(map(iirg_file._num_labels, found.values())) for found in (mined, random, more))
    longest = max(iirg_file._num_labels([row]) for row in more["next_item"])
    assert same == wanted <= more_labels < wanted + longest
    assert [row["sequence"] for row in random["semantic"]] != [row["sequence"] for row in mined["semantic"]]


def test_mining_that_leaves_an_item_without_neighbours_is_refused(run, tmp_path):
    rows = make_encoder(run)
    lonely = np.array([0, 1, 2]), np.array([0, 1, 2])  # nobody took two items
    object.__setattr__(rows, "training_interactions", lambda: lonely)
    with pytest.raises(ValueError, match="12 of 12 items have no neighbour, the first is m0"):
        iirg_file.iirg().rows(rows)


def test_the_regulariser_of_two_items_by_hand(run, tmp_path):
    trainer = make_trainer(run, tmp_path, [{"name": "nll"}, CLLM4REC])
    extra, encoder = trainer.losses.auxiliary["cllm4rec"], trainer.data_collator.encoder
    embedding = trainer.model.get_input_embeddings()
    ids = encoder.index.vocabulary.tolist()
    with torch.no_grad():  # the first table holds 1 everywhere, the second 3, but 4 for the last token
        embedding.weight[ids] = 1.0
        extra.module.content.fill_(3.0)
        extra.module.content[-1] = 4.0
    history = encoder.row("Next items:", [0, 1], num_given=1) | {"task": 0}
    # item 11 ends in the last token of the catalogue
    text = encoder.text_row("Describe:", 11, "drama") | {"task": trainer.tasks.index("content")}
    batch = trainer.data_collator([history | {"number": 0}, text | {"number": 1}])
    inputs = trainer._inputs(batch, trainer._counts(batch), torch.zeros(2, batch["input_ids"].shape[1], 32), None)
    assert inputs.counts["history_ids"] == 4 and inputs.counts["content_ids"] == 2
    # histories: 4 tokens at distance 2 in 32 columns, mean 4 * 32; content: one at 2, one at 3, mean (4 + 9) / 2 * 32
    value = extra.terms(inputs, embedding)["mutual_regularisation"]
    assert value.item() == pytest.approx(3.0 / 2 * (4 * 32 + 6.5 * 32))
    embedding.weight.grad = None
    value.backward()
    # the first table is pulled by histories only: lambda * (1 - 3) / 4 for each occurrence of a token
    occurrences = batch["input_ids"][0].tolist().count(ids[0])
    assert embedding.weight.grad[ids[0], 0].item() == pytest.approx(3.0 * (1 - 3) * occurrences / 4)
    # the second by content only
    assert extra.module.content.grad[-1, 0].item() == pytest.approx(3.0 * (4 - 1) / 2)
    assert extra.module.content.grad[0, 0].item() == 0.0


def test_second_embeddings_are_scaled_as_the_model_scales_its_own(run, tmp_path):
    trainer = make_trainer(run, tmp_path, MIXES["cllm4rec"])
    extra, embedding = trainer.losses.auxiliary["cllm4rec"], torch.nn.Embedding(999, 32)
    text = trainer.data_collator.encoder.text_row("Describe:", 11, "drama")
    batch = trainer.data_collator([text | {"task": trainer.tasks.index("content"), "number": 0}])
    plain = extra.embed(embedding, batch)
    is_second = (plain != embedding(batch["input_ids"])).any(dim=2)
    assert is_second.sum() == 2  # the item's tokens
    embedding.embed_scale = 5.0  # as Gemma's
    scaled = extra.embed(embedding, batch)
    assert torch.allclose(scaled[is_second], 5 * plain[is_second])
    assert torch.equal(scaled[~is_second], plain[~is_second])


def test_a_loss_beside_an_embedding_that_is_not_trained_says_so(run, tmp_path, caplog):
    def freeze(model):
        model.get_input_embeddings().weight.requires_grad_(False)

    make_trainer(run, tmp_path, [{"name": "nll"}, CLLM4REC], change=freeze)
    assert "beside the model's embedding, which is not trained" in caplog.text
    caplog.clear()
    make_trainer(run, tmp_path, [{"name": "nll"}, CLLM4REC])
    make_trainer(run, tmp_path, [{"name": "nll"}], change=freeze)  # nothing that would pull it
    assert "which is not trained" not in caplog.text


def test_the_heads_loss_is_cross_entropy_over_all_items(run, tmp_path):
    specs = [{"name": "nll"}, {"name": "cllm4rec", "kwargs": {"regularisation": 0}}]
    trainer = make_trainer(run, tmp_path, specs, num_rows=4)
    extra, encoder = trainer.losses.auxiliary["cllm4rec"], trainer.data_collator.encoder
    with torch.no_grad():
        extra.module.head.own.normal_()
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    weights = trainer.model.get_input_embeddings().weight
    with torch.no_grad():
        states = trainer.model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    own = extra.module.head.own
    targets = [(row, place, item) for row, line in enumerate(rows) for place, item in enumerate(line["items"])]
    vectors = torch.stack([weights[encoder.tokens[j]].mean(0) + own[j] for j in range(NUM_ITEMS)])
    losses = [-(vectors @ states[row, place - 1]).log_softmax(0)[item] for row, place, item in targets if item >= 0]
    inputs = trainer._inputs(batch, trainer._counts(batch), states, None)
    value = extra.terms(inputs, trainer.model.get_input_embeddings())["item_head"]
    assert inputs.counts["head_targets"] == len(losses)
    assert value.item() == pytest.approx(sum(losses).item() / len(losses), rel=1e-5)


def test_the_head_learns_next_item_rows_alone_where_iirg_adds_rows_of_relations(run, tmp_path):
    specs = [{"name": "nll"}, {"name": "cllm4rec", "kwargs": {"regularisation": 0}}]
    alone, beside = (
        make_trainer(run, tmp_path / "alone", specs),
        make_trainer(run, tmp_path / "beside", [*specs, IIRG]),
    )
    values = []
    for trainer in (alone, beside):
        batch = trainer.data_collator(list(trainer.train_dataset))
        state = torch.randn(
            32, generator=torch.Generator().manual_seed(0)
        )  # so that the loss depends on targets alone
        hidden = state.expand(*batch["input_ids"].shape, 32)
        is_next = batch["task"] == trainer.tasks.index("next_item")
        inputs = trainer._inputs(batch, trainer._counts(batch), hidden, None)
        assert inputs.counts["head_targets"] == int((batch["items"][is_next] >= 0).sum())
        extra = trainer.losses.auxiliary["cllm4rec"]
        values.append(extra.terms(inputs, trainer.model.get_input_embeddings())["item_head"].item())
    assert len(beside.train_dataset) > len(alone.train_dataset)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_masked_prompt_hides_a_share_and_is_drawn_anew_each_epoch(run, tmp_path):
    trainer = make_trainer(run, tmp_path, [{"name": "nll"}, {"name": "cllm4rec", "kwargs": {"mask_share": 0.4}}])
    task, collator = trainer.tasks.index("masked"), trainer.data_collator
    rows = [row | {"sequence": row["sequence"] * 2} for row in trainer.train_dataset if row["task"] == task][:6]
    first, again = collator(rows), collator(rows)
    collator.epoch[0] = 1
    other = collator(rows)
    assert torch.equal(first["input_ids"], again["input_ids"]) and torch.equal(first["targets"], again["targets"])
    assert first["targets"].tolist() != other["targets"].tolist()
    for place, row in enumerate(rows):
        hidden, items = set(first["targets"][place].tolist()) - {-1}, set(row["sequence"])  # each twice
        assert len(hidden) == max(1, round(0.4 * len(items))) and hidden < items
        text = collator.encoder.tokenizer.decode(first["input_ids"][place])
        read = {item for item, semantic_id in enumerate(CATALOGUE.semantic_ids) if semantic_id in text}
        assert read <= items - hidden and len(read) == min(5, len(items - hidden))  # a prompt has five items


def test_histories_are_shuffled_where_that_is_asked_for(run):
    rng, rows = np.random.default_rng(1), make_encoder(run)
    extra = cllm4rec_file.cllm4rec(shuffle_history=True)
    whole, last = (rows.row("Next items:", [0, 1, 2, 3, 4], num_given) for num_given in (1, 4))
    two = rows.row("Next items:", [0, 1], num_given=1)  # the second may be the one to be found
    drawn = [[extra.redraw("next_item", row, rng, rows)["sequence"] for _ in range(8)] for row in (whole, last, two)]
    assert all(sorted(items) == [0, 1, 2, 3, 4] for items in drawn[0]) and len(set(map(tuple, drawn[0]))) > 1
    assert {items[-1] for items in drawn[1]} == {4} and drawn[2] == [[0, 1]] * 8
    assert extra.redraw("content", whole, rng, rows) is whole and not cllm4rec_file.cllm4rec().redraws


def test_training_resumes_with_the_losses_own_parameters(run, tmp_path):
    specs = [{"name": "nll"}, {"name": "cllm4rec", "kwargs": {"mask_share": 0.4}}]
    options = {"num_rows": 12, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = make_trainer(run, tmp_path / "whole", specs, max_steps=6, **options)
    whole.train()
    half = make_trainer(run, tmp_path / "half", specs, max_steps=3, save_strategy="steps", save_steps=3, **options)
    half.train()
    rest = make_trainer(run, tmp_path / "half", specs, max_steps=6, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "half/checkpoint-3"))
    for (key, one), other in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), key


def test_items_are_read_where_they_are_written_as_semantic_ids(run, tmp_path):
    for item_text, is_read in (("semantic_id", True), ("title", False)):
        extra = cllm4rec_file.cllm4rec(regularisation=0)
        model, _ = load(run)
        extra.parameters(model, make_encoder(run, item_text=item_text))
        folder = tmp_path / item_text
        folder.mkdir()
        extra.save(folder)
        assert bool(ItemHead.load(folder).is_read) == is_read
        assert len(model.get_input_embeddings()._forward_hooks) == is_read


@pytest.mark.parametrize(("keys", "message"), [
    ({"task": "rank"}, "task is 'rank' but must be one of rerank, next_item"),
    ({"task": "next_item", "item_text": "name"}, "item_text is 'name' but must be one of semantic_id, title"),
    ({"task": "next_item", "targets": "first"}, "targets is 'first' but must be one of all, last"),
    ({"task": "next_item", "max_items": 1}, "max_items is 1 but must be at least 2"),
    ({"task": "next_item", "dropout": 1.0}, "dropout is 1.0 but must be at least 0 and below 1"),
    ({"task": "next_item", "no_trace_control": True}, "no_trace_control is for the task rerank"),
])  # fmt: skip
def test_bad_options_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        sft.SftArguments(run_dir="run", **keys)


@pytest.mark.parametrize(("settings", "message"), [
    ({"logit_scale": 0.5}, "the model's logit_scale is 0.5, but losses take logits as they are"),
    ({"output_router_logits": True, "router_aux_loss_coef": 0.001},  # the first is what TRL reads
     "losses leave out the load balancing of experts; set router_aux_loss_coef to 0"),
])  # fmt: skip
def test_models_that_scale_logits_or_balance_experts_are_refused(run, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(run, tmp_path, [{"name": "nll"}], change=lambda model: model.config.update(settings))
