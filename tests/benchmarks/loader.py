"""Memory and time to the first step of the sft stage, and how fast its rows are read, on synthetic rows.

    python -m tests.benchmarks.loader --rows 1000000

A run is written whose stages up to traces are made up: lists of ten candidates with six facts each, a trace that
grades them, and a model of the demo's shape with random weights. The stage then trains in a process of its own, as
`rerank run` starts it. Seconds count from the start of that process to the end of the first step; memory is the most
that the process has held by then, mapped pages that it touched included. After --steps steps the loader is read alone,
by this process and then by --workers processes: its tokens per second, and their ratio to those of a step without its
reading. Ends with one JSON line.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig

from rerank import sft
from rerank.catalogue import id_tokens, semantic_id_text
from rerank.grading import GRADES, by_grade, trace_words, word_grades
from rerank.launch import run_dir
from rerank.launch.files import write_json
from rerank.models import base as base_model
from rerank.prompts import THINK, THINK_END, PromptSettings, word_labels
from rerank.prompts.facts import code_words
from rerank.rows import FEATURES_FILE
from tests.benchmarks.busy import busy_share, refuse_busy

NUM_ITEMS, LEVELS, CODES = 10_000, 3, 64
CANDIDATES, HISTORY, BUCKETS = 10, 10, 10
FACTS = ["direct_last", "near", "fit_recent", "fit_history", "popularity", "cosine_last"]
PART = 20_000  # rows that are written at once
WARM_STEPS = 3  # that do not count
BATCHES, WARM_BATCHES = 200, 20  # that are read, and before them: workers read ahead
VALIDATION = 200


def write_run(run: Path, num_rows: int) -> None:
    """Finished stages up to traces, by hand, and a model."""
    rng = np.random.default_rng(0)
    for stage in ("data", "semantic_ids", "midtrain", "candidates", "traces"):
        run_dir.stage_dir(run, stage).mkdir(parents=True)
        write_json(run_dir.stage_dir(run, stage) / "stage.json", {"id": stage, "given": {}, "inputs": {}})
    ids = [str(item) for item in range(NUM_ITEMS)]
    columns = {"item": range(NUM_ITEMS), "item_id": ids, "title": ids, "category": ids}
    pq.write_table(pa.table(columns), run / "data/items.parquet")
    codes = np.stack(np.unravel_index(np.arange(NUM_ITEMS), (CODES,) * LEVELS), axis=1)
    ids = {"item": range(NUM_ITEMS), "codes": codes.tolist(), "semantic_id": list(map(semantic_id_text, codes))}
    pq.write_table(pa.table(ids), run / "semantic_ids/semantic_ids.parquet")
    write_json(run / "semantic_ids/metrics.json", {"levels": LEVELS, "codebook_size": CODES})
    edges = {name: np.arange(1.0, BUCKETS).tolist() for name in FACTS}
    write_json(run / "candidates" / FEATURES_FILE, {"names": FACTS, "edges": edges})
    write_parts(run / "candidates/valid.parquet", VALIDATION, lambda first, num: lists(rng, first, num, num_rows))
    write_parts(run / "candidates/train.parquet", num_rows, lambda first, num: lists(rng, first, num))
    write_parts(run / "traces/accepted.parquet", num_rows, lambda first, num: traces(rng, first, num))
    uses = pa.table({"row_id": np.arange(num_rows), "used_for": ["sft"] * num_rows})
    pq.write_table(uses, run / "traces/row_split.parquet")
    PromptSettings(
        task="short",
        item_fields=["semantic_id"],
        ranking="number",
        evidence="codes",
        evidence_names=FACTS,
        max_history=5,
    ).save(run / "traces")
    write_model(run / "midtrain/model")


def write_parts(path: Path, num_rows: int, make: Any) -> None:
    """A Parquet file whose rows are made part by part."""
    writer = None
    for first in range(0, num_rows, PART):
        part = make(first, min(PART, num_rows - first))
        writer = writer or pq.ParquetWriter(path, part.schema)
        writer.write_table(part, row_group_size=1 << 20)
    assert writer is not None
    writer.close()


def listed(values: np.ndarray) -> pa.Array:
    """Rows of an array as lists."""
    inner = pa.array(values.reshape(-1)) if values.ndim == 2 else listed(values.reshape(-1, values.shape[-1]))
    offsets = np.arange(0, values.shape[0] * values.shape[1] + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), inner)


def lists(rng: np.random.Generator, first: int, num: int, first_user: int = 0) -> pa.Table:
    """Rows of a candidates table with one relevant candidate each."""
    row_ids = np.arange(first, first + num)
    relevance = np.zeros((num, CANDIDATES))
    relevance[np.arange(num), rng.integers(0, CANDIDATES, num)] = 1.0
    columns = {"row_id": row_ids, "user": first_user + row_ids}
    columns |= {"history": listed(rng.integers(0, NUM_ITEMS, (num, HISTORY)))}
    columns |= {"candidates": listed(rng.integers(0, NUM_ITEMS, (num, CANDIDATES))), "relevance": listed(relevance)}
    features = rng.integers(0, BUCKETS, (num, CANDIDATES, len(FACTS))).astype(np.float32)
    return pa.table(columns | {"features": listed(features)})


def traces(rng: np.random.Generator, first: int, num: int) -> pa.Table:
    """Accepted attempts: the grade of each candidate, and the order by it."""
    grades = rng.integers(0, len(GRADES), (num, CANDIDATES))
    labels = word_labels("number", CANDIDATES)
    texts = [word_grades(labels, of_row) for of_row in grades]
    orders = [by_grade(of_row) for of_row in grades]
    return pa.table({"row_id": np.arange(first, first + num), "trace": texts, "order": orders})


def write_model(folder: Path) -> None:
    """The demo's model, untrained."""
    words = [*code_words(FACTS, BUCKETS), *trace_words(CANDIDATES, []), "Rank:", "History:", "Candidates:"]
    tokenizer = base_model.train_tokenizer([" ".join(words)], 800, words)
    model = base_model.make_small_model(base_model.SmallModelArguments(vocab_size=800), tokenizer, seed=0)
    base_model.add_tokens(model, tokenizer, [*id_tokens(LEVELS, CODES), THINK, THINK_END], seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Enough(Exception):
    """The steps are made."""


class Clock(TrainerCallback):
    """Notes the time and the peak of memory after each step; ends the training after the last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.ends, self.peak_gb = steps, list[float](), list[float]()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.ends.append(time.time())
        self.peak_gb.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        if len(self.ends) == self.steps:
            raise Enough


def measure(run: Path, num_steps: int, num_workers: int) -> dict[str, float]:
    """The stage's first steps and its loader."""
    clock, made, plain = Clock(num_steps), [], sft.make_trainer

    def make_trainer(*args: Any, **options: Any) -> Any:
        made.append(plain(*args, callbacks=[clock], **options))
        return made[-1]

    sft.make_trainer = make_trainer
    config = SFTConfig(
        str(run / "sft.partial/checkpoints"), use_cpu=True, bf16=False, report_to="none", max_steps=num_steps + 1,
        per_device_train_batch_size=16, max_length=512, gradient_checkpointing=False, save_strategy="no",
        learning_rate=1e-3, eval_steps=10 * num_steps,
    )  # fmt: skip
    args = sft.SftArguments(run_dir=str(run), eval_rows=VALIDATION, keep="last")
    sft.check(args, config, ModelConfig())
    try:
        sft.main(args, config, ModelConfig(), run / "sft.partial")
    except Enough:
        pass
    (tokens, reading), (tokens_by_workers, by_workers) = read(made[0], 0), read(made[0], num_workers)
    step = (clock.ends[-1] - clock.ends[WARM_STEPS]) / (num_steps - 1 - WARM_STEPS)
    training = tokens / (step - reading)
    return {
        "first_step_s": clock.ends[0] - psutil.Process().create_time(),
        "first_step_gb": clock.peak_gb[0],
        "last_step_gb": clock.peak_gb[-1],
        "training_tokens_per_second": training,
        "loader_tokens_per_second": tokens / reading,
        "ratio": tokens / reading / training,
        "ratio_by_workers": tokens_by_workers / by_workers / training,
    }


def read(trainer: Any, num_workers: int) -> tuple[float, float]:
    """Tokens and seconds of a batch, of BATCHES after the first ones."""
    trainer.args.dataloader_num_workers = num_workers
    begun, tokens, number = 0.0, 0, 0
    for number, batch in enumerate(trainer.get_train_dataloader(), start=-WARM_BATCHES):
        if number == 0:
            begun = time.time()
        tokens += int(batch["attention_mask"].sum()) if number > 0 else 0
        if number == BATCHES:
            break
    assert number == BATCHES, f"{number} batches after the first {WARM_BATCHES}; --rows is too small"
    return tokens / BATCHES, (time.time() - begun) / BATCHES


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of training (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--busy", action="store_true", help="also on a busy machine, whose figures count for nothing")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.steps, args.workers)))
        return
    if not args.busy:
        refuse_busy(busy_share())
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), args.rows)
        line = [sys.executable, "-m", "tests.benchmarks.loader", "--measure", folder]
        line += ["--steps", str(args.steps), "--workers", str(args.workers)]
        done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    table = Table(title=f"sft on {args.rows:,} rows{', on a busy machine' if args.busy else ''}")
    for name in found:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(*(f"{value:,.1f}" for value in found.values()))
    Console().print(table)
    print(json.dumps({"rows": args.rows, "busy": args.busy, **found}))


if __name__ == "__main__":
    main()
