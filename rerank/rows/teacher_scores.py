"""A teacher's scores of the candidates of training rows, which the traces stage writes and losses may learn from."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch import run_dir
from rerank.launch.files import write_whole

FILE = "scores.parquet"


def write_scores(folder: Path, scores: Mapping[int, Sequence[float] | np.ndarray]) -> None:
    """Write the scores of each row's candidates, by row_id, into the folder of the traces stage."""
    table = pa.table({"row_id": list(scores), "scores": [list(map(float, of_row)) for of_row in scores.values()]})
    write_whole(folder / FILE, partial(pq.write_table, table))


def read_scores(run: str | Path) -> dict[int, list[float]]:
    """The scores that `write_scores` wrote in a run; none where its teacher has none."""
    path = run_dir.stage_dir(run, "traces") / FILE
    if not path.is_file():
        return {}
    columns = pq.read_table(path).to_pydict()
    return dict(zip(columns["row_id"], columns["scores"], strict=True))
