"""Peers of the benchmark `scale`: an earlier commit of this project, and the same counts in Polars, streaming."""

import importlib.util
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

FORWARD, BACKWARD, NEAR = (60, 30, 20), (18, 9, 6), 10  # of `rerank.baselines`: sixtieths, and places apart
MOST_INTERACTIONS = 10_000_000  # of a cell that peers are asked for


def tree_of(commit: str, root: Path, folder: Path) -> Path | None:
    """The files of a commit of the repository at `root`, in `folder`; None where git does not have it."""
    packed = folder / "tree.tar"
    with packed.open("wb") as file:
        done = subprocess.run(["git", "-C", str(root), "archive", commit], stdout=file, stderr=subprocess.DEVNULL)
    if done.returncode:
        return None
    with tarfile.open(packed) as archive:
        archive.extractall(folder / "tree", filter="data")
    return folder / "tree"


def has_polars() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("polars") is not None


def count_by_polars(interactions: str, folder: str) -> None:
    """Write transitions, successors and near of a run's training interactions into a folder; print their totals."""
    import polars as pl

    rows = pl.scan_parquet(interactions).filter(pl.col("split").is_in(["train", "rerank"]))
    ordered = rows.sort("user", "position").select("user", "item")
    steps = []
    for distance in range(1, NEAR + 1):
        after = pl.col("item").shift(-distance)
        pairs = ordered.select(
            pl.col("item").alias("first"),
            after.alias("second"),
            same=pl.col("user") == pl.col("user").shift(-distance),
        ).filter("same")
        at_place = distance <= len(FORWARD)
        weights = (FORWARD[distance - 1], BACKWARD[distance - 1]) if at_place else (0, 0)
        for names, weight in zip((("first", "second"), ("second", "first")), weights, strict=True):
            is_next = int(distance == 1 and names[0] == "first")
            steps.append(
                pairs.select(
                    pl.col(names[0]).alias("item"),
                    pl.col(names[1]).alias("other"),
                    pl.lit(weight).alias("transitions"),
                    pl.lit(is_next).alias("successors"),
                    pl.lit(1).alias("near"),
                )
            )
    path = Path(folder) / "pairs.parquet"
    counts = pl.concat(steps).group_by("item", "other").sum()
    counts.sink_parquet(path)
    totals = pl.scan_parquet(path).select("transitions", "successors", "near").sum().collect().row(0)
    print(json.dumps(totals))


def main() -> None:
    """Count in this process."""
    begun = time.perf_counter()
    count_by_polars(*sys.argv[1:])
    print(f"{time.perf_counter() - begun:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
