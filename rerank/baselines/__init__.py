"""The baselines of every results table, transitions and LambdaMART, and the evidence they rest on.

`pairs` counts which item follows which, `regression` fits which items go together, `counts` scores and stores it all,
`features` turns it into numbers and bucket edges, `lambdamart` ranks by them.
"""

from rerank.baselines.counts import Counts
from rerank.baselines.features import FEATURES, NUM_BUCKETS, ItemFacts, feature_rows, fit_edges
from rerank.baselines.lambdamart import fit_lambdamart, out_of_fold_scores, predict_lambdamart
from rerank.baselines.pairs import UserContributions

__all__ = [
    "FEATURES",
    "NUM_BUCKETS",
    "Counts",
    "ItemFacts",
    "UserContributions",
    "feature_rows",
    "fit_edges",
    "fit_lambdamart",
    "out_of_fold_scores",
    "predict_lambdamart",
]
