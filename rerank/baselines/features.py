"""Facts about a candidate (counts, text, catalogue): numbers for trees, edges of buckets for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

from rerank.baselines.item_facts import ItemFacts
from rerank.baselines.pairs import UNIT, UserContributions, lookup

if TYPE_CHECKING:
    from rerank.baselines.counts import Counts

DEPTH = 10  # every fact about the history looks at its last ten items: what a prompt shows

# T from the last item of the history, then from the four before it.
TRANSITIONS = ("from_last", "from_second", "from_third", "from_fourth", "from_fifth")
FEATURES = (
    "place",  # in the list, from 1
    "first_stage_score",
    *TRANSITIONS,
    "sum_counts",  # T summed over the last ten
    "direct_last",  # how often it came straight after the last item, the second-last, the third-last
    "direct_second",
    "direct_third",
    "cosine_last",  # of the texts: to the last item; largest and mean of the last ten; mean of the last three
    "cosine_max",
    "cosine_mean",
    "cosine_last_three",
    "popularity",
    "lift",  # sum_counts / sqrt(popularity + 1)
    "near",  # share of those who had a recent item and took this within ten places of it, the last counting most
    "fit_history",  # by the linear model of `regression`: how well it goes with the whole history
    "fit_recent",  # and with items fading by their age
    "category_max",  # Jaccard of the category sets: largest and mean of the last ten
    "category_mean",
    "same_brand",  # as the last item, 0 where either has none
    "title_words",  # shared with the last item's title
    "history_length",
)
EMBEDDING_FEATURES = ("cosine_last", "cosine_max", "cosine_mean", "cosine_last_three")
FEEDBACK_FEATURES = (  # of counts that know which items were shown
    "shown",  # lists that showed the item and whose user could judge it
    "click_rate",  # share of these in which it was relevant, smoothed: CLICK_PRIOR lists at the mean rate are added
)
TEXT_FEATURES = (  # those that change with the items' texts
    *EMBEDDING_FEATURES,
    *("category_max", "category_mean", "same_brand", "title_words"),
)
# Real numbers are rounded: their last digits depend on the machine's linear algebra, and trees part rows by them.
DECIMALS = dict.fromkeys(EMBEDDING_FEATURES, 2)
DECIMALS |= dict.fromkeys(("fit_history", "fit_recent"), 9)
NUM_BUCKETS = 10
CLICK_PRIOR = 10
SMOOTHING = 5  # users added to those who had an item, so that a share of few is small
CHUNK = 1024


def recent_items(histories: Sequence[np.ndarray], depth: int) -> np.ndarray:
    """(R, depth) last items of each history, the last one first, -1 where a history is shorter."""
    recent = np.full((len(histories), depth), -1, dtype=np.int64)
    for row, history in enumerate(histories):
        last = np.asarray(history)[-depth:][::-1]
        recent[row, : len(last)] = last
    return recent


def feature_rows(
    counts: Counts,
    histories: Sequence[np.ndarray],
    candidates: np.ndarray,
    scores: np.ndarray,
    own: UserContributions | None,
) -> np.ndarray:
    """Facts about each candidate of many rows, (R, N, F) float32, columns as in FEATURES.

    Args:
        counts: Of the training sequences.
        histories: R lists of items, oldest first.
        candidates: (R, N) items in first-stage order.
        scores: (R, N) their first-stage scores.
        own: To be subtracted from the counts; None for rows that were not counted.
    """
    candidates = np.asarray(candidates, dtype=np.int64)
    features = np.zeros((*candidates.shape, len(FEATURES)), dtype=np.float32)
    recent = recent_items(histories, DEPTH)
    lengths = np.array([len(history) for history in histories], dtype=np.float32)
    for start in range(0, len(candidates), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(candidates)))
        left_out = None if own is None else own.items_of(rows)
        chunk = [histories[row] for row in rows.tolist()]
        fit, recent_fit = counts.regression.scores(chunk, candidates[rows], left_out)
        columns = {
            "place": np.arange(1, candidates.shape[1] + 1),
            "first_stage_score": scores[rows],
            "history_length": lengths[rows][:, None],
            **_count_facts(counts, rows, recent[rows], candidates[rows], own),
            "fit_history": fit,
            "fit_recent": recent_fit,
            **_text_facts(counts.facts, recent[rows], candidates[rows]),
        }
        for number, name in enumerate(FEATURES):
            features[rows, :, number] = _rounded(name, columns[name])
    return features


def _rounded(name: str, values: np.ndarray) -> np.ndarray:
    return np.round(values, DECIMALS[name]) if name in DECIMALS else values


def _count_facts(
    counts: Counts, rows: np.ndarray, recent: np.ndarray, candidates: np.ndarray, own: UserContributions | None
) -> dict[str, np.ndarray]:
    """The features that rest on who chose what; R rows, H recent items, N candidates.

    The popularity of a row that was counted is one lower for every candidate, whether its user chose it or not: that
    of the target is the number of other users' choices, as in an unseen row. Subtracting the user's own choices alone
    would print the label: an item that 350 chose shows 349 to exactly those users who chose it too, and trees read
    that off (MovieLens-100K: NDCG@5 of trees out of fold .56 in place of .46, on validation rows .45, not .49).
    """
    shape = (*recent.shape, candidates.shape[1])
    history = np.broadcast_to(recent[:, :, None], shape)  # (R, H, N)
    wanted = np.broadcast_to(candidates[:, None, :], shape)
    transitions = lookup(counts.transitions, history, wanted)
    successors = lookup(counts.successors, history[:, :3], wanted[:, :3])
    near, takers = lookup(counts.near, history, wanted), counts.popularity[recent] * (recent >= 0)
    popularity = counts.popularity[candidates]
    if own is not None:
        numbers = np.broadcast_to(own.numbers(rows[:, None], recent)[:, :, None], shape)
        transitions = transitions - lookup(own.transitions, numbers, wanted)
        successors = successors - lookup(own.successors, numbers[:, :3], wanted[:, :3])
        near, takers = near - lookup(own.near, numbers, wanted), takers - own.popularity_of(rows[:, None], recent)
        was_counted = (own.owners[rows] >= 0)[:, None]
        popularity = popularity - np.maximum(own.popularity_of(rows[:, None], candidates), was_counted)
        popularity = np.maximum(popularity, 0)
    shares = near / (takers + SMOOTHING)[:, :, None]
    total = transitions.sum(axis=1) / UNIT
    return {
        **{name: transitions[:, step] / UNIT for step, name in enumerate(TRANSITIONS)},
        **{f"direct_{name}": successors[:, step] for step, name in enumerate(("last", "second", "third"))},
        "sum_counts": total,
        "popularity": popularity,
        "lift": total / np.sqrt(popularity + 1),
        "near": (shares / np.arange(1, recent.shape[1] + 1)[:, None]).sum(axis=1),
    }


def text_features(facts: ItemFacts, histories: Sequence[np.ndarray], candidates: np.ndarray) -> np.ndarray:
    """The part of `feature_rows` that rests on texts, (R, N, T) float32, columns as in TEXT_FEATURES."""
    recent = recent_items(histories, DEPTH)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(candidates), CHUNK)]
    found = [_text_facts(facts, recent[chunk], candidates[chunk]) for chunk in chunks]
    stacked = [np.stack([_rounded(name, of[name]) for name in TEXT_FEATURES], axis=2) for of in found]
    return np.concatenate(stacked, dtype=np.float32)


def _text_facts(facts: ItemFacts, recent: np.ndarray, candidates: np.ndarray) -> dict[str, np.ndarray]:
    """The features that rest on texts and the catalogue."""
    known = (recent >= 0)[:, :, None]  # (R, H, 1)
    vectors = facts.embeddings[recent].astype(np.float32)  # (R, H, d)
    cosines = vectors @ facts.embeddings[candidates].astype(np.float32).transpose(0, 2, 1)  # (R, H, N)
    cosines = cosines.astype(np.float64)
    categories = _jaccard(facts.categories, recent, candidates)
    last, brands = recent[:, :1], facts.brands[candidates]
    return {
        "cosine_last": np.where(known, cosines, 0)[:, 0],
        "cosine_max": _max(cosines, known),
        "cosine_mean": _mean(cosines, known),
        "cosine_last_three": _mean(cosines[:, :3], known[:, :3]),
        "category_max": _max(categories, known),
        "category_mean": _mean(categories, known),
        "same_brand": (last >= 0) & (brands >= 0) & (facts.brands[last] == brands),
        "title_words": _shared(facts.words, last, candidates)[:, 0] * (last >= 0),
    }


def _mean(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known, values, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)


def _max(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known.any(axis=1), np.where(known, values, -np.inf).max(axis=1), 0)


def _shared(members: csr_array, recent: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """How many members each recent item shares with each candidate, (R, H, N)."""
    shape = (*recent.shape, candidates.shape[1])
    left = np.broadcast_to(recent[:, :, None], shape).ravel()
    right = np.broadcast_to(candidates[:, None, :], shape).ravel()
    return np.asarray(members[left].multiply(members[right]).sum(axis=1)).reshape(shape)


def _jaccard(members: csr_array, recent: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    sizes = np.diff(members.indptr)
    shared = _shared(members, recent, candidates)
    union = sizes[recent][:, :, None] + sizes[candidates][:, None, :] - shared
    return shared / np.maximum(union, 1)


def fit_edges(values: np.ndarray, num_buckets: int = NUM_BUCKETS, name: str = "") -> list[float]:
    """Strictly ascending edges that cut a feature into buckets, one edge less than there are buckets.

    Bucket 0 is for what is not positive, the others, of about equal mass, are for the rest. A value that is common
    enough to fill several of them (a count of 1) gets one, and the others are shared anew among the larger values.
    Of a column of the user's own and of first-stage scores, zero means nothing: where some are negative, bucket 0 is
    for the lowest, of about the mass of any other.

    Args:
        values: The feature's values on training rows, nan where it is absent.
        num_buckets: At least 2.
        name: Of the feature.
    """
    lowest = 0.0
    if (values < 0).any() and (name == "first_stage_score" or name not in FEATURES):
        lowest = float(np.nanquantile(values, 1 / num_buckets, method="lower"))
    above = np.sort(values[values > lowest])
    edges: list[float] = []
    for left in range(num_buckets - 1, 0, -1):
        larger = above[np.searchsorted(above, edges[-1], side="right") :] if edges else above
        if not len(larger):
            last = edges[-1] if edges else lowest
            edges.append(last + (abs(last) or 1.0))  # for values beyond all that training has
        elif not edges:
            edges.append(float(larger[0]))
        else:
            rest = above[np.searchsorted(above, edges[-1]) :]
            edges.append(float(max(rest[len(rest) // (left + 1)], larger[0])))
    return edges
