"""Requests to a served model and their answers, by a scripted engine."""

import asyncio
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from served import BODY, IDS, NAME, Server, make_folder, order_of
from toy_run import CATALOGUE

from rerank.models import text_embeddings
from rerank.models.ranker import RankingModel
from rerank.prompts import prompt_ids
from rerank.rank.encoder import encode_rows
from rerank.rank.items import with_new_items
from rerank.rank.model_folder import add_items, refresh
from rerank.rank.serve.service import Service
from rerank.rank.serve.snapshot import Snapshot


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def server(folder):
    return Server(folder)


def prompt_of(server, body):
    """The prompt that the engine was asked."""
    answer = server.ask(body)
    assert answer.status_code == 200, answer.text
    return server.engine.tokenizer.decode(server.engine.asked[-1][0]), answer


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_an_answer_ranks_all_documents_in_the_shape_of_the_api(server, path):
    answer = server.ask({"model": NAME, **BODY}, path=path, headers={"X-Request-Id": "abc-1"})
    assert sorted(order_of(answer)) == [0, 1, 2, 3] and order_of(answer) != [0, 1, 2, 3]
    found, results = answer.json(), answer.json()["results"]
    assert [result["relevance_score"] for result in results] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert found["id"] == answer.headers["X-Request-Id"] == server.engine.asked[-1][-1] == "abc-1"
    tokens = len(server.engine.asked[-1][0])
    written = found["meta"]["tokens"]["output_tokens"]
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens + written} and written >= 8
    assert found["model"] == NAME and found["meta"]["relevance_score"] == "1/rank"
    assert "trace" not in found and "warnings" not in found["meta"] and "document" not in results[0]


def test_the_engine_is_asked_what_rerank_rank_asks(folder):
    of_ids = make_folder(folder.with_name("of_ids"), item_fields=["semantic_id", "title"], ranking="semantic_id",
                         evidence="codes")  # fmt: skip
    for place in (folder, of_ids):
        server, model = Server(place), RankingModel.load(place)
        server.ask(BODY)
        (row,) = encode_rows([{"history": ["m0", "m1"], "candidates": IDS}], model, model.load_counts(), "last")
        prompter = replace(model.prompter, tokenizer=server.engine.tokenizer)
        assert server.engine.asked[-1][0] == prompt_ids(server.engine.tokenizer, [prompter.prompt(row.row)])[0]


def test_options_of_a_request(server):
    whole = order_of(server.ask(BODY))
    options = {"top_n": 2, "return_documents": True, "explain": True}
    answer = server.ask({**BODY, "documents": [{"id": "m2", "sku": 7}, *IDS[1:]], **options})
    assert order_of(answer) == whole[:2] and answer.json()["trace"] == "why"
    texts = [result["document"]["text"] for result in answer.json()["results"]]
    assert texts == [IDS[place] for place in whole[:2]]
    documents = server.ask({**BODY, "documents": [{"id": "m2", "sku": 7}, "m3"], "return_documents": True}).json()
    found = {result["index"]: result["document"] for result in documents["results"]}
    assert found == {0: {"id": "m2", "sku": 7, "text": "m2"}, 1: {"text": "m3"}}
    best = order_of(server.ask({**BODY, "top_k": 1}))
    assert server.engine.asked[-1][1].wanted == 1
    assert best == [whole[0], *(place for place in range(4) if place != whole[0])]


@pytest.mark.parametrize(
    "change",
    [
        {"query": {"history": ["m0", "m1"]}},
        {"query": json.dumps({"history": ["m0", "m1"], "context": {}})},
        {"query": "", "history": ["m0", "m1"]},
        {"query": "m7", "history": ["m0", "m1"]},
        {"query": " m0 \r\n\n m1\n"},
    ],
)
def test_a_query_is_a_history(server, change):
    prompt, _ = prompt_of(server, BODY)
    assert prompt_of(server, {**BODY, **change})[0] == prompt
    assert CATALOGUE.titles[1] in prompt


