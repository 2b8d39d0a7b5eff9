"""Seconds, memory and disk of the stages data and candidates as the log grows, and the exponents between sizes.

    python -m tests.benchmarks.scale --interactions 100000000 --items 1000000
    python -m tests.benchmarks.scale --cells 1M,10k 10M,100k --before aacb4c7 --out scale.json
    python -m tests.benchmarks.scale --project 1000000000 --out scale.json

A synthetic log (`scale_log`) is written out of core, then each stage is run as users do, `rerank run --only STAGE`, in
a process of its own, watched with all processes below it. Candidates are counts, lists and features of up to a million
rows to rank; the counts' seconds stand beside. Sizes are a hundredth and a tenth of the interactions and items, both,
and a tenth of the interactions with all items. The exponent of a stage between two sizes of equal proportions is
log(seconds / seconds) / log(interactions / interactions), that of the counts alone too; the worst is between the two
largest. Peers at up to ten million interactions, as ratios of ours to theirs (below 1 is better): a commit before
(--before), and the counts alone in Polars, streaming, where it is installed (memory against that of the whole stage).
For these sizes it also has what the cut of counts changes (`scale_cut`). --ids N adds semantic ids of N given
embeddings. A busy machine, or one with too little disk, is refused; after MINUTES no further command is started and
the one that runs is killed. Ends with one JSON line.
"""

import argparse
import importlib.util
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rerank.baselines.pairs import MANY_ITEMS
from tests.benchmarks import scale_peers as peers
from tests.benchmarks.busy import busy_share, refuse_busy
from tests.benchmarks.scale_log import write_log
from tests.benchmarks.scale_watch import GB, Watched, watch

ROOT = Path(__file__).parents[2]
STAGES = ("data", "candidates")
MINUTES = 150
SHOWN = ("seconds", "cpu_seconds", "peak_gb", "written_gb", "spilled_gb")
DISK_PER_INTERACTION = 400  # bytes: the log, the tables, and what is spilled
UNITS = {"k": 10**3, "M": 10**6, "G": 10**9}
Cell = tuple[int, int]  # interactions and items
Record = dict[str, Any]


def number(text: str) -> int:
    """`10k`, `1M`, `1G` or a plain number."""
    return int(float(text[:-1]) * UNITS[text[-1]]) if text[-1] in UNITS else int(text)


