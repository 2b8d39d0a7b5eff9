"""Cost of storing rollouts in a training, and speed of rewards and of `rerank replay`, on a synthetic store.

- `store_overhead`: processor seconds of writing the 256 rollouts of a step, the background thread's included, over
  those of the step. Of the step only the forward and backward passes of a model of the demo's size are counted,
  neither sampling nor the optimizer, so a real share is lower.
- `replay_seconds_100k`: `rerank replay` with all shipped rewards and conditions, interpreter and imports included.
- `rewards_per_second`: values of these rewards, one completion each, scored together as replay does.
- Times of `rerank inspect` and `rerank report`: see `tests/benchmarks/rollout_viewers.py`.

Medians of --repeats. On a quiet machine, files in the operating system's cache:

    python -m tests.benchmarks.rollouts
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from rerank import plugins, scoring
from rerank.rollouts import metrics as rollout_metrics
from rerank.rollouts import rescore
from rerank.rollouts import store as rollouts
from rerank.rows import column_names
from tests.benchmarks import rollout_viewers
from tests.benchmarks.synthetic_rollouts import write_synthetic_store

NUM_ROLLOUTS, STEP_SIZE, MICRO_BATCH, PROMPT_TOKENS = 100_000, 256, 32, 240


def median(measure: Callable[[], float], repeats: int) -> float:
    """The median after one time that does not count."""
    return statistics.median([measure() for _ in range(repeats + 1)][1:])


def step_seconds(records: list[dict[str, Any]], repeats: int) -> float:
    """Processor seconds of the passes through a model that a step of these rollouts takes."""
    import torch

    from rerank.models import base as base_model

    tokenizer = base_model.train_tokenizer(["some words"], 400)
    model = base_model.make_small_model(base_model.SmallModelArguments(), tokenizer, seed=0)
    length = PROMPT_TOKENS + max(len(record["completion_ids"]) for record in records)
    ids = torch.randint(0, len(tokenizer), (len(records), length), generator=torch.Generator().manual_seed(0))

    def passes() -> float:
        begin = time.process_time()
        for batch in ids.split(MICRO_BATCH):
            model(input_ids=batch, labels=batch).loss.backward()
        return time.process_time() - begin

    return median(passes, repeats)


def writing_seconds(records: list[dict[str, Any]], repeats: int) -> tuple[float, float]:
    """Seconds for which a trainer waits, and processor seconds in all, per step."""
    waits, totals = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = rollouts.RolloutWriter(folder)
        for step in range(repeats + 1):
            of_step = [{**record, "step": step} for record in records]
            begin, processor = time.perf_counter(), time.process_time()
            writer.add(of_step)
            writer.flush()
            waits.append(time.perf_counter() - begin)
            writer.flush(wait=True)
            totals.append(time.process_time() - processor)
        writer.close()
    return statistics.median(waits[1:]), statistics.median(totals[1:])


def shipped_rewards() -> list[dict[str, Any]]:
    """Every reward of the folder, and each condition on one of them."""
    conditions = plugins.known_names("rewards.conditions")
    names = plugins.known_names("rewards")
    return [
        {"name": name, "kwargs": {"cache_tokens": 8} if name == "overlong" else {}}  # of the 64 tokens of the store
        | ({"condition": conditions[place]} if place < len(conditions) else {})
        for place, name in enumerate(names)
    ]


def replay_seconds(run_dir: Path) -> float:
    """Seconds of the command."""
    recipe = run_dir / "rewards.yaml"
    recipe.write_text(json.dumps({"rewards": shipped_rewards()}))  # JSON is YAML
    begin = time.perf_counter()
    line = [sys.executable, "-m", "rerank.cli", "replay", str(run_dir), "--rewards", str(recipe)]
    subprocess.run(line, check=True, capture_output=True)
    return time.perf_counter() - begin


def scoring_seconds(table: pa.Table, specs: list[dict[str, Any]]) -> float:
    """Seconds of scoring every rollout with these rewards."""
    rewards = scoring.load_rewards(specs)
    begin = time.perf_counter()
    rescore.score(table, rewards, column_names())
    return time.perf_counter() - begin


def measure(run_dir: Path, repeats: int, table: Table) -> dict[str, float]:
    """The figures of the JSON line; adds a line to the table for each thing timed."""
    write_synthetic_store(run_dir, NUM_ROLLOUTS)
    stored = rollouts.read_rollouts(run_dir)
    records = stored.slice(0, STEP_SIZE).to_pylist(maps_as_pydicts="strict")
    step = step_seconds(records, repeats)
    waited, processor = writing_seconds(records, repeats)
    weights = dict.fromkeys(records[0]["reward_components"], 1.0)

    def logging() -> float:
        begin = time.perf_counter()
        rollout_metrics.overall(rollouts.to_table(records), weights)
        return time.perf_counter() - begin

    table.add_row(f"passes of a step, {STEP_SIZE} rollouts, processor time", f"{1000 * step:.0f} ms")
    table.add_row("the trainer waits for the store", f"{1000 * waited:.1f} ms")
    table.add_row("writing in all, processor time", f"{1000 * processor:.1f} ms")
    table.add_row("the dashboard's numbers of a step", f"{1000 * median(logging, repeats):.1f} ms")
    for spec in shipped_rewards():
        seconds = median(lambda spec=spec: scoring_seconds(stored, [spec]), repeats)
        table.add_row(
            f"{spec['name']}, condition {spec.get('condition', 'none')}", f"{NUM_ROLLOUTS / seconds:,.0f} a second"
        )
    together = median(lambda: scoring_seconds(stored, shipped_rewards()), repeats)
    replayed = median(lambda: replay_seconds(run_dir), repeats)
    table.add_row(f"all rewards of {NUM_ROLLOUTS:,} rollouts", f"{together:.2f} s")
    table.add_row(f"rerank replay of {NUM_ROLLOUTS:,} rollouts", f"{replayed:.2f} s")
    return {
        "store_overhead": processor / step,
        "replay_seconds_100k": replayed,
        "rewards_per_second": NUM_ROLLOUTS * len(shipped_rewards()) / together,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="times of each that count (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the viewers' stores are kept for the next call")
    args = parser.parse_args()
    table = Table("what", "takes")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), args.repeats, table)
        for name, value in rollout_viewers.measure(args.folder or Path(folder), args.repeats).items():
            table.add_row(name, f"{value:.2f}")
            figures[name] = value
    Console().print(table)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
