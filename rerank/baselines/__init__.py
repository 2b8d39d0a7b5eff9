"""transitions and LambdaMART: the rows every results table carries, and the evidence they rest on.

`pairs` counts who follows whom, `regression` fits which items go together, `counts` scores and stores it all,
`features` turns it into numbers and buckets, `lambdamart` ranks by them.
"""

from rerank.baselines.counts import Counts
from rerank.baselines.features import EVIDENCE, FEATURES, NUM_BUCKETS, ItemFacts, bucket, fit_edges
from rerank.baselines.lambdamart import fit_lambdamart, out_of_fold_scores, predict_lambdamart
from rerank.baselines.pairs import OwnCounts

__all__ = [
    "EVIDENCE",
    "FEATURES",
    "NUM_BUCKETS",
    "Counts",
    "ItemFacts",
    "OwnCounts",
    "bucket",
    "fit_edges",
    "fit_lambdamart",
    "out_of_fold_scores",
    "predict_lambdamart",
]
