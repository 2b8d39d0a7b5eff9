# ruff: noqa: T201
"""Whether two versions of the code make the same files and print the same lines from the same data.

    python -m tests.same_results OLD_CHECKOUT NEW_CHECKOUT [--run RUN] [--out DIR]

Each checkout, one after the other and with one thread, runs three parts. `toy`: all stages of its tests/toy. `steps`:
three steps of the dapo stage of its recipes/ml100k, on the earlier stages of a finished run. `commands`: probe,
replay, rank and inspect on these two. Then files and printed lines are compared: text and integers exactly, floats to
1e-6. RENAMED lists what has another name now, VOLATILE what differs between any two runs, EXCEPTIONS what may differ,
with the reason. Prints the first difference and a count for each part; exit code 1 when there is a difference.

With --out the folder is kept, and what OLD_CHECKOUT has made in it is not made again.
"""

import argparse
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

from rerank.rows import read_records

TOLERANCE = 1e-6
TIMEOUT = 150 * 60  # seconds of one command
BEFORE_DAPO = ("data", "semantic_ids", "midtrain", "candidates", "traces", "sft")
PARTS = ("toy", "steps", "commands")

# Names of keys, columns and words of a line: a pattern and the name today.
RENAMED = {
    r"target_rank_before": "target_rank",
    r"reward_gates": "conditions",
    r"\bgate/": "condition/",
    r"soft_overlong_punishment_reward": "overlong",
    r"masks?_first": "constrained",
}
ADDED = ("fields", "max_completion_tokens", "top_k", "positive_rank", "positive_rank_after")  # columns of rollouts
REMOVED = ("traces/features.json",)  # files
# Keys and columns that no two runs share, then such parts of a line.
VOLATILE = re.compile(r"(\w+_)?seconds(_per_row)?|\w+_per_second|\w+_runtime|step_time|ms/row|id|inputs|run_dir")
VOLATILE_TEXT = {r"\b\d+(\.\d+)? (s|ms|seconds|min|minutes)\b|\b(\w+_)?seconds [\d.,]+": "TIME"}
NOT_READ = {".bin", ".pth", ".lock"}  # pickles of whole objects
UNORDERED = re.compile(r"checkpoints\w*/README\.md|commands/replay_\w+\.txt")  # tags of TRL, rewards by name
# Why something may differ, and a pattern of the places (`part/file: place: old | new`) where it may.
EXCEPTIONS = {
    "midtrained, where candidates tie within 1e-5": r"^\S*evaluate/\S+: .*midtrained|^commands/run.txt: .*midtrained",
    "recipes are spelled anew, and leave out defaults": (
        r"/(recipe\.yaml|stage\.json): .*(rewards|overlong_tokens|invalid_reward|TOY_DATA)|"
        r"/recipe\.yaml: \w+: .*(?<=: |\| )missing|/stage\.json: given: \w+: .* \| missing"
    ),
    "overlong has a condition, as every reward": r"(conditions?(: |/)|charts: \d+: data: )overlong: missing",
    "results name their metrics and count lists; every difference is in bar.json": (
        r"evaluate/results\.json: (metrics|list_recall|n_all_relevant|n_without_relevant): missing|"
        r"evaluate/bar\.json: missing"
    ),
    "prompts have further options": r"/prompt\.json: \w+: missing",
    "the outcome follows from the rows where a recipe names none": r"/recipe\.yaml: outcome: 'rank_gain' \| None",
    "the page tells the places of the best positive": r"rollout_fields: \d+: 'target_rank(_after)?' \| 'positive_rank",
    "words": r"such as `when: |'Share of items whose prefix holds",
}