def cells_of(interactions: int, items: int, chosen: Sequence[str]) -> list[Cell]:
    """The sizes to measure: those chosen, or a hundredth, a tenth, all, and a tenth of the interactions alone."""
    if chosen:
        return [(number(first), number(second)) for first, second in (cell.split(",") for cell in chosen)]
    ladder = [(interactions // part, items // part) for part in (100, 10, 1)]
    return [*ladder, (interactions // 10, items)]


def refuse_full(cells: Sequence[Cell], folder: Path) -> None:
    """End where the largest size does not fit on the disk."""
    needed, free = max(cells)[0] * DISK_PER_INTERACTION, shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / GB:.0f} GB free, and {max(cells)[0]} interactions need {needed / GB:.0f} GB; free "
            "some, set TMPDIR to another disk, or name smaller --cells"
        )


class Bench:
    """What runs the commands of one invocation, until its time is over."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.end = folder, time.monotonic() + 60 * MINUTES

    def watch(self, words: Sequence[str], tree: Path, folders: Sequence[Path], spill: Path) -> Watched:
        """Run Python with `words` on the code of a tree; temporary files go into `spill`."""
        spill.mkdir(parents=True, exist_ok=True)
        env = {"PYTHONPATH": str(tree), "TMPDIR": str(spill)}
        return watch([sys.executable, *words], tree, env, [*folders, spill], max(self.end - time.monotonic(), 0))

    def stages(self, cell: Path, run: Path, tree: Path) -> dict[str, Record]:
        """A record of each stage, up to the first that fails."""
        found: dict[str, Record] = {}
        for stage in STAGES:
            words = ["-m", "rerank.cli", "run", str(cell / "recipe"), "--out", str(run), "--only", stage]
            found[stage] = asdict(self.watch(words, tree, [run], cell / "spill"))
            if found[stage]["failed"]:
                break
            metrics = json.loads((run / stage / "metrics.json").read_text())
            found[stage] |= {key: metrics[key] for key in metrics if key.endswith("_seconds")}
            found[stage]["rows"] = {name: of["rows"] for name, of in metrics.get("splits", {}).items()}
        return found

    def polars(self, cell: Path, run: Path, stages: Mapping[str, Record]) -> Record:
        """The counts in Polars, with the ratios of ours to theirs."""
        if not peers.has_polars():
            return {"failed": "polars is not installed; pip install polars"}
        out = cell / "polars"
        out.mkdir()
        words = ["-m", "tests.benchmarks.scale_peers", str(run / "data/interactions.parquet"), str(out)]
        theirs = asdict(self.watch(words, ROOT, [out], cell / "spill"))
        ours = stages["candidates"]
        return theirs | ratios({"seconds": ours["counts_seconds"], "peak_gb": ours["peak_gb"]}, theirs)

    def measure(self, cell: Cell, tree: Path | None, before: str) -> Record:
        """All of one size."""
        folder = self.folder / f"{cell[0]}_{cell[1]}"
        begun = time.monotonic()
        write_log(folder, *cell)
        record: Record = {"interactions": cell[0], "items": cell[1], "write_seconds": time.monotonic() - begun}
        record["stages"] = self.stages(folder, folder / "run", ROOT)
        if cell[0] <= peers.MOST_INTERACTIONS and is_whole(record["stages"]):
            record["peers"] = {"polars": self.polars(folder, folder / "run", record["stages"])}
            if before:
                record["peers"][before] = self.before(folder, tree, record["stages"])
            if cell[1] >= MANY_ITEMS:
                record["cut"] = last_json(self, "tests.benchmarks.scale_cut", "--run", str(folder / "run"))
        shutil.rmtree(folder)
        return record

    def before(self, cell: Path, tree: Path | None, ours: Mapping[str, Record]) -> Record:
        """The stages at an earlier commit, with the ratios of ours to theirs."""
        if tree is None:
            return {"failed": "git does not have this commit"}
        theirs = self.stages(cell, cell / "run_before", tree)
        return {stage: of if of["failed"] else of | ratios(ours[stage], of) for stage, of in theirs.items()}


def is_whole(stages: Mapping[str, Record]) -> bool:
    """Whether every stage ended with a result."""
    return len(stages) == len(STAGES) and not any(of["failed"] for of in stages.values())


def ratios(ours: Mapping[str, float], theirs: Record) -> dict[str, float]:
    """Of seconds and of memory; nothing where theirs failed."""
    if theirs["failed"]:
        return {}
    return {f"{key}_ratio": ours[key] / theirs[key] for key in ("seconds", "peak_gb")}


def exponents(records: Sequence[Record], key: str = "seconds") -> list[dict[str, float]]:
    """By stage, between each two neighbouring sizes of equal proportions that both have a result."""
    whole = sorted((of for of in records if is_whole(of["stages"])), key=lambda of: of["interactions"])
    largest = whole[-1] if whole else {}
    ladder = [of for of in whole if of["interactions"] * largest["items"] == of["items"] * largest["interactions"]]
    found = []
    for first, second in pairwise(ladder):
        less, more = (values(of["stages"], key) for of in (first, second))
        growth = math.log(second["interactions"] / first["interactions"])
        found.append(
            {name: math.log(more[name] / less[name]) / growth for name in less if less[name] * more[name] > 0}
        )
    return found


def values(stages: Mapping[str, Record], key: str) -> dict[str, float]:
    """Of each stage, and the seconds of the counts alone, where they were taken."""
    counts = stages["candidates"].get("counts_seconds", 0)
    return {stage: stages[stage][key] for stage in STAGES} | ({"counts": counts} if key == "seconds" else {})


def summary(records: Sequence[Record]) -> Record:
    """The figures of the largest size and the worst exponent between the two largest."""
    whole = [of for of in records if is_whole(of["stages"])]
    if not whole:
        return {"peak_gb": None, "minutes": None, "worst_exponent": None}
    largest, found = max(whole, key=lambda of: (of["interactions"], of["items"])), exponents(records)
    stages = largest["stages"].values()
    return {
        "peak_gb": max(of["peak_gb"] for of in stages),
        "minutes": sum(of["seconds"] for of in stages) / 60,
        "worst_exponent": max(found[-1].values()) if found else None,
    }


def project(interactions: int, result: Record) -> list[str]:
    """Lines on a larger log, by the exponents between the two largest sizes measured.

    Args:
        interactions: Of the larger log.
        result: The JSON of a measurement.
    """
    records = [of for of in result["cells"] if is_whole(of["stages"])]
    of_seconds, of_memory = exponents(records), exponents(records, "peak_gb")
    if not of_seconds:
        raise SystemExit("the result has no two sizes of equal proportions; measure 10M,100k and 100M,1M")
    largest = max(records, key=lambda of: (of["interactions"], of["items"]))
    factor = interactions / largest["interactions"]
    lines = [f"Arithmetic, not a measurement: {interactions:,} interactions from {largest['interactions']:,} by the "
             "exponents between the two largest sizes."]  # fmt: skip
    for stage, of in largest["stages"].items():
        counts = of.get("counts_seconds", 0)  # beside them are the rows to rank, which stay a million
        growth = factor ** of_seconds[-1]["counts" if counts else stage]
        hours = (of["seconds"] + (counts or of["seconds"]) * (growth - 1)) / 3600
        memory = of["peak_gb"] * factor ** of_memory[-1][stage]
        disk = (of["written_gb"] + of["spilled_gb"]) * factor
        power, of_memory_power = math.log(growth, factor), of_memory[-1][stage]
        lines.append(f"{stage}: {hours:.1f} hours (exponent {power:.2f}), {memory:.0f} GB of memory "
                     f"(exponent {of_memory_power:.2f}), {disk:.0f} GB written.")  # fmt: skip
    return lines


def last_json(bench: Bench, module: str, *words: str) -> Record:
    """The record that another benchmark ends with."""
    out = bench.folder / "out"
    code = f"import runpy, sys; sys.stdout = open({str(out)!r}, 'w'); sys.argv[1:] = {list(words)!r}; "
    done = bench.watch(
        ["-c", f"{code}runpy.run_module({module!r}, run_name='__main__')"], ROOT, [], bench.folder / "s"
    )
    return {"failed": done.failed} if done.failed else json.loads(out.read_text().splitlines()[-1])


def others(bench: Bench, num_ids: int) -> Record:
    """The first step of training from the benchmark `loader`, where there is one, and semantic ids where asked for."""
    found: Record = {"first_step_s": None, "first_step_gb": None}
    if importlib.util.find_spec("tests.benchmarks.loader"):
        loader = last_json(bench, "tests.benchmarks.loader")
        found = {key: loader.get(key) for key in found} | {"loader": loader}
    if num_ids:
        ids = last_json(bench, "tests.benchmarks.semantic_ids_scale", f"--num_items={num_ids}")
        seconds = ids.get("stage_seconds")
        found |= {"ids_minutes": seconds and seconds / 60, "ids_gb": ids.get("peak_gb"), "semantic_ids": ids}
    return found


def print_table(records: Sequence[Record]) -> None:
    """A line for each size and stage."""
    table = Table(title="stages by size; peak memory of all processes together")
    for column in ("interactions", "items", "stage", "seconds", "CPU seconds", "peak GB", "written GB", "spilled GB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for of in records:
        for stage, own in of["stages"].items():
            numbers = [f"{own[key]:.2f}" for key in SHOWN]
            table.add_row(f"{of['interactions']:,}", f"{of['items']:,}", f"{stage} {own['failed']}".strip(), *numbers)
    Console(width=119).print(table)


def main() -> None:
    """Print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=number, default=100_000_000, help="of the largest size (%(default)s)")
    parser.add_argument("--items", type=number, default=1_000_000, help="of the largest size (%(default)s)")
    parser.add_argument("--cells", nargs="+", default=[], metavar="N,ITEMS", help="sizes to measure in place of those")
    parser.add_argument("--before", default="", metavar="COMMIT", help="also measure this commit")
    parser.add_argument("--ids", type=number, default=0, metavar="N", help="also make semantic ids of N embeddings")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the JSON")
    parser.add_argument("--project", type=number, metavar="N", help="say what N interactions would take by --out")
    args = parser.parse_args()
    if args.project:
        if not (args.out and args.out.is_file()):
            raise SystemExit(f"--project reads --out, and {args.out} is not there; measure first")
        print("\n".join(project(args.project, json.loads(args.out.read_text()))))
        return
    cells = cells_of(args.interactions, args.items, args.cells)
    refuse_full(cells, Path(tempfile.gettempdir()))
    refuse_busy(busy_share())
    run(cells, args.before, args.ids, args.out)


def run(cells: Sequence[Cell], before: str = "", num_ids: int = 0, out: Path | None = None) -> None:
    """Measure the sizes and print what was found."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        tree = peers.tree_of(before, ROOT, bench.folder) if before else None
        records = [bench.measure(cell, tree, before) for cell in cells]
        result = summary(records) | others(bench, num_ids)
    print_table(records)
    result |= {"exponents": exponents(records), "cells": records}
    if out is not None:
        out.write_text(json.dumps(result, indent=2))
    print(json.dumps(result))
    failed = [name for name in ("loader", "semantic_ids") if result.get(name, {}).get("failed")]
    failed += [of["cut"]["failed"] for of in records if of.get("cut", {}).get("failed")]
    if failed or not all(is_whole(of["stages"]) for of in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