def test_a_query_is_a_field_of_the_request_where_the_model_was_trained_with_one(folder):
    shown = {"request_fields": ["query", "device"], "history_fields": ["time"], "evidence": "words"}
    shown |= {"evidence_names": ["first_stage_score"]}
    server = Server(make_folder(folder.with_name("of_query"), **shown))
    context = {"device": "tv", "time": 172800, "history_times": [0]}
    body = {**BODY, "query": "m0 <b>", "history": ["m0"], "context": context, "scores": [4, 3.5, None, 1]}
    prompt, answer = prompt_of(server, {**body, "context": {**context, "colour": 1}})
    assert "Request: query: m0 ‹b›; device: tv" in prompt and "‹script›" in prompt and "| 2d" in prompt
    assert "first-stage score 3.50" in prompt
    assert answer.json()["meta"]["warnings"] == ["context has 'colour', which the model's prompts do not show"]
    for name, message in (("context", "context has no 'device'"), ("scores", "the request has no 'scores'")):
        refused = server.ask({key: value for key, value in body.items() if key != name})
        assert refused.status_code == 422 and message in refused.json()["message"]


# --- documents


def test_documents_that_the_model_does_not_know_are_ranked_by_their_texts(server, folder, tmp_path):
    new = [{"id": "n1", "title": "A new <one>", "category": "film"}, {"id": "n2", "name": "Second"}]
    documents = ["m2", new[0], new[1], {"text": "Title 9"}, "Title  8"]
    prompt, answer = prompt_of(server, {**BODY, "documents": documents})
    assert sorted(order_of(answer)) == [0, 1, 2, 3, 4] and "warnings" not in answer.json()["meta"]
    path = tmp_path / "items.jsonl"
    rows = [{"item_id": "n1", "name": "A new <one>"}, {"item_id": "n2", "name": "Second"}]
    rows += [{"item_id": "n3", "name": "Title 9"}, {"item_id": "n4", "name": "Title 8"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    model, counts = with_new_items(RankingModel.load(folder), None, path, None)
    record = {"history": ["m0", "m1"], "candidates": ["m2", "n1", "n2", "n3", "n4"]}
    (row,) = encode_rows([record], model, counts, "last")
    assert replace(model.prompter, tokenizer=server.engine.tokenizer).prompt(row.row) == prompt
    assert order_of(server.ask(BODY)) and len(server.service.snapshot.encoder.items) == len(CATALOGUE)


def test_a_new_document_may_lack_some_of_the_fields_that_are_shown(folder):
    server = Server(make_folder(folder.with_name("of_two_fields"), item_fields=["title", "category"]))
    prompt, answer = prompt_of(server, {**BODY, "documents": ["m2", "New film"]})
    assert "1. Title 2 | drama\n" in prompt and "2. New film<" in prompt and sorted(order_of(answer)) == [0, 1]
    assert "warnings" not in answer.json()["meta"]
    prompt, _ = prompt_of(server, {**BODY, "documents": ["m2", {"id": "n1", "category": "film"}]})
    assert "2. film" in prompt


@pytest.mark.parametrize("empty", [{"title": None}, {"title": ""}, {"name": None}, {"title": None, "name": ""}])
def test_a_document_is_its_text_where_its_other_fields_are_empty(server, empty):
    document = {"id": "n1", "text": "New film", **empty}
    prompt, answer = prompt_of(server, {**BODY, "documents": ["m2", document], "return_documents": True})
    assert "2. New film" in prompt and "warnings" not in answer.json()["meta"]
    found = {result["index"]: result["document"] for result in answer.json()["results"]}
    assert found[1] == document
    found = server.ask({**BODY, "documents": ["m2", {"id": "m3", "text": None}], "return_documents": True}).json()
    assert {"id": "m3", "text": "m3"} in [result["document"] for result in found["results"]]


def test_new_documents_have_facts_without_counts(folder):
    shown = {"evidence": "words", "evidence_names": ["popularity"]}
    prompt, _ = prompt_of(
        Server(make_folder(folder.with_name("facts"), **shown)), {**BODY, "documents": ["m2", "New one"]}
    )
    assert "2. New one: chosen 0 times" in prompt and "1. Title 2: chosen 0 times" not in prompt


def test_new_documents_get_ids_where_the_model_reads_ids_and_has_its_encoder(folder, monkeypatch):
    shown = {"item_fields": ["semantic_id", "title"], "ranking": "semantic_id"}
    body, encoded = {**BODY, "documents": ["m2", {"id": "n1", "title": "New"}, "m3"]}, []

    def encode(texts, **options):
        encoded.extend(texts)
        return np.array([[1.0]] * len(texts))  # nearest prefix 0, but the first three are full

    monkeypatch.setattr(text_embeddings, "_load_encoder", lambda path: SimpleNamespace(encode=encode))
    server = Server(make_folder(folder.with_name("with_encoder"), encoder="minilm", **shown))
    prompt, answer = prompt_of(server, body)
    assert "<s_a_3><s_b_0> New" in prompt and encoded == ["New"] and sorted(order_of(answer)) == [0, 1, 2]
    without = Server(make_folder(folder.with_name("without_encoder"), **shown))
    prompt, answer = prompt_of(without, body)
    assert "New" not in prompt and order_of(answer)[-1] == 1
    assert answer.json()["meta"]["warnings"] == ["1 documents are unknown to the model and placed last"]


@pytest.mark.parametrize(
    ("unknown", "order", "warning"),
    [
        ("last", [3, 1, 0, 2], "2 documents are unknown to the model and placed last"),
        ("drop", [3, 1], "2 documents are unknown to the model and left out"),
        ("refuse", None, "documents[0] is 'zz', which the model does not know; leave it out, or give"),
    ],
)
def test_unknown_ids_without_a_text_are_dealt_with_as_rerank_rank_does(folder, unknown, order, warning):
    documents = [{"id": "zz"}, "m3", {"id": "yy", "price": 3}, "m4"]
    answer = Server(folder, unknown=unknown).ask({"query": "m0\nxx", "documents": documents})
    if order is None:
        assert answer.status_code == 422 and warning in answer.json()["message"]
    else:
        assert order_of(answer) == order
        one = {"query": "", "documents": ["m3", {"id": "zz"}]}
        assert Server(folder, unknown=unknown).ask(one).status_code == (422 if unknown == "drop" else 200)
        in_history = "1 ids of the history are unknown to the model and left out"
        assert answer.json()["meta"]["warnings"] == [in_history, warning]


def test_one_known_document_needs_no_engine(server):
    number = len(server.engine.asked)
    answer = server.ask({**BODY, "documents": [{"id": "zz"}, "m3"]})
    assert order_of(answer) == [1, 0] and len(server.engine.asked) == number
    assert answer.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


def test_one_token_ranks_by_the_probability_of_each_label(folder):
    server = Server(make_folder(folder.with_name("one_token"), ranking="letter", one_token=True))
    answer = server.ask({**BODY, "documents": ["m2", {"id": "zz"}, "m3"], "explain": True})
    share = 1 / (1 + 2.718281828459045)
    scores = [result["relevance_score"] for result in answer.json()["results"]]
    assert order_of(answer) == [2, 0, 1] and scores == pytest.approx([1 - share, share, 0])
    assert answer.json()["meta"]["relevance_score"] == "probability"
    tokens, labels, _ = server.engine.asked[-1]
    text = server.engine.tokenizer.decode(tokens)
    assert text.endswith("<think></think>") and server.engine.tokenizer.decode(labels) == " A B"


# --- /v1/models and /v1/reload


def test_models_are_listed_with_their_labels_and_the_longest_list_that_is_ranked(server):
    async def get(path):
        async with server.client() as client:
            return await client.get(path)

    (model,) = asyncio.run(get("/v1/models")).json()["data"]
    assert model["id"] == NAME and model["labels"] == "number" and model["items"] == 12
    assert model["catalogue_date"] >= "2026" and asyncio.run(get("/health")).status_code == 200
    most = model["max_documents"]
    texts = [f"text {number}" for number in range(most + 1)]
    assert len(order_of(server.ask({"query": "", "documents": texts[:most]}))) == most > 20
    refused = server.ask({"query": "", "documents": texts})
    assert refused.status_code == 413 and f"at most {most} can be ranked" in refused.json()["message"]


def test_a_reload_takes_up_new_items_while_requests_are_in_flight(folder, tmp_path):
    server = Server(make_folder(tmp_path / "model"))
    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "n1", "name": "Brand new"}))
    body = {**BODY, "documents": ["m2", {"id": "n1"}, "m3"]}

    async def reload():
        server.engine.is_open.clear()
        early = asyncio.ensure_future(server.post(body))
        while not server.engine.asked:
            await asyncio.sleep(0.01)
        add_items(tmp_path / "model", tmp_path / "items.jsonl", None, None)
        (done,) = await server.post({}, path="/v1/reload")
        server.engine.is_open.set()
        return (await early)[0], done, (await server.post(body))[0]

    early, done, late = asyncio.run(reload())
    assert done.json()["items_before"] == 12 and done.json()["items"] == 13
    assert order_of(early)[2] == 1 and early.json()["meta"]["warnings"]
    assert "warnings" not in late.json()["meta"]
    assert "Brand new" in server.engine.tokenizer.decode(server.engine.asked[-1][0])
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    refused = server.ask({}, path="/v1/reload")
    assert refused.status_code == 409 and "has another model.safetensors" in refused.json()["message"]
    assert order_of(server.ask(body)) and isinstance(server.service, Service)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert "nothing is changed" in server.ask({}, path="/v1/reload").json()["message"]
    assert order_of(server.ask(body))


