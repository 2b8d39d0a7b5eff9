"""The data of the toy recipe in tests/toy, and the ways tests run it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from rerank import recipe, run_dir

TOY = Path("tests/toy")
NUM_USERS, NUM_ITEMS, LENGTH = 12, 24, 11


def write_toy_data(folder: Path) -> Path:
    """Users who mostly walk a circle of items, as two CSV files, and an embedding of every item on that circle."""
    rng = np.random.default_rng(0)
    lines = ["user,item,time"]
    for user in range(NUM_USERS):
        walk = (np.cumsum(rng.choice([1, 1, 1, 2], LENGTH)) + 5 * user) % NUM_ITEMS
        lines += [f"u{user},i{item},{place}" for place, item in enumerate(walk)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    kinds = ("drama", "comedy", "crime")
    items = ["item,title,category", *(f"i{i},The title {i},{kinds[i % 3]}" for i in range(NUM_ITEMS))]
    (folder / "items.csv").write_text("\n".join(items) + "\n")
    angles = 2 * np.pi * np.arange(NUM_ITEMS)[:, None] * np.arange(1, 5) / NUM_ITEMS
    np.save(folder / "embeddings.npy", np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    return folder


def environment(data_dir: Path) -> dict[str, str]:
    """What a launched process needs to know; one thread, so that two processes do not fight for the cores."""
    return {**os.environ, **recipe.ENVIRONMENT, "OMP_NUM_THREADS": "1", "TOY_DATA": str(data_dir)}


def run_words(out: Path, *words: str) -> list[str]:
    """The words of a `rerank run` of the toy."""
    return [sys.executable, "-m", "rerank.cli", "run", str(TOY), "--out", str(out), *words]


def launch(data_dir: Path, accelerate: str, module: str, stage: str, out: Path, *words: str) -> None:
    """A bare `accelerate launch` of one stage; its last lines are the message when it fails."""
    file = next(TOY.glob(f"*_{stage}.yaml"))
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate, "-m", module]
    line += ["--config", str(file), f"--run_dir={out}", *words]
    done = subprocess.run(line, env=environment(data_dir), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def copy_stages(run: Path, out: Path, last: str) -> Path:
    """A run that is finished up to and with the stage `last`."""
    for stage in run_dir.STAGES[: run_dir.STAGES.index(last) + 1]:
        shutil.copytree(run / stage, out / stage)
    return out
