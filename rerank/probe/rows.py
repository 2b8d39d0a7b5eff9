"""The rows that the dapo stage of a recipe trains on, asked without a model, and the columns that its rewards get."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rerank import rows
from rerank.launch import run_dir
from rerank.prompts import PromptSettings
from rerank.rows import PromptedRow, Prompter, RankingRow

NEEDED = ("data", "candidates")
SEED = 42  # of the dapo stage where its recipe has none: TrainingArguments' default
NO_LIMIT = 1 << 20  # tokens of a completion, where neither recipe nor sft stage sets a limit
_TOKEN = re.compile(r"<[^<>]*>|\w+|[^\w\s]")


@dataclass(frozen=True)
class ProbeRow(PromptedRow):
    """A training row as it is asked, how often other users took each of its candidates, and its facts' names."""

    popularity: Sequence[int] = ()
    feature_names: Sequence[str] = ()
    fact_names: Sequence[str] = ()

    def fact(self, name: str) -> list[float]:
        """(N,) a feature of the candidates, one of `fact_names`."""
        assert self.row.features is not None  # where there are facts
        values: list[float] = self.row.features[:, list(self.feature_names).index(name)].tolist()
        return values


def read_rows(keys: Mapping[str, Any], num_rows: int) -> tuple[list[ProbeRow], str]:
    """Rows of the run that a dapo recipe names, and in a few words which rows they are.

    Where the traces stage has not run, it has not yet said which rows are whose and what a label is: then these are
    all rows whose list holds a relevant item, ranked by semantic id, or by number in a run without semantic ids.
    Of a row's lists only the first stage's own is taken (`candidates.augmentation`).

    Args:
        keys: The recipe's: run_dir, rows, max_completion_length, without_trace.
        num_rows: Their number, drawn at random; 0 for all.

    Raises:
        FileNotFoundError: When a stage is missing, naming it and the command that runs it.
    """
    run = keys["run_dir"]
    for stage in NEEDED:
        if not run_dir.is_finished(run, stage):
            raise FileNotFoundError(
                f"the probe needs {run_dir.stage_dir(run, stage)}, which is not there; "
                f"run the stage {stage} first (`rerank run RECIPE_DIR --out {run} --to candidates`)"
            )
    if run_dir.is_finished(run, "traces"):
        prompter, use = Prompter.of_run(run), keys.get("rows", "dapo")
        if use not in ("dapo", "all"):
            raise ValueError(f"rows is {use!r}; choose dapo or all")
        found, what = rows.training_rows(run, use, prompter.needs_features), "training rows of dapo"
    else:
        has_ids = run_dir.is_finished(run, "semantic_ids")
        settings = PromptSettings() if has_ids else PromptSettings(item_fields=["title"], ranking="number")
        prompter, what = Prompter.of_run(run, settings=settings), "rows (no traces yet)"
        found = rows.read_rows(run_dir.stage_dir(run, "candidates") / "train.parquet")
    # a row's further lists are drawn so that their order says less: they would make copying look harmless
    chosen = rows.choose_rows([row for row in found if row.list_number == 0], num_rows, seed=0)
    popularity = others_choices(chosen, rows.training_sequences(run_dir.stage_dir(run, "data")), prompter)
    limit = _max_completion_tokens(keys)
    asked = (prompter.ask(row, limit) for row in chosen)
    facts = prompter.settings.evidence_names if prompter.needs_features else []
    return [
        ProbeRow(
            **vars(row),
            popularity=of_row,
            feature_names=prompter.names,
            fact_names=facts,
        )
        for row, of_row in zip(asked, popularity, strict=True)
    ], what


def others_choices(
    asked: Sequence[RankingRow], sequences: Mapping[int, np.ndarray], prompter: Prompter
) -> list[list[int]]:
    """(N,) how often users other than the row's took each of its candidates in training, per row."""
    items = np.concatenate(list(sequences.values()))
    taken = np.bincount(items, minlength=len(prompter.catalogue))
    found = []
    for row in asked:
        own = np.empty(0, dtype=np.int64) if row.user is None else sequences.get(row.user, np.empty(0, dtype=np.int64))
        candidates = np.array(row.candidates)
        found.append((taken[candidates] - (own[:, None] == candidates).sum(axis=0)).tolist())
    return found


def _max_completion_tokens(keys: Mapping[str, Any]) -> int:
    """The token limit of a completion in the dapo stage, as far as it is known before that stage."""
    if keys.get("max_completion_length"):
        return int(keys["max_completion_length"])
    model = "model_no_trace" if keys.get("without_trace") else "model"
    folder = run_dir.stage_dir(keys["run_dir"], "sft") / model
    path = Path(keys.get("start_model") or folder) / "generation.json"
    return int(json.loads(path.read_text())["max_completion_tokens"]) if path.is_file() else NO_LIMIT


def reward_columns(asked: Sequence[ProbeRow], completions: Sequence[str]) -> dict[str, Any]:
    """All that a reward gets for one completion of each row; what only a trainer has is plausible, not real."""
    return {
        **rows.reward_columns(asked),
        "completion_ids": [_token_ids(text) for text in completions],
        "trainer_state": SimpleNamespace(global_step=0, max_steps=1, epoch=0.0),
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }


def _token_ids(text: str) -> list[int]:
    """One id for each word, sign or tag, the same for the same word, and one for the end."""
    return [*(zlib.crc32(token.encode(errors="replace")) % 30000 for token in _TOKEN.findall(text)), 0]
