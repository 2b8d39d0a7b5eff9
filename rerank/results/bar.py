"""Every difference of two rankers in every metric, with both ends of its interval: `bar.json`.

R rows, S seeds.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rerank.launch.files import write_text
from rerank.results.intervals import Sampling, holds

FILE = "bar.json"
Line = tuple[str, ...]  # words that name a ranker, its own name last
Lines = Mapping[Line, Mapping[str, np.ndarray]]


def every_difference(values: Lines, metrics: Sequence[str], sampling: Sampling) -> list[dict[str, Any]]:
    """Of every two rankers and metric the later ranker minus the earlier, on the same rows.

    Args:
        values: Rankers in the order of their table to metrics, (R,) or (S, R) each; NaN for a row that a seed lacks.
        metrics: Names.
        sampling: Of the rows.

    Returns:
        A record each: `ranker` and `minus`, with `variant` and `minus_variant` where a line has two words, `metric`,
        `n` rows, the `value` of each, their `difference` and its interval, `low` and `high`, None without one.
    """
    lines, records = list(values), []
    for metric in metrics:
        columns = [np.asarray(values[line][metric], dtype=float) for line in lines]
        means = [float(np.nanmean(column)) for column in columns]
        for (later, earlier), (difference, bounds) in sampling.differences(columns).items():
            record: dict[str, Any] = {
                **_named(lines[later], "ranker", "variant"),
                **_named(lines[earlier], "minus", "minus_variant"),
            }
            record |= {"metric": metric, "n": len(sampling.users), "value": means[later]}
            record |= {"minus_value": means[earlier], "difference": difference}
            ends = [None if math.isnan(bound) else bound for bound in bounds]
            records.append({**record, "low": ends[0], "high": ends[1]})
    return records


def write(
    path: Path,
    values: Lines,
    metrics: Sequence[str],
    sampling: Sampling,
    split: str,
    num_seeds: int = 1,
) -> None:
    """Write which rows the intervals rest on, how they are made, and `every_difference`, whose arguments these are."""
    num_users = len(np.unique(np.asarray(sampling.users)))
    about = {"split": split, "n": len(sampling.users), "users": num_users, "seeds": num_seeds}
    differences = every_difference(values, metrics, sampling)
    about |= {"intervals": holds(num_seeds), "metrics": list(metrics)}
    lines = ",\n    ".join(json.dumps(one, ensure_ascii=False) for one in differences)  # a line each
    text = json.dumps({**about, "differences": []}, indent=2, ensure_ascii=False)
    write_text(path, text.replace('"differences": []', f'"differences": [\n    {lines}\n  ]') + "\n")


def _named(line: Line, of_ranker: str, of_variant: str) -> dict[str, str]:
    return dict(zip((of_ranker, of_variant), line[::-1], strict=False))
