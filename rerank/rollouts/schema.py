"""The columns of a stored rollout: one Parquet row for each sampled completion.

In SQL `order`, `group` and `user` are reserved words and stand in double quotes. The target is the most relevant
candidate, of equals the one that the first stage ranks best. A positive is a candidate of a grade above 0.
"""

from typing import Any

import pyarrow as pa

from rerank.rows.prompter import REWARD_COLUMNS

Rollout = dict[str, Any]  # one value a column of SCHEMA

SCHEMA_VERSION = "5"
RENAMED = {"target_rank_before": "target_rank", "reward_gates": "conditions"}  # column of version 2 -> its name now
# Columns that versions before 5 lack: the target was the one positive, and a completion named all candidates.
BEFORE_5 = {"positive_rank": "target_rank", "positive_rank_after": "target_rank_after"}
KNOWN = {"top_k": 0}
GROUP_KEYS = ("step", "round", "group")  # rollouts that agree in them answer the same prompt

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimizer step that the rollout was sampled for
        ("run", pa.string()),  # name of the run's folder
        ("round", pa.int64()),  # sampling round of dynamic sampling, 0 the first
        ("group", pa.int64()),  # number of the prompt within step and round
        ("epoch", pa.int64()),  # pass over the rows, from 0; candidates may be shown in another order in each
        ("seed", pa.int64()),  # of its sampling; null where the engine takes none
        *((column.name, column.type) for column in REWARD_COLUMNS),  # what rewards are told of the row
        ("target", pa.int64()),  # item that the row is about: the best relevant candidate
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("completion_ids", pa.list_(pa.int32())),
        ("policy_logps", pa.list_(pa.float32())),  # log-probability of each token, by the model in training
        ("sampling_logps", pa.list_(pa.float32())),  # the same, by the engine that sampled
        ("reward_components", pa.map_(pa.string(), pa.float64())),  # each reward after condition, before weight
        ("conditions", pa.map_(pa.string(), pa.bool_())),  # whether a reward's condition held; true without one
        ("reward", pa.float64()),
        ("outcome", pa.float64()),  # members of a useful group differ in it; -inf: rank gain of what is no ranking
        ("advantage", pa.float64()),
        ("truncated", pa.bool_()),
        ("failure", pa.string()),  # null for a ranking, else one of prompts.FAILURES
        ("order", pa.list_(pa.int64())),  # positions into candidates, best first; null for no ranking
        ("target_rank_after", pa.int64()),  # among all candidates, as target_rank; null for no ranking
        ("positive_rank", pa.int64()),  # of the first stage's best-placed positive, among candidates that were seen
        ("positive_rank_after", pa.int64()),  # of the ranking's best-placed positive, alike; null for no ranking
        ("kept", pa.bool_()),  # whether it was trained on
        ("discard_reason", pa.string()),  # null for a kept one, else truncated, all_equal, surplus or stale
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)