@dataclass(frozen=True)
class Side:
    """A checkout and the folder of what it makes."""

    checkout: Path
    folder: Path

    def run(self, *words: str, name: str | None = None, codes: Sequence[int] = (0,)) -> None:
        """Run `python WORDS` in the checkout; with a name, keep what it prints in NAME.txt.

        Raises:
            SystemExit: When it ends with another exit code than these, with its last lines.
        """
        variables = {"PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        variables["TOY_DATA"] = str(self.folder.parent / "toy_data")  # where an old recipe looks for it
        print(f"{self.folder.name}: {' '.join(words)}", flush=True)
        options = {"cwd": self.checkout, "env": {**os.environ, **variables}, "timeout": TIMEOUT}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
        if done.returncode not in codes:
            raise SystemExit(f"{' '.join(words)} in {self.checkout} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        if name:
            said = [line for line in done.stderr.splitlines() if line.startswith("rerank: ")]
            text = "\n".join([f"exit code {done.returncode}", done.stdout, *said]) + "\n"
            (self.folder / "commands" / f"{name}.txt").write_text(self.without_paths(text))

    def rerank(self, *words: str, **options: Any) -> None:
        """Run `rerank WORDS`."""
        self.run("-m", "rerank.cli", *words, **options)

    def without_paths(self, text: str) -> str:
        """A text whose paths do not tell the two sides apart."""
        return text.replace(str(self.folder), "OUT").replace(str(self.checkout), "CHECKOUT")


# --- what each side makes


def make_steps(side: Side, run: Path) -> None:
    """Three steps of the dapo stage after the stages of a finished run."""
    folder = side.folder / "steps"
    folder.mkdir(exist_ok=True)
    for stage in BEFORE_DAPO:
        if not (folder / stage).exists():
            (folder / stage).symlink_to(run / stage)
    launch = ("-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml", "-m", "rerank.dapo")
    side.run(*launch, "--config", "recipes/ml100k/7_dapo.yaml", f"--run_dir={folder}", "--max_steps=3")


def make_outputs(side: Side) -> None:
    """What the commands print and write about both runs."""
    folder = side.folder / "commands"
    folder.mkdir()
    side.rerank("run", "tests/toy", "--out", str(side.folder / "toy"), name="run")
    for name, recipes in (("toy", "tests/toy"), ("steps", "recipes/ml100k")):
        run, recipe = str(side.folder / name), f"{recipes}/7_dapo.yaml"
        rows = write_rows(Path(run), folder / f"rows_{name}.jsonl")
        side.rerank("inspect", run, "--limit", "20", name=f"inspect_{name}")
        side.rerank("probe", recipe, "--run-dir", run, "--rows", "50", name=f"probe_{name}", codes=(0, 1))
        out = str(folder / f"replay_{name}.parquet")
        side.rerank("replay", run, "--rewards", recipe, "--out", out, name=f"replay_{name}")
        out = str(folder / f"ranked_{name}.jsonl")
        side.rerank("rank", f"{run}/dapo/model", "--rows", str(rows), "--out", out, name=f"rank_{name}")


def write_rows(run: Path, path: Path, number: int = 20) -> Path:
    """The first test rows of a run, as `rerank rank` takes new ones."""
    names = pq.read_table(run / "data/items.parquet").sort_by("item")["item_id"].to_pylist()
    rows = read_records(run / "candidates/test.parquet")[:number]
    lines = [
        json.dumps({key: [names[item] for item in row[key]] for key in ("history", "candidates")}) for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make(side: Side, run: Path) -> None:
    """Everything that is not there yet."""
    side.folder.mkdir(parents=True, exist_ok=True)
    if (side.folder / "complete").exists():
        print(f"{side.folder.name}: as it is in {side.folder}")
        return
    side.rerank("run", "tests/toy", "--out", str(side.folder / "toy"))
    make_steps(side, run)
    shutil.rmtree(side.folder / "commands", ignore_errors=True)
    make_outputs(side)
    (side.folder / "complete").touch()


# --- files as values


JSON = re.compile(r'<script type="application/json" id="(\w+)">(.*?)</script>', re.DOTALL)
TAGS = {  # what stands for the tags of a page, in this order
    r"(?s)<(script|style)\b.*?</\1>": "",
    r"\s+": " ",
    r"<t[dh]\b[^>]*>": "| ",
    r"</tr>": "|",
    r"<(/|b\b|small\b|a\b|code\b|i\b|span\b|dd\b)[^>]*>": " ",  # ends no line
    r"<(?!table\b)[^>]*>": "\n",
    r"\s*\n\s*": "\n",
    r"<table\b[^>]*>": "\n\n",  # what ends a table
}


def read_page(text: str) -> dict[str, Any]:
    """The lines of a page, table rows as `| a | b |`, and the JSON in it by its id."""
    data = {name: json.loads(replaced(content, RENAMED)) for name, content in JSON.findall(text)}
    return {"text": read_lines(html.unescape(replaced(text, TAGS))), **data}


def read_lines(text: str) -> list[Any]:
    """The lines as words without rules and frames; of Markdown tables mappings by the head."""
    lines, heads = [], []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [shown(cell) for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
            heads = heads or cells
            is_table = len(cells) == len(heads) == len(set(heads))
            lines.append(dict(zip(heads, cells, strict=True)) if is_table else cells)
        else:
            heads = []
            lines.append(shown(line))
    return [line for line in lines if line]


def shown(line: str) -> str:
    """A line without frames, spaces and times, under the names of today."""
    words = " ".join(re.sub(r"[\u2500-\u257f]", " ", line).split())
    return replaced(replaced(words, RENAMED), VOLATILE_TEXT)


def replaced(text: str, table: dict[str, str]) -> str:
    """A text with each pattern replaced by what the table has for it, one after the other."""
    for pattern, put in table.items():
        text = re.sub(pattern, put, text)
    return text


BINARY = {
    ".parquet": lambda path: pq.read_table(path).to_pylist(maps_as_pydicts="strict"),
    ".npz": lambda path: dict(np.load(path)),
    ".npy": np.load,
    ".safetensors": lambda path: {name: tensor.float() for name, tensor in load_file(path).items()},
    ".pt": lambda path: torch.load(path, weights_only=True),
}
TEXT = {
    ".json": json.loads,
    ".jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    ".yaml": yaml.safe_load,
    ".html": read_page,
}


def read(path: Path, side: Side) -> Any:
    """A file's content: mappings, lists, arrays, numbers and text."""
    if path.suffix in BINARY:
        return BINARY[path.suffix](path)
    content = TEXT.get(path.suffix, read_lines)(side.without_paths(path.read_text()))
    return sorted(content) if UNORDERED.search(str(path)) else content


# --- comparing


@dataclass
class Found:
    """What a comparison of a part finds."""

    files: int = 0
    values: int = 0
    excepted: Counter = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def differ(self, place: str, old: Any, new: Any) -> None:
        """Note a difference, under its reason where there is one."""
        text = f"{place}: {_short(old)} | {_short(new)}"
        reason = next((reason for reason, pattern in EXCEPTIONS.items() if re.search(pattern, text)), None)
        if reason:
            self.excepted[reason] += 1
        else:
            self.differences.append(text)


def _short(value: Any) -> str:
    text = value if value is MISSING else repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


MISSING = "missing"


def compare(old: Any, new: Any, place: str, found: Found) -> None:
    """Walk two values side by side."""
    if isinstance(old, np.ndarray | torch.Tensor) and isinstance(new, np.ndarray | torch.Tensor):
        _compare_arrays(_array(old), _array(new), place, found)
    elif isinstance(old, dict) and isinstance(new, dict):
        old, new = ({shown(str(key)): value for key, value in one.items()} for one in (old, new))
        for key in dict.fromkeys([*old, *new]):
            if not VOLATILE.fullmatch(key) and not (key in ADDED and key not in old):
                compare(old.get(key, MISSING), new.get(key, MISSING), f"{place}: {key}", found)
    elif _by_name(old) and _by_name(new):
        compare(_by_name(old), _by_name(new), place, found)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if len(old) != len(new):
            found.differ(f"{place}: length", len(old), len(new))
        for number, pair in enumerate(zip(old, new, strict=False)):
            compare(*pair, f"{place}: {number}{_name(pair[0])}", found)
    else:
        found.values += 1
        if not _same(old, new):
            found.differ(place, old, new)


def _by_name(value: Any) -> dict[str, Any]:
    """A list of named things, such as the curves of a chart, as a mapping; an empty one for anything else."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) and "name" in entry for entry in value):
        return {}
    found = {str(entry["name"]): entry for entry in value}
    return found if len(found) == len(value) else {}


def _name(row: Any) -> str:
    """What a row of a table is about, where it says so."""
    names = ("ranker", "row_id") if isinstance(row, dict) else ()
    return "".join(f" {name} {row[name]}" for name in names if name in row)


def _array(value: np.ndarray | torch.Tensor) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.detach().float().numpy()


def _compare_arrays(old: np.ndarray, new: np.ndarray, place: str, found: Found) -> None:
    found.values += old.size
    if old.shape != new.shape or old.dtype.kind != new.dtype.kind:
        found.differ(f"{place}: shape and type", (old.shape, str(old.dtype)), (new.shape, str(new.dtype)))
        return
    near = {"rtol": TOLERANCE, "atol": TOLERANCE, "equal_nan": True}
    same = np.isclose(old, new, **near) if old.dtype.kind == "f" else old == new
    for index in np.argwhere(~same)[:1].tolist():
        found.differ(f"{place}: {index}", old[tuple(index)], new[tuple(index)])


def _same(old: Any, new: Any) -> bool:
    """Equal, floats to TOLERANCE (beyond 1 relative); nan equals nan."""
    if isinstance(old, float) and isinstance(new, float):
        near = math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        return near or (math.isnan(old) and math.isnan(new))
    return type(old) is type(new) and old == new


def compare_part(part: str, sides: tuple[Side, Side]) -> Found:
    """All files of a part; of `steps` those of the dapo stage, the others being the same."""
    folders = [side.folder / part / ("dapo" if part == "steps" else "") for side in sides]
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in folders]
    found = Found()
    for name in sorted(names[0] | names[1]):
        place = f"{part}/{name}"
        if name in REMOVED and name not in names[1] or Path(name).suffix in NOT_READ:
            continue
        if name not in names[0] or name not in names[1]:
            found.differ(place, *("there" if name in of_side else MISSING for of_side in names))
            continue
        found.files += 1
        compare(*(read(folder / name, side) for folder, side in zip(folders, sides, strict=True)), place, found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, compare, and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument("--run", type=Path, help="finished run of the demo; OLD_CHECKOUT/runs/ml100k by default")
    parser.add_argument("--out", type=Path, help="folder to keep; a temporary one by default")
    args = parser.parse_args(argv)
    run = (args.run or args.old / "runs/ml100k").resolve()
    with tempfile.TemporaryDirectory() as temporary:
        out = (args.out or Path(temporary)).resolve()
        old, new = Side(args.old.resolve(), out / "old"), Side(args.new.resolve(), out / "new")
        shutil.rmtree(new.folder, ignore_errors=True)
        shutil.copytree(Path(__file__).with_name("toy"), out / "toy_data", dirs_exist_ok=True)
        for side in (old, new):
            make(side, run)
        parts = {part: compare_part(part, (old, new)) for part in PARTS}
    for part, found in parts.items():
        if found.differences:
            print(f"{part}: first difference (old | new): {found.differences[0]}")
        named = "".join(f"; {number} named: {reason}" for reason, number in found.excepted.items())
        print(f"{part}: {found.files} files, {found.values:,} values, {len(found.differences)} differences{named}")
    return int(any(found.differences for found in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
