"""The semantic_ids stage on a large synthetic catalogue: memory, and time per item in assignment.

    python -m tests.benchmarks.semantic_ids_scale [--num_items 1000000] [--method residual_k_means]

Embeddings are memory-mapped noise around random centres. The stage runs as a process of its own; its peak includes the
mapped pages that it touches. Assignment is then timed alone on the first 10,000 items, ten times as many, and so on.
Ends with one JSON line.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.launch.files import write_json
from rerank.semantic_ids import Tokenizer
from rerank.semantic_ids.assignment import assign_codes

COLUMNS = 384
BLOCK = 16_384


def write_catalogue(folder: Path, num_items: int) -> None:
    """A finished data stage, and embeddings beside it."""
    data = run_dir.stage_dir(folder, "data")
    data.mkdir()
    ids = [str(item) for item in range(num_items)]
    pq.write_table(pa.table({"item": range(num_items), "item_id": ids, "text": ids}), data / "items.parquet")
    write_json(data / "stage.json", {"id": "synthetic", "given": {}, "inputs": {}})
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, COLUMNS), dtype=np.float32)
    shape = (num_items, COLUMNS)
    saved = np.lib.format.open_memmap(folder / "embeddings.npy", mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, num_items, BLOCK):
        rows = saved[start : start + BLOCK]
        rows[:] = centres[rng.integers(len(centres), size=len(rows))] + rng.standard_normal(
            rows.shape, dtype=np.float32
        )


def run_stage(folder: Path, overrides: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in GB of the whole stage."""
    (folder / "recipe.yaml").write_text(f"run_dir: {folder}\nembeddings: {folder}/embeddings.npy\n")
    line = [sys.executable, "-m", "rerank.semantic_ids", "--config", str(folder / "recipe.yaml"), *overrides]
    begin = time.perf_counter()
    subprocess.run(line, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return time.perf_counter() - begin, peak * 1024 / 1e9


def microseconds_per_item(folder: Path, num_items: int) -> dict[int, float]:
    """Of assignment, best of three, for growing parts of the catalogue."""
    stage = run_dir.stage_dir(folder, "semantic_ids")
    tokenizer, embeddings = Tokenizer.load(stage), np.load(stage / "embeddings.npy", mmap_mode="r")
    found, size = {}, 10_000
    while size <= num_items:
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            assign_codes(tokenizer, embeddings[:size])
            seconds.append(time.perf_counter() - begin)
        found[size], size = 1e6 * min(seconds) / size, size * 10
    return found


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_items", type=int, default=1_000_000)
    parser.add_argument("--method", default="residual_k_means")
    parser.add_argument("--epochs", type=int, default=1, help="of method rq_vae (%(default)s)")
    args = parser.parse_args()
    overrides = [f"--method={args.method}", *([f"--epochs={args.epochs}"] if args.method == "rq_vae" else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_catalogue(folder, args.num_items)
        seconds, peak = run_stage(folder, overrides)
        metrics = run_dir.read_metrics(folder, "semantic_ids")
        result = {"num_items": args.num_items, "method": args.method, "stage_seconds": seconds, "peak_gb": peak}
        result |= {key: metrics[key] for key in ("fit_seconds", "uniqueness_before", "uniqueness_after")}
        result["microseconds_per_item"] = microseconds_per_item(folder, args.num_items)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
