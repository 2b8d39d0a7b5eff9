"""Served models for tests: model folders of toy runs, a scripted engine in place of vLLM's, and calls of the app."""

import asyncio
import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from string import ascii_uppercase

import httpx
from fastapi import FastAPI
from toy_run import CATALOGUE, LINE_TOKENIZER, SETTINGS, toy_sequences, write_model
from transformers import AutoTokenizer

from rerank.baselines import FEATURES, Counts
from rerank.launch.files import write_json
from rerank.launch.named_files import FileRecord
from rerank.models.ranking_grammar import Choices
from rerank.models.saving import ID_TOKENIZER, SOURCES_FILE, ItemSources
from rerank.rank.serve.routes import attach
from rerank.rank.serve.service import Service, Written
from rerank.rank.serve.settings import ServeSettings
from rerank.rank.serve.snapshot import Snapshot
from rerank.rows import FEATURES_FILE

NAME = "toy"
IDS = ["m2", "m3", "m4", "m5"]
BODY = {"query": "m0\nm1", "documents": IDS}
READING = {"item_columns": {"item": "item_id", "title": "name"}, "text_columns": None, "category_separator": None}


@functools.cache
def model_files() -> Path:
    """The files of a model of random weights that the folders of all tests share."""
    folder = Path(tempfile.mkdtemp()) / "model"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    write_model(folder)
    Counts.fit(toy_sequences(), len(CATALOGUE)).save(folder / "evidence.npz")
    write_json(folder / FEATURES_FILE, {"names": list(FEATURES), "edges": {name: [0.0] for name in FEATURES}})
    return folder


def make_folder(
    folder: Path, max_tokens: int = 64, one_token: bool = False, encoder: str | None = None, **settings
) -> Path:
    """A model folder whose prompts show titles, unless told otherwise; with an encoder it can make semantic ids."""
    shutil.copytree(model_files(), folder)
    if one_token or encoder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f" {letter}" for letter in ascii_uppercase] if one_token else ["<s_a_3>"])
        tokenizer.save_pretrained(folder)
    shown = {"item_fields": ["title"], "ranking": "number", "evidence": "none", **settings}
    replace(SETTINGS, **shown).save(folder)
    replace(CATALOGUE, fields={"brand": ["b"] * len(CATALOGUE)}).save(folder, ["brand"])
    generation = {"max_completion_tokens": max_tokens, "trace": True, "one_token": one_token}
    write_json(folder / "generation.json", generation)
    made_by = None if encoder is None else FileRecord("encoder", encoder)
    write_json(folder / SOURCES_FILE, asdict(ItemSources(READING, made_by, len(CATALOGUE))))
    LINE_TOKENIZER.save(folder / ID_TOKENIZER)
    return folder


class ScriptedEngine:
    """Writes `why` and, of the tokens that may come next, the largest; it waits while `is_open` is not set.

    Attributes:
        asked: Tokens, grammar or labels, and id of each request.
        left: Ids of those that were cancelled.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.is_open, self.asked, self.left, self.text = asyncio.Event(), [], [], None
        self.is_open.set()

    async def _wait(self, *asked) -> None:
        self.asked.append(asked)
        try:
            await self.is_open.wait()
        except asyncio.CancelledError:
            self.left.append(asked[-1])
            raise

    async def write(self, tokens, grammar, max_tokens, request_id):
        await self._wait(tokens, grammar, request_id)
        if self.text is not None:
            return Written(self.text, 3)
        choices, trace, written = Choices(grammar), self.tokenizer("why", add_special_tokens=False).input_ids, []
        while not written or written[-1] != grammar.end:
            allowed = choices.allowed()
            written.append(max(allowed) if allowed else [*trace, grammar.think_end][len(written) - 1])
            choices.push(written[-1])
        return Written(self.tokenizer.decode(written[:-1]), len(written))

    async def compare(self, tokens, labels, request_id):
        await self._wait(tokens, labels, request_id)
        return Written("", 1, logps=[-1.0 - place for place in range(len(labels))][::-1])

    async def is_well(self):
        return True


class Server:
    """An app with its service and its engine."""

    def __init__(self, folder: Path, **settings) -> None:
        self.settings = ServeSettings(**settings)
        self.engine = ScriptedEngine(folder)
        snapshot = Snapshot.load(folder, self.settings.unknown, self.settings.one_token)
        self.service = Service([NAME], snapshot, self.engine, self.settings)
        self.app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        self.app.state.rerank = self.service
        attach(self.app, self.settings)

    def client(self, **options) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://server", **options)

    async def post(self, *bodies, path: str = "/v1/rerank", headers=None) -> list[httpx.Response]:
        """Answers to requests that are sent at once: mappings, or bytes."""
        async with self.client(headers=headers) as client:
            contents = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in bodies]
            return await asyncio.gather(*(client.post(path, content=content) for content in contents))

    def ask(self, body, **options) -> httpx.Response:
        """The answer to one request."""
        return asyncio.run(self.post(body, **options))[0]


def order_of(answer: httpx.Response) -> list[int]:
    """Numbers of documents, best first."""
    assert answer.status_code == 200, answer.text
    return [result["index"] for result in answer.json()["results"]]
