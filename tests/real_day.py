"""Two days of MovieLens-100K: a model trained by the stages on nine tenths of the films; the others come a day later.

Its lists hold a film that a user took among films that they did not, in random order. Prompts show each film's genres
and how often it was taken, in buckets.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from daily_run import make_stage
from tiny_model import sft_config
from toy_run import finish
from trl import ModelConfig

from rerank import candidates, data, sft, traces
from rerank.models import base as base_model
from rerank.models.names import locate
from rerank.prompts import THINK, THINK_END, PromptSettings
from rerank.rows import Prompter, TargetRows, read_rows

USERS, SIZE = 200, 5  # of a list
USER, ITEM = "user_id:token", "item_id:token"
SETTINGS = PromptSettings(task="short", evidence="codes", evidence_names=["popularity"], max_history=1,
                          item_fields=["category"], ranking="letter")  # fmt: skip
SHAPE = base_model.SmallModelArguments(hidden_size=48, num_layers=2, num_heads=2, num_kv_heads=2, context_length=512)
RECIPE = {
    "columns": {"user": "user_id", "item": "item_id", "time": "timestamp"},
    "item_columns": {"item": "item_id", "title": "movie_title", "category": "class"},
    "category_separator": " ", "num_rerank": 10, "num_test": 1, "num_valid": 1,
}  # fmt: skip
LOSSES = [{"name": "soft_targets", "kwargs": {"weight": 0.5}}]


@dataclass(frozen=True)
class RealDay:
    """The model of the first day, the files of the second, and lists of both: records with a `target` besides."""

    model: Path
    new_items: Path
    interactions: Path
    old_lists: list[dict]
    new_lists: list[dict]


def _read(kind: str) -> pd.DataFrame:
    """A file of MovieLens-100K as text."""
    path = locate(f"package:recbole/dataset_example/ml-100k/ml-100k.{kind}", "interactions")
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=3)


def _write(path: Path, table: pd.DataFrame) -> Path:
    table.to_csv(path, sep="\t", index=False, quoting=3)
    return path


def _list(rng: np.random.Generator, target: str, pool: list[str], taken: set[str]) -> list[str]:
    """The target among films of the pool that the user did not take."""
    drawn = dict.fromkeys(pool[place] for place in rng.integers(len(pool), size=50 * SIZE))
    others = [item for item in drawn if item not in taken]
    return rng.permutation([target, *others[: SIZE - 1]]).tolist()


def _make_lists(run: Path, log: pd.DataFrame, rng: np.random.Generator) -> tuple[Path, list[dict]]:
    """A list of each row of a run in a file, and those of its test rows as records."""
    ids = candidates.read_item_ids(run)
    users = pq.read_table(run / "data/users.parquet")["user_id"].to_pylist()
    taken = log.groupby(USER)[ITEM].agg(set)
    rows, histories = pq.read_table(run / "data/rows.parquet").to_pylist(), TargetRows.load(run).histories
    lists = [_list(rng, ids[row["target"]], ids, taken[users[row["user"]]]) for row in rows]
    pq.write_table(pa.table({"row_id": [row["row_id"] for row in rows], "candidates": lists}), run / "lists.parquet")
    records = [
        {"history": [ids[item] for item in history], "candidates": shown, "target": ids[row["target"]]}
        for row, history, shown in zip(rows, histories, lists, strict=True)
        if row["split"] == "test"
    ]
    return run / "lists.parquet", records


def _held_out(run: Path, log: pd.DataFrame) -> pd.Index:
    """The rows of the log that are a run's validation or test targets."""
    ids, users = candidates.read_item_ids(run), pq.read_table(run / "data/users.parquet")["user_id"].to_pylist()
    rows = pq.read_table(run / "data/interactions.parquet").to_pylist()
    pairs = {(users[row["user"]], ids[row["item"]]) for row in rows if row["split"] in ("valid", "test")}
    return log.index[[pair in pairs for pair in zip(log[USER], log[ITEM], strict=True)]]


def _train(run: Path, steps: int) -> Path:
    """The folder of a model that the sft stage trained, from random weights, on the first label."""
    prompter = Prompter.of_run(run)
    prompts = [prompter.message(row) for row in read_rows(run / "candidates/train.parquet", needs_features=True)]
    tokenizer = base_model.train_tokenizer(prompts, 400, list("ABCDE"))
    model = base_model.make_small_model(SHAPE, tokenizer, seed=0)
    base_model.add_tokens(model, tokenizer, [THINK, THINK_END], seed=0)
    model.save_pretrained(run / "base")
    tokenizer.save_pretrained(run / "base")
    args = sft.SftArguments(run_dir=str(run), losses=LOSSES, with_trace=False, eval_rows=8, keep="last")
    folder = run / "sft.partial"
    folder.mkdir()
    config = sft_config(
        folder / "checkpoints", max_steps=steps, max_length=512, learning_rate=5e-3, per_device_train_batch_size=32,
        lr_scheduler_type="cosine", warmup_steps=10,
    )  # fmt: skip
    metrics = sft.main(args, config, ModelConfig(model_name_or_path=str(run / "base")), folder)
    finish(folder.rename(run / "sft"), metrics)
    return run / "sft/model"


def make_real_day(folder: Path, steps: int) -> RealDay:
    """All of it."""
    rng = np.random.default_rng(0)
    log, items = _read("inter"), _read("item")
    log = log[log[USER].isin(rng.choice(log[USER].unique(), USERS, replace=False))]
    new = set(rng.choice(items[ITEM], len(items) // 10, replace=False).tolist())
    is_new, run = log[ITEM].isin(new), folder / "run"
    given = {"interactions": str(_write(folder / "log.inter", log[~is_new]))}
    given |= {"items": str(_write(folder / "old.item", items[~items[ITEM].isin(new)])), **RECIPE}
    make_stage(run, "data", data, data.DataArguments(run_dir=str(run), **given), given)
    file, old_lists = _make_lists(run, log, rng)
    given = {"source": "lists", "lists": str(file), "num_candidates": SIZE}
    make_stage(run, "candidates", candidates, candidates.CandidatesArguments(run_dir=str(run), **given), given)
    args = traces.TracesArguments(run_dir=str(run), teacher="evidence", max_attempts=1, max_rows=50)
    (run / "traces").mkdir()
    finish(run / "traces", traces.main(args, SETTINGS, run / "traces"))
    model = _train(run, steps)
    last = log[is_new].sort_values("timestamp:float", kind="stable").groupby(USER).tail(1)
    pool, taken, new_lists = items[ITEM].tolist(), log.groupby(USER)[ITEM].agg(set), []
    for user, target in zip(last[USER], last[ITEM], strict=True):
        history = log[~is_new & (log[USER] == user)].sort_values("timestamp:float", kind="stable")[ITEM].tolist()
        new_lists.append({"history": history, "candidates": _list(rng, target, pool, taken[user]), "target": target})
    second_day = _write(folder / "second_day.inter", log.drop(last.index.union(_held_out(run, log))))
    new_items = _write(folder / "new.item", items[items[ITEM].isin(new)])
    return RealDay(model, new_items, second_day, old_lists, new_lists)