def test_a_reload_follows_a_link_to_its_new_target(folder, tmp_path):
    place, link = make_folder(tmp_path / "first"), tmp_path / "current"
    link.symlink_to(place)
    server = Server(link)
    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "n1", "name": "Brand new"}))
    add_items(place, tmp_path / "items.jsonl", None, tmp_path / "second")
    os.utime(tmp_path / "first/catalogue.parquet", (0, 0))

    async def models():
        async with server.client() as client:
            return (await client.get("/v1/models")).json()["data"][0]

    before = asyncio.run(models())
    link.unlink()
    link.symlink_to(tmp_path / "second")
    assert asyncio.run(models()) == before and before["catalogue_date"] > "2026" and before["root"] == str(place)
    assert server.ask({}, path="/v1/reload").json()["items"] == 13
    assert asyncio.run(models())["root"] == str(tmp_path / "second")


def test_a_reload_takes_up_counts_that_were_refreshed(folder, tmp_path):
    shown = {"evidence": "words", "evidence_names": ["popularity"]}
    server = Server(make_folder(tmp_path / "model", **shown))
    before, _ = prompt_of(server, BODY)
    path = tmp_path / "interactions.csv"
    path.write_text("user,item,time\nu1,m2,1700000000\n" + "u2,m3,1700000001\n")
    refresh(tmp_path / "model", path, None, None)
    assert prompt_of(server, BODY)[0] == before
    found = server.ask({}, path="/v1/reload").json()
    assert found["counts_until"] == "2023-11-14" and found["items"] == found["items_before"] == 12
    after, _ = prompt_of(server, BODY)
    assert "Title 2: chosen 1 times" in after and "Title 4: chosen 0 times" in after and "chosen 1 times" not in before


def test_a_folder_that_is_swapped_while_it_is_read_is_read_again(folder, tmp_path, monkeypatch):
    place, reads = make_folder(tmp_path / "model"), []

    def load_counts(self):
        reads.append(self)
        if len(reads) == 1:
            place.rename(tmp_path / "model.old")
            make_folder(tmp_path / "next").rename(place)
        return None

    monkeypatch.setattr(RankingModel, "load_counts", load_counts)
    assert Snapshot.load(place, "last", False).folder == place and len(reads) == 2
    place.rename(tmp_path / "soon")
    monkeypatch.setattr("time.sleep", lambda seconds: (tmp_path / "soon").rename(place))  # after the second rename
    assert Snapshot.load(place, "last", False).folder == place
