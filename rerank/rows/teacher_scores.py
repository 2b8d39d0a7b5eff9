"""A teacher's scores of the candidates of training rows, which the traces stage writes and losses may learn from.

R rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    ends = np.cumsum([0, *map(len, scores.values())])
    flat = np.concatenate([np.asarray(of_row, dtype=float) for of_row in [*scores.values(), ()]])
    table = pa.table({"row_id": list(scores), "scores": pa.ListArray.from_arrays(ends, flat)})
    write_whole(folder / FILE, partial(pq.write_table, table))


@dataclass(frozen=True)
class TeacherScores(Mapping[int, list[float]]):
    """Scores of the candidates of rows, by row_id, ascending, in two arrays.

    Attributes:
        row_ids: (R,).
        scores: R lists.
    """

    row_ids: np.ndarray
    scores: pa.ListArray

    def __len__(self) -> int:
        return len(self.row_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.row_ids.tolist())

    def __getitem__(self, row_id: int) -> list[float]:
        place = int(np.searchsorted(self.row_ids, row_id))
        if place == len(self.row_ids) or self.row_ids[place] != row_id:
            raise KeyError(row_id)
        found: list[float] = self.scores[place].as_py()
        return found


def read_scores(run: str | Path) -> TeacherScores:
    """The scores that `write_scores` wrote in a run; none where its teacher has none."""
    return scores_in(run_dir.stage_dir(run, "traces"))


def scores_in(folder: Path) -> TeacherScores:
    """The scores that `write_scores` wrote in a folder, if any."""
    path = folder / FILE
    if not path.is_file():
        return TeacherScores(np.zeros(0, dtype=np.int64), pa.array([], pa.list_(pa.float64())))
    table = pq.read_table(path).sort_by("row_id").combine_chunks()
    return TeacherScores(table["row_id"].to_numpy(), pa.chunked_array(table["scores"]).combine_chunks())
