"""New items of a trained model, for one call or for good, and newer counts: what is kept and what is refused."""

import json
import os
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from toy_recipe import refusal, run_command
from toy_run import CATALOGUE, LINE_TOKENIZER, NUM_ITEMS, SETTINGS, first_items, toy_sequences, write_run

from rerank.baselines import Counts, ItemFacts, feature_rows
from rerank.catalogue import Catalogue
from rerank.launch import run_dir
from rerank.launch.files import write_json
from rerank.launch.named_files import NamedFile, record
from rerank.models.ranker import RankingModel
from rerank.models.saving import ID_TOKENIZER, SOURCES_FILE, ItemSources, save_item_sources
from rerank.next_item.item_head import ItemHead
from rerank.next_item.model import NextItemModel
from rerank.rank.items import with_new_items
from rerank.rank.tables import read_items

READING = {"item_columns": {"item": "id", "title": "name", "category": "category"}, "text_columns": None}
READING |= {"category_separator": None}
NEW = [{"id": "n0", "name": "Title 3", "category": "drama"}, {"id": "n1", "name": "Up", "category": "comedy"}]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A run, whose models show texts and counts."""
    return write_run(tmp_path_factory.mktemp("new") / "run")


@pytest.fixture
def model(toy, tmp_path):
    """A model that ranks by numbers and reads no ids, so that new items need no embeddings."""
    folder = shutil.copytree(toy / "sft/model", tmp_path / "model")
    names = ["direct_last", "popularity", "same_brand", "item_price"]
    shown = {"item_fields": ["title", "category"], "ranking": "number", "evidence": "words"}
    replace(SETTINGS, **shown, evidence_names=names).save(folder)
    brands = ["b"] * 6 + ["c"] * (NUM_ITEMS - 6)
    replace(CATALOGUE, fields={"brand": brands}).save(folder, ["brand"])
    categories = ["drama, war"] * NUM_ITEMS
    price = {"item_price": np.arange(NUM_ITEMS, dtype=float)}
    facts = ItemFacts.of(NUM_ITEMS, np.eye(NUM_ITEMS), categories, CATALOGUE.titles, brands, price)
    Counts.fit(toy_sequences(), NUM_ITEMS, facts, until=86_400.0).save(folder / "evidence.npz")
    write_json(folder / "features.json", {"names": names, "edges": {}})
    write_json(folder / SOURCES_FILE, asdict(ItemSources(READING, None, NUM_ITEMS)))
    return folder


def write_items(folder, rows=NEW):
    path = folder / "new.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_interactions(folder, lines):
    (folder / "interactions.csv").write_text("\n".join(["user,item,time", *lines]) + "\n")
    return folder / "interactions.csv"


# --- a catalogue and counts with more items


def test_facts_of_known_items_are_the_same_beside_new_ones_whose_counts_are_zero(model, tmp_path):
    before = RankingModel.load(model)
    old = before.load_counts()
    path = write_items(tmp_path, [{**NEW[0], "brand": "b", "price": "2.5"}, {**NEW[1], "brand": "", "price": None}])
    sources = json.loads((model / SOURCES_FILE).read_text())
    sources["reading"]["item_columns"] |= {"brand": "brand", "price": "price"}
    write_json(model / SOURCES_FILE, sources)
    after, counts = with_new_items(before, old, path, None)
    catalogue = after.prompter.catalogue
    assert catalogue.item_ids[NUM_ITEMS:] == ["n0", "n1"] and catalogue.titles[-2:] == ["Title 3", "Up"]
    assert catalogue.fields["brand"][-2:] == ["b", ""] and catalogue.semantic_ids[-2:] == ["", ""]
    histories, lists = [np.array([0, 1, 5])], np.array([[2, 3, 7]])
    rows = [feature_rows(one, histories, lists, np.zeros((1, 3)), None) for one in (old, counts)]
    assert np.array_equal(*rows)
    assert np.array_equal(counts.facts.embeddings[:NUM_ITEMS], old.facts.embeddings)
    assert counts.popularity[NUM_ITEMS:].tolist() == [0, 0] and counts.until == 86_400.0
    assert counts.facts.numbers["item_price"][-2] == 2.5 and np.isnan(counts.facts.numbers["item_price"][-1])
    assert counts.facts.brands[NUM_ITEMS] == counts.facts.brands[5] != counts.facts.brands[7]
    new = feature_rows(counts, [np.array([3])], np.array([[NUM_ITEMS, 4]]), np.zeros((1, 2)), None)[0]
    assert new[0].any() and np.isfinite(new).all()  # its title and brand are those of item 3


def test_facts_that_are_extended_again_are_those_of_a_whole_catalogue():
    titles, categories, brands = ["Up", "Up high", "a B"], ["x, y", "y", ""], ["p", "", "q"]
    facts = ItemFacts.of(3, None, categories, titles, brands)
    for more in ([("b up", "z", "q")], [("", "", ""), ("high C", "x", "r"), ("c", "w", "r")], [("b up", "z", "q")]):
        texts = [old + [one[place] for one in more] for place, old in enumerate((titles, categories, brands))]
        grown = facts.extended(texts[1], texts[0], texts[2])
        whole = ItemFacts.of(len(texts[0]), None, texts[1], texts[0], texts[2])
        for name in ("categories", "words"):
            one, other = getattr(grown, name), getattr(whole, name)
            assert np.array_equal((one @ one.T).toarray(), (other @ other.T).toarray())
        same = [one.brands[:, None] == one.brands for one in (grown, whole)]
        assert np.array_equal(*same) and np.array_equal(grown.brands == -1, whole.brands == -1)


def test_add_items_appends_for_good_and_the_old_folder_undoes_it(model, tmp_path, monkeypatch):
    weights = (model / "model.safetensors").read_bytes()
    printed = run_command("add-items", model, "--items", write_items(tmp_path))
    assert printed == f"{model}: 14 items, 2 of them new\n"
    assert Catalogue.load(model).item_ids == [*CATALOGUE.item_ids, "n0", "n1"]
    assert RankingModel.load(model).load_counts().num_items == 14
    assert (model / "model.safetensors").read_bytes() == weights
    old = tmp_path / "model.old"
    assert Catalogue.load(old).item_ids == CATALOGUE.item_ids
    assert not list(tmp_path.glob("*.partial*"))
    assert not (model / "model.safetensors").samefile(old / "model.safetensors")  # written in place, one stays
    shutil.rmtree(model)
    old.rename(model)  # undone

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Counts, "save", stop)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AssertionError):  # exit code 130
        run_command("add-items", model, "--items", write_items(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before and len(Catalogue.load(model)) == NUM_ITEMS


def test_two_updates_of_a_folder_do_not_overlap(model, tmp_path, monkeypatch, capfd):
    save, errors = Counts.save, []
    refresh = ("refresh", model, "--interactions", write_interactions(tmp_path, ["u1,m0,100"]))

    def overlap(counts, path):
        errors.append(refusal(capfd, *refresh))
        save(counts, path)

    with monkeypatch.context() as patch:
        patch.setattr(Counts, "save", overlap)
        run_command("add-items", model, "--items", write_items(tmp_path))
    assert f"model.lock is in use by process {os.getpid()}; wait for it" in errors[0] and len(errors) == 1
    run_command(*refresh)
    assert len(Catalogue.load(model)) == 14 and not (tmp_path / "model.lock").exists()


def test_an_update_that_was_cut_off_is_put_back_by_the_next_one_with_a_warning(model, tmp_path, capfd, caplog):
    old = model.rename(tmp_path / "model.old")
    (tmp_path / "rows.jsonl").write_text('{"history": [], "candidates": ["m0", "m1"]}')
    words = ("rank", model, "--rows", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl")
    assert f"rename it back: mv {old} {model}" in refusal(capfd, *words) and not model.exists()
    run_command("add-items", model, "--items", write_items(tmp_path))
    assert f"{model} was missing; {old} is renamed back to it" in caplog.text
    assert len(Catalogue.load(model)) == 14 and len(Catalogue.load(old)) == NUM_ITEMS


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*NEW, {"id": "m3", "name": "again"}],
            "new.jsonl: item 'm3' is in the catalogue of .* already; remove the row",
        ),
        ([NEW[0], NEW[0]], "new.jsonl line 2: item 'n0' repeats .* line 1; keep one row per item"),
        ([{"id": "n0", "category": "drama"}], "new.jsonl: no item has a title, which the model's prompts show; add"),
        ([{"name": "Up"}], "new.jsonl has no column 'id', of ids; rename"),
    ],
)
def test_new_items_that_a_model_cannot_take_are_refused_in_one_line(model, tmp_path, capfd, rows, message):
    path = write_items(tmp_path, rows)
    assert re.search(message, refusal(capfd, "add-items", model, "--items", path))
    (tmp_path / "rows.jsonl").write_text('{"history": [], "candidates": ["n0", "m1"]}')
    words = ("rank", model, "--rows", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl", "--items", path)
    assert re.search(message, refusal(capfd, *words)) and not (tmp_path / "out.jsonl").exists()


def test_embeddings_come_from_the_encoder_of_the_run_or_a_file(model, tmp_path, capfd):
    replace(SETTINGS, evidence="none").save(model)  # which shows ids
    CATALOGUE.save(model)
    LINE_TOKENIZER.save(model / ID_TOKENIZER)
    Counts.fit(toy_sequences(), NUM_ITEMS, ItemFacts.of(NUM_ITEMS, np.ones((NUM_ITEMS, 1)))).save(
        model / "evidence.npz"
    )
    words = ("add-items", model, "--items", write_items(tmp_path))
    assert "have given embeddings; give those of" in refusal(capfd, *words)
    np.save(tmp_path / "new.npy", np.ones((2, 3), dtype=np.float32))
    given = (*words, "--embeddings", tmp_path / "new.npy")
    assert "columns; use the encoder it was fitted with" in refusal(capfd, *given)
    np.save(tmp_path / "new.npy", np.ones((2, 1), dtype=np.float32))
    error = refusal(capfd, *given)  # the toy's twelve ids are all that its model knows
    assert "lacks <s_a_3>; run the stages from midtrain on again" in error
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "modules.json").write_text("[]")
    (made,) = record([NamedFile("encoder", str(encoder))])
    write_json(model / SOURCES_FILE, asdict(ItemSources(READING, made, NUM_ITEMS)))
    (encoder / "modules.json").write_text("[1]")
    assert "made with another content of encoder" in refusal(capfd, *words)
    shutil.rmtree(encoder)
    assert f"encoder {encoder} is not there" in refusal(capfd, *words)
    (model / SOURCES_FILE).unlink()
    assert "items.json is missing, so the model cannot take new items" in refusal(capfd, *words)


def test_a_model_of_next_items_finds_new_ones_and_scores_the_others_as_before(toy, tmp_path, caplog):
    folder, out = tmp_path / "next", tmp_path / "out"
    shutil.copytree(toy / "midtrain/model", folder)
    first_items(8).save(folder)
    write_json(folder / "next_item.json", {"item_text": "semantic_id", "max_items": 4, "constrained": True})
    save_item_sources(toy, folder, 8)
    plain = NextItemModel.load(folder)
    head = ItemHead(plain.encoder.tokens, 32)
    torch.nn.init.normal_(head.own)
    head.save(folder)
    np.save(tmp_path / "new.npy", np.ones((2, 1), dtype=np.float32))
    words = ("--items", write_items(tmp_path, [{"item": "n0"}, {"item": "n1"}]), "--embeddings", tmp_path / "new.npy")
    run_command("add-items", folder, *words, "--out", out)
    before, after = NextItemModel.load(folder), NextItemModel.load(out)
    assert after.encoder.catalogue.semantic_ids[8:] == ["<s_a_2><s_b_0>", "<s_a_2><s_b_1>"]
    assert "ids of 2 new items: 100% under a first-level prefix that no item of training has" in caplog.text
    assert sorted(after.by_beams([[0, 1]], 10, 10).items[0]) == list(range(2, 10))
    scores = [one.by_head([[0, 1]], 8) for one in (before, after)]
    known = [(item, logp) for item, logp in zip(scores[1].items[0], scores[1].logps[0], strict=True) if item < 8]
    gaps = {item: logp - scores[0].logps[0][scores[0].items[0].index(item)] for item, logp in known}
    assert len(known) == 6 and np.ptp(list(gaps.values())) < 1e-5  # but for the total over two items more


# --- newer counts


def test_refresh_counts_a_file_anew_and_leaves_edges_and_facts(model, tmp_path, caplog):
    lines = ["u1,m0,100", "u1,m1,200", "u2,m1,300", "u1,zz,400"]  # of an unknown item
    old, edges = RankingModel.load(model).load_counts(), (model / "features.json").read_bytes()
    printed = run_command("refresh", model, "--interactions", write_interactions(tmp_path, lines))
    assert printed == f"{model}: counts of 3 interactions, the latest of 1970-01-01\n"
    assert "1 of 4 interactions are of items that the model does not know" in caplog.text
    assert "3 interactions of known items but the counts of before rest on 240" in caplog.text
    counts = RankingModel.load(model).load_counts()
    wanted = Counts.fit({0: np.array([0, 1]), 1: np.array([1])}, NUM_ITEMS)
    assert (counts.transitions != wanted.transitions).nnz == 0 and counts.popularity.tolist()[:3] == [1, 2, 0]
    assert counts.until == 300.0 and (model / "features.json").read_bytes() == edges
    assert np.array_equal(counts.facts.embeddings, old.facts.embeddings)
    assert RankingModel.load(tmp_path / "model.old").load_counts().popularity.sum() == old.popularity.sum()


RECIPE = {"columns": {"user": "u", "item": "i", "time": "t", "split": "s"}, "where": "r >= 3", "dedupe": "first"}
RECIPE |= {"csv": {"separator": "::", "header": ["u", "i", "r", "t"]}, "format": "csv", "on_bad_rows": "drop"}
LOG = [("u1", "m0", 5, 100), ("u1", "m1", 2, 200), ("u1", "m0", 4, 300), ("u2", "m2", 3, 400)]
JSON_LOG = "\n".join(json.dumps(dict(zip("uirt", row, strict=True))) for row in LOG)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("log.dat", "\n".join("::".join(map(str, row)) for row in [*LOG, ("u3", "m3", 5, "noon")]), ()),
        ("log.jsonl", JSON_LOG, ()),  # which has no separator
        ("log.jsonl", JSON_LOG.replace('"t"', '"ts"'), ("--columns", "{time: ts}")),
        ("log.jsonl", JSON_LOG.replace('"t"', '"time"'), ()),
    ],
    ids=["as the run's", "json", "columns given", "our names"],
)
def test_refresh_counts_what_the_recipe_of_the_run_counted(model, tmp_path, name, text, words):
    write_json(model / SOURCES_FILE, asdict(ItemSources(READING | RECIPE, None, NUM_ITEMS)))
    (tmp_path / name).write_text(text)
    printed = run_command("refresh", model, "--interactions", tmp_path / name, *words)
    assert printed == f"{model}: counts of 2 interactions, the latest of 1970-01-01\n"
    counts = RankingModel.load(model).load_counts()
    assert counts.popularity.tolist()[:4] == [1, 0, 1, 0] and counts.until == 400.0


def test_new_items_are_read_as_the_recipe_of_the_run_reads_items(tmp_path):
    reading = READING | {"items_csv": {"separator": "|", "header": ["id", "name", "category"]}, "items_format": "csv"}
    (tmp_path / "new.dat").write_text("n0|Title 3|drama\nn1|Up|comedy\n")
    tables = [read_items(path, reading, False) for path in (tmp_path / "new.dat", write_items(tmp_path))]
    assert tables[0].equals(tables[1]) and tables[0]["title"].to_pylist() == ["Title 3", "Up"]
    with pytest.raises(ValueError, match=r"new.dat, but must end in .csv"):
        read_items(tmp_path / "new.dat", READING, False)


def test_a_model_folder_keeps_how_its_run_read_items_and_interactions(toy, tmp_path, monkeypatch):
    record = run_dir.read_record(toy, "data")
    monkeypatch.setattr(run_dir, "read_record", lambda *_: replace(record, given=RECIPE | {"seed": 1}))
    assert {key: value for key, value in ItemSources.of_run(toy, 2).reading.items() if value is not None} == RECIPE


def test_a_refresh_that_would_forget_everything_is_refused(model, tmp_path, capfd):
    words = ("refresh", model, "--interactions", write_interactions(tmp_path, ["u1,zz,1", "u2,yy,2"]))
    error = refusal(capfd, *words)
    assert "none of its 2 interactions is of an item that" in error and "`rerank add-items` first" in error
    assert "--columns is time; write a map" in refusal(capfd, *words, "--columns", "time")
    assert "is there already; choose another name" in refusal(capfd, *words, "--out", model)
    write_interactions(tmp_path, ["u1,m0,1750000000000"])
    error = refusal(capfd, *words)
    assert "has times in milliseconds but those of" in error and error.rstrip().endswith("write them in seconds")
    (model / "evidence.npz").unlink()
    assert "evidence.npz is missing, so there are no counts to renew" in refusal(capfd, *words)
