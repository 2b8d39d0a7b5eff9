"""Facts about the candidates of lists of any length, by the names that a run's data allow.

R rows, N candidates of a row (another number in each), F features of a candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rerank.baselines.counts import Counts
from rerank.baselines.features import CLICK_PRIOR, EMBEDDING_FEATURES, FEATURES, FEEDBACK_FEATURES, feature_rows
from rerank.baselines.pairs import UserContributions

Ragged = Sequence[np.ndarray]  # R arrays, one entry a candidate


def feature_names(counts: Counts, columns: Sequence[str] = ()) -> list[str]:
    """The features of a run.

    FEATURES, without those of embeddings where there are none; FEEDBACK_FEATURES where it is known which items were
    shown; the items' numbers; and the columns of candidates that the log brings.

    Args:
        counts: Of the run.
        columns: Names of those columns.
    """
    absent = () if counts.facts.has_embeddings else EMBEDDING_FEATURES
    names = [name for name in FEATURES if name not in absent]
    names += [] if counts.feedback is None else FEEDBACK_FEATURES
    return [*names, *counts.facts.numbers, *columns]


def list_features(
    names: Sequence[str],
    counts: Counts,
    histories: Ragged,
    candidates: Ragged,
    scores: Ragged,
    own: UserContributions | None,
    columns: Mapping[str, Ragged],
) -> list[np.ndarray]:
    """(N, F) float32 features of each row, columns as in `names`; nan where a number is unknown.

    Args:
        names: Of the features, as `feature_names` gives them.
        counts: Of the training sequences.
        histories: R lists of items, oldest first.
        candidates: Items in first-stage order.
        scores: Their first-stage scores.
        own: To be subtracted from the counts; None for rows that were not counted.
        columns: Of the candidates, by name.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(candidates)
    for rows in of_one_length(candidates):
        items = np.stack([candidates[row] for row in rows])
        left_out = None if own is None else own.of_rows(np.array(rows))
        block = feature_rows(
            counts, [histories[row] for row in rows], items, np.stack([scores[row] for row in rows]), left_out
        )
        known = dict(zip(FEATURES, np.moveaxis(block, 2, 0), strict=True))
        known |= {name: values[items] for name, values in counts.facts.numbers.items()}
        known |= {name: np.stack([values[row] for row in rows]) for name, values in columns.items()}
        known |= {} if counts.feedback is None else _feedback(counts.feedback, items)
        features = np.stack([known[name] for name in names], axis=2, dtype=np.float32)
        for row, of_row in zip(rows, features, strict=True):
            found[row] = of_row
    return found


def of_one_length(lists: Sequence[Sequence[int] | np.ndarray]) -> Iterator[list[int]]:
    """The places of the lists, those of one length together, in their order."""
    lengths = [len(one) for one in lists]
    for length in sorted(set(lengths)):
        yield [place for place, of_list in enumerate(lengths) if of_list == length]


def _feedback(feedback: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
    shown, clicked = feedback
    mean = clicked.sum() / max(shown.sum(), 1)
    rate = (clicked + CLICK_PRIOR * mean) / (shown + CLICK_PRIOR)
    return {"shown": shown[items], "click_rate": rate[items]}
