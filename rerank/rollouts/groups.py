"""Groups of rollouts, listed by DuckDB from the few columns that a list shows and read whole one at a time.

The terminal browser, the printed view and the report read a run through `RolloutGroups`. A filter is a DuckDB
expression over the columns of `schema.SCHEMA`; a group is listed when one of its rollouts meets it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from rerank.catalogue import Catalogue
from rerank.rollouts.schema import GROUP_KEYS, SCHEMA, Rollout
from rerank.rollouts.store import open_rollouts
from rerank.rollouts.text import visible

Line = dict[str, Any]  # of the list: one value a column
COLUMNS = (  # of the list
    *GROUP_KEYS,
    *("row_id", "user", "rollouts", "kept", "discarded", "best", "mean", "failures", "before", "after", "matching"),
)
COLUMNS_AGAINST = (  # of the list beside another run's
    *("step", "row_id", "user", "before", "after", "other_after", "mean", "other_mean", "difference", "best"),
    *("other_best", "failures", "other_failures", "other_step", "round", "group", "kept", "discarded", "matching"),
)
_LIST = """
SELECT step, round, "group", any_value(row_id) AS row_id, any_value("user") AS "user", count(*) AS rollouts,
    count(*) FILTER (kept) AS kept, any_value(discard_reason) AS discarded, max(reward) AS best, avg(reward) AS mean,
    count(failure) AS failures, any_value(positive_rank) AS "before", min(positive_rank_after) AS after,
    count(*) FILTER ({where}) AS matching
FROM rollouts GROUP BY step, round, "group" HAVING matching > 0
"""
_JOIN = """
WITH latest AS (
    FROM other_list QUALIFY row_number() OVER (PARTITION BY row_id ORDER BY step DESC, round DESC, "group") = 1
)
SELECT listed.*, latest.step AS other_step, latest.round AS other_round, latest.group AS other_group,
    latest.best AS other_best, latest.mean AS other_mean, latest.failures AS other_failures,
    latest.after AS other_after, listed.mean - latest.mean AS difference
FROM ({listed}) AS listed JOIN latest USING (row_id) {condition}
"""


def find_catalogue(run_dir: str | Path) -> Catalogue | None:
    """The catalogue of a run, given as the run, its dapo folder or the folder of the parts; None without one."""
    folder = Path(run_dir).resolve()
    for run in (folder, *folder.parents[:2]):
        if (run / "dapo/model/catalogue.parquet").is_file():
            return Catalogue.load(run / "dapo/model")
        if (run / "semantic_ids/semantic_ids.parquet").is_file():
            return Catalogue.load(run)
    return None


class RolloutGroups:
    """The groups of a run, and beside each the latest group of the same row in another run, if one is given.

    Args:
        run_dir: A run, its dapo folder (finished or partial), or the folder of the parts.
        against: The other run; the same one to compare a row with its last visit.
        against_step: The last step of the other run that counts: its policy as it was then.

    Raises:
        ValueError: When a run has no readable rollouts, or the two have no row in common.
    """

    def __init__(
        self, run_dir: str | Path, against: str | Path | None = None, against_step: int | None = None
    ) -> None:
        self.run_dir, self.against = Path(run_dir), None if against is None else RolloutGroups(against)
        if self.against is not None and against_step is not None:
            self.against.filter(f"step <= {against_step}")
        self.catalogue = find_catalogue(run_dir)
        self.columns = COLUMNS if against is None else COLUMNS_AGAINST
        self.rollouts = open_rollouts(run_dir)
        self.where, self.num_groups = "", 0
        self.filter("")
        if self.num_groups == 0 and against_step is not None:
            raise ValueError(f"{run_dir} has no row that {against} met up to step {against_step}; give a later step")
        if self.num_groups == 0 and self._is_against_itself():
            raise ValueError(f"{run_dir} met no row twice, so that it cannot be held against itself; give another run")
        if self.num_groups == 0:
            raise ValueError(f"{run_dir} and {against} have no row in common; give two runs of one recipe's rows")

    def _is_against_itself(self) -> bool:
        return self.against is not None and self.against.run_dir.resolve() == self.run_dir.resolve()

    def filter(self, where: str) -> None:
        """List the groups in which a rollout meets `where`, all for an empty one.

        Raises:
            ValueError: When `where` is no condition on the columns of a rollout.
        """
        condition = f"({where}\n)" if where.strip() else "(true)"  # the new line ends a comment
        connection = self.rollouts.connection
        try:
            duckdb.SQLExpression(condition)  # refuses what is more than one expression
            ((_, kind, *_),) = connection.execute(f"DESCRIBE SELECT {condition} FROM rollouts").fetchall()
            if kind not in ("BOOLEAN", '"NULL"'):
                raise ValueError(f'{where!r} is no filter: its values are {kind}; write one such as "kept = false"')
            self._list(condition)
        except duckdb.Error as error:
            self.rollouts.refuse_damaged(error)
            reason = visible(" ".join(str(error).split("\n\n")[0].split()))[:300]  # it may quote a completion
            columns = f" (columns: {', '.join(SCHEMA.names)})" if isinstance(error, duckdb.BinderException) else ""
            raise ValueError(f'{where!r} is no filter: {reason}{columns}; write one such as "kept = false"') from None
        self.where = where
        self.num_groups = self.rollouts.query("SELECT count(*) AS n FROM listed")["n"][0].as_py()

    def _list(self, condition: str) -> None:
        """Make the table `listed`."""
        listed, connection = _LIST.format(where=condition), self.rollouts.connection
        if self.against is not None:
            connection.register("other_list", self.against.rollouts.query("SELECT * FROM listed"))
            keys = " AND ".join(f'listed."{key}" = latest."{key}"' for key in GROUP_KEYS)
            listed = _JOIN.format(listed=listed, condition=f"WHERE NOT ({keys})" if self._is_against_itself() else "")
        connection.execute(f"CREATE OR REPLACE TEMP TABLE listed AS {listed}")

    def page(self, sort: str = "step", descending: bool = True, offset: int = 0, limit: int = 200) -> list[Line]:
        """Lines of the list, sorted by a column, then by step (latest first) and group."""
        order = f'"{sort}" {"DESC" if descending else "ASC"} NULLS LAST, step DESC, round DESC, "group"'
        return self.rollouts.records(f"SELECT * FROM listed ORDER BY {order} LIMIT {limit} OFFSET {offset}")

    def read(self, line: Mapping[str, Any]) -> list[Rollout]:
        """The rollouts of a line's group, those that meet the filter (`matches`) first, then by reward, best first."""
        key = " AND ".join(f'"{name}" = {line[name]}' for name in GROUP_KEYS)
        matches = f"coalesce(({self.where}\n), false)" if self.where.strip() else "true"
        columns = f"* EXCLUDE (completion_ids, policy_logps, sampling_logps), {matches} AS matches"
        order = "ORDER BY matches DESC, reward DESC, completion"
        return self.rollouts.records(f"SELECT {columns} FROM rollouts WHERE {key} {order}")

    def read_other(self, line: Mapping[str, Any]) -> list[Rollout]:
        """The rollouts of the other run's group beside a line's."""
        assert self.against is not None
        return self.against.read({name: line[f"other_{name}"] for name in GROUP_KEYS})
