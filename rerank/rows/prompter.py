"""How a row is asked (prompt and labels), and what rewards are told of it.

N candidates of a row, F features of a candidate.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from rerank.catalogue import Catalogue
from rerank.grading import Facts
from rerank.launch import run_dir
from rerank.prompts import EMPTY_TRACE, PromptSettings, candidate_labels, completion, opening, render, rerank_prompt
from rerank.prompts.facts import coded, worded
from rerank.prompts.fields import FieldTexts, check_catalogue
from rerank.rows.row import RankingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEATURES_FILE = "features.json"  # names and bucket edges of the features, beside candidates and in every model folder


@dataclass(frozen=True)
class PromptedRow:
    """A row as it is asked.

    Attributes:
        row: To rank.
        prompt: The text that the model continues.
        labels: Of the candidates shown.
        max_completion_tokens: Token limit of an answer.
        top_k: How many candidates the answer names, the best; 0 for all.
        begun: Beginning of the completion, with which the prompt ends: the tags of an empty trace, or nothing.
    """

    row: RankingRow
    prompt: str
    labels: list[str]
    max_completion_tokens: int
    top_k: int = 0
    begun: str = ""


@dataclass(frozen=True)
class Prompter:
    """Rows to prompts, labels and answers, by the settings that the traces stage fixed for all later stages.

    Attributes:
        catalogue: The items.
        settings: What a prompt shows.
        names: Names of the columns of `RankingRow.features`.
        edges: Bucket edges of each feature.
        tokenizer: Renders prompts by its chat template and cuts long fields; without one a prompt is its user message.
        bypass_reasoning: Whether prompts end in the tags of an empty trace, so that the model writes its ranking at
            once.

    Raises:
        ValueError: When the settings name fields of items that the catalogue lacks.
    """

    catalogue: Catalogue
    settings: PromptSettings
    names: Sequence[str] = ()
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tokenizer: "PreTrainedTokenizerBase | None" = None
    bypass_reasoning: bool = False

    def __post_init__(self) -> None:
        check_catalogue(self.settings, self.catalogue)

    @cached_property
    def texts(self) -> FieldTexts:
        """Writes items and fields."""
        return FieldTexts(self.catalogue, self.settings, self.tokenizer)

    @classmethod
    def of_run(
        cls,
        run: str | Path,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        settings: PromptSettings | None = None,
    ) -> "Prompter":
        """Of a run; without `settings`, by those of its traces stage."""
        settings = settings or PromptSettings.load(run_dir.stage_dir(run, "traces"))
        features = read_feature_names(run_dir.stage_dir(run, "candidates"))
        return cls(Catalogue.load(run), settings, *features, tokenizer)

    @classmethod
    def of_model(cls, folder: str | Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "Prompter":
        """Of a model folder of the sft or dapo stage."""
        return cls(Catalogue.load(folder), PromptSettings.load(folder), *read_feature_names(folder), tokenizer)

    @property
    def needs_features(self) -> bool:
        """Whether prompts show facts about candidates."""
        return self.settings.evidence != "none"

    def facts(self, row: RankingRow) -> Facts:
        """The facts on the row's candidate lines.

        Raises:
            ValueError: When a fact has no feature or no edges.
        """
        if not self.needs_features:
            size = len(row.candidates)
            return Facts([[] for _ in range(size)], np.zeros((size, 0)), [""] * size)
        names, is_coded = self.settings.evidence_names, self.settings.evidence == "codes"
        values = self.shown_values(row.features)
        word = coded if is_coded else worded
        texts = [[word(name, value) for name, value in zip(names, line, strict=True)] for line in values.tolist()]
        lines = [" " + " ".join(line) if is_coded else ": " + "; ".join(line) for line in texts]
        return Facts(texts, with_means(values), lines)

    def shown_values(self, features: np.ndarray | Sequence[Sequence[float]] | None) -> np.ndarray:
        """(N, facts) of (N, F) features, as candidate lines tell them; nan for a fact that is not known.

        With `evidence: codes` these are the numbers of buckets, else values.

        Raises:
            ValueError: When a fact has no feature or no edges.
        """
        names, is_coded = self.settings.evidence_names, self.settings.evidence == "codes"
        for name in names:
            if features is None or name not in self.names or (is_coded and name not in self.edges):
                raise ValueError(f"evidence {name!r} has no feature or edges; run the candidates stage again.")
        values = np.asarray(features, dtype=float)[:, [list(self.names).index(name) for name in names]]
        if not is_coded:
            return values
        columns = zip(names, values.T, strict=True)
        return np.stack([bucketed(of_name, self.edges[name]) for name, of_name in columns], axis=1)

    def message(self, row: RankingRow) -> str:
        """The user message."""
        return rerank_prompt(row, self.labels(row), self.facts(row).lines, self.texts)

    def prompt(self, row: RankingRow) -> str:
        """The text that the model completes."""
        message = self.message(row)
        return (message if self.tokenizer is None else render(self.tokenizer, message)) + self.begun

    @property
    def begun(self) -> str:
        """`PromptedRow.begun` of every row."""
        return EMPTY_TRACE if self.bypass_reasoning else ""

    def labels(self, row: RankingRow) -> list[str]:
        """The label that a completion writes for each candidate, in the order shown."""
        return candidate_labels(row.candidates, self.catalogue, self.settings)

    def ask(self, row: RankingRow, max_completion_tokens: int) -> PromptedRow:
        """The row with its prompt and labels."""
        top_k = self.settings.top_k
        return PromptedRow(row, self.prompt(row), self.labels(row), max_completion_tokens, top_k, self.begun)

    def example(self, row: RankingRow, trace: str | None, order: Sequence[int]) -> dict[str, list[int]]:
        """Token ids and labels of prompt and completion; the two are tokenized apart, as rollouts are."""
        assert self.tokenizer is not None
        texts = [self.prompt(row), completion(trace, order, self.labels(row), self.settings.top_k)]
        prompt, answer = self.tokenizer(texts, add_special_tokens=False).input_ids
        prompt, answer = opening(self.tokenizer) + prompt, [*answer, self.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def bucketed(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """The number of edges at or below each value (`rerank.baselines.fit_edges`); nan stays nan."""
    return np.where(np.isnan(values), np.nan, np.searchsorted(edges, values, side="right"))


def with_means(values: np.ndarray) -> np.ndarray:
    """(N, facts) values with the mean of a column in place of nan, and 0 in a column of nan alone."""
    known = ~np.isnan(values)
    means = np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.where(known, values, means)


def read_feature_names(folder: str | Path) -> tuple[list[str], dict[str, list[float]]]:
    """Names of the feature columns and the bucket edges of each in `folder`/features.json; none without the file."""
    path = Path(folder) / FEATURES_FILE
    if not path.is_file():
        return [], {}
    stored = json.loads(path.read_text())
    return stored["names"], stored["edges"]


def check_edges(folder: str | Path, settings: PromptSettings) -> None:
    """Refuse facts for the prompt that `folder`/features.json lacks, naming those there are."""
    names, edges = read_feature_names(folder)
    known = [name for name in names if name in edges]
    for name in settings.evidence_names if settings.evidence != "none" else []:
        if name not in known:
            raise ValueError(
                f"evidence_names holds {name!r} but {Path(folder) / FEATURES_FILE} has "
                f"{', '.join(known) or 'none'}; run the candidates stage again or leave the fact out."
            )


@dataclass(frozen=True)
class RewardColumn:
    """A column that rewards get by name and that the store keeps beside each rollout."""

    name: str
    type: pa.DataType
    value: Callable[[PromptedRow], object]


# What a reward is told of a row. A line here is all that a new column takes: dapo, the probe, the store and rescoring
# read this list.
REWARD_COLUMNS: tuple[RewardColumn, ...] = (
    RewardColumn("row_id", pa.int64(), lambda asked: asked.row.row_id),
    RewardColumn("user", pa.int64(), lambda asked: asked.row.user),
    RewardColumn("history", pa.list_(pa.int64()), lambda asked: list(asked.row.history)),
    RewardColumn("candidates", pa.list_(pa.int64()), lambda asked: list(asked.row.candidates)),
    RewardColumn("relevance", pa.list_(pa.float64()), lambda asked: list(asked.row.relevance)),
    RewardColumn("candidate_labels", pa.list_(pa.string()), lambda asked: list(asked.labels)),
    RewardColumn("first_stage_ranks", pa.list_(pa.int64()), lambda asked: list(asked.row.ranks)),
    RewardColumn("target_rank", pa.int64(), lambda asked: asked.row.target_rank),
    RewardColumn("fields", pa.string(), lambda asked: json.dumps(dict(asked.row.fields), ensure_ascii=False)),
    RewardColumn("max_completion_tokens", pa.int64(), lambda asked: asked.max_completion_tokens),
    RewardColumn("top_k", pa.int64(), lambda asked: asked.top_k),
)


def column_names() -> tuple[str, ...]:
    """Names of REWARD_COLUMNS."""
    return tuple(column.name for column in REWARD_COLUMNS)


def reward_columns(asked: Sequence[PromptedRow]) -> dict[str, list[object]]:
    """REWARD_COLUMNS of these rows, and `prompts` as TRL names their texts: one value for each row."""
    columns = {column.name: [column.value(row) for row in asked] for column in REWARD_COLUMNS}
    return {"prompts": [row.prompt for row in asked], **columns}
