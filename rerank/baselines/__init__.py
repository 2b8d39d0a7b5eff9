"""The baselines of every results table, transitions and LambdaMART, and the evidence they rest on.

`pairs` counts which item follows which, `regression` fits which items go together, `counts` scores and stores it all,
`features` turns it into numbers and bucket edges, `lambdamart` ranks by them.
"""

from rerank.baselines.counts import Counts
from rerank.baselines.evidence import Ragged, feature_names, list_features, of_one_length
from rerank.baselines.features import (
    EMBEDDING_FEATURES,
    FEATURES,
    NUM_BUCKETS,
    TEXT_FEATURES,
    feature_rows,
    fit_edges,
    text_features,
)
from rerank.baselines.item_facts import ItemFacts
from rerank.baselines.lambdamart import LambdaMart, fit_lambdamart, out_of_fold_scores, rows_per_leaf
from rerank.baselines.pairs import UserContributions

__all__ = [
    "EMBEDDING_FEATURES",
    "FEATURES",
    "NUM_BUCKETS",
    "TEXT_FEATURES",
    "Counts",
    "ItemFacts",
    "LambdaMart",
    "Ragged",
    "UserContributions",
    "feature_names",
    "feature_rows",
    "fit_edges",
    "fit_lambdamart",
    "list_features",
    "of_one_length",
    "out_of_fold_scores",
    "rows_per_leaf",
    "text_features",
]
