"""The row to rank: read, shuffled, asked and turned into reward columns here and nowhere else.

`RankingRow` is one list of candidates after one history. `Prompter` writes its prompt and its labels, REWARD_COLUMNS
are what a reward is told of it. `histories` reads what has no list yet, `sequences` the history of every row.
"""

from rerank.rows.histories import (
    LoggedLists,
    TargetRows,
    by_user,
    has_lists,
    training_items,
    training_sequences,
)
from rerank.rows.prompter import (
    FEATURES_FILE,
    REWARD_COLUMNS,
    PromptedRow,
    Prompter,
    RewardColumn,
    check_edges,
    column_names,
    read_feature_names,
    reward_columns,
)
from rerank.rows.reading import check_features, check_top_k, choose_rows, read_records, read_rows, training_rows
from rerank.rows.row import RankingRow, shuffle
from rerank.rows.sequences import Histories

__all__ = [
    "FEATURES_FILE",
    "Histories",
    "LoggedLists",
    "REWARD_COLUMNS",
    "PromptedRow",
    "Prompter",
    "RankingRow",
    "RewardColumn",
    "TargetRows",
    "by_user",
    "check_edges",
    "check_features",
    "check_top_k",
    "choose_rows",
    "column_names",
    "has_lists",
    "read_feature_names",
    "read_records",
    "read_rows",
    "reward_columns",
    "shuffle",
    "training_items",
    "training_rows",
    "training_sequences",
]
