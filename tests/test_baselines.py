"""Counts by hand, leave-one-user-out against refitting, fast code against a slow loop."""

from dataclasses import replace

import lightgbm
import numpy as np
import pytest
from toy_run import features_of

from rerank.baselines import (
    FEATURES,
    Counts,
    ItemFacts,
    feature_rows,
    fit_edges,
    fit_lambdamart,
    lambdamart,
    out_of_fold_scores,
    regression,
)
from rerank.metrics import best_first, ndcg_at_k
from rerank.rows.prompter import bucketed

TOY = {0: np.array([0, 1, 2, 3, 4]), 1: np.array([1, 2, 0]), 2: np.array([3, 0])}


@pytest.fixture
def random_sequences():
    rng = np.random.default_rng(0)
    return {user: rng.integers(30, size=rng.integers(3, 15)) for user in range(40)}


@pytest.fixture
def random_counts(random_sequences):
    rng = np.random.default_rng(1)
    facts = ItemFacts.of(
        30,
        rng.normal(size=(30, 4)),
        [",".join(f"c{number}" for number in rng.integers(4, size=2)) for _ in range(30)],
        [f"Word{rng.integers(5)} and word{rng.integers(5)}" for _ in range(30)],
        [f"brand{number}" if number else "" for number in rng.integers(3, size=30)],
    )
    return Counts.fit(random_sequences, 30, facts)


def top(counts, history, n, own_sequence=None):
    """`top_rows` of one row."""
    own = None if own_sequence is None else counts.own([0], {0: np.asarray(own_sequence)})
    items, scores = counts.top_rows([np.asarray(history)], n, own)
    return items[0], scores[0]


def all_scores(counts, history, own_sequence=None):
    """The score of every item that the history lacks, by `top_rows`; -inf for its own."""
    scores = np.full(counts.num_items, -np.inf)
    items, values = top(counts, history, counts.num_items - len(set(history)), own_sequence)
    scores[items] = values
    return scores


def values_of(counts, history, candidate, own_sequence=None):
    """The features of one candidate by name."""
    row = features_of(counts, history, [candidate], [0.0], own_sequence)[0]
    return dict(zip(FEATURES, row.tolist(), strict=True))


def slow_transitions(sequences, num_items):
    counts = np.zeros((num_items, num_items))
    for sequence in sequences.values():
        for i in range(len(sequence)):
            for j in range(i + 1, min(i + 4, len(sequence))):
                counts[sequence[i], sequence[j]] += 1 / (j - i)
                counts[sequence[j], sequence[i]] += 0.3 / (j - i)
    return counts


def slow_scores(counts, history):
    scores = sum(counts[item] / m for m, item in enumerate(history[::-1][:5], start=1))
    scores[history] = -np.inf
    return scores


def test_counts_of_three_users_by_hand():
    fitted = Counts.fit(TOY, 5)
    counts = fitted.transitions.toarray() / 60
    assert counts[0, 1] == pytest.approx(1 + 0.3 / 2)  # user 0: next; user 1: 1 stands two before 0
    assert counts[0, 2] == pytest.approx(1 / 2 + 0.3)  # user 0: two on; user 1: 2 stands just before 0
    assert counts[0, 3] == pytest.approx(1 / 3 + 0.3)  # user 0: three on; user 2: just before
    assert counts[0, 4] == 0  # four on: outside the window
    assert counts[1, 2] == pytest.approx(2)  # users 0 and 1: next
    assert counts[2, 1] == pytest.approx(0.6)  # the same two, backward
    assert counts[4, 1] == pytest.approx(0.3 / 3)  # user 0: three before
    successors = fitted.successors.toarray()
    assert (successors[1, 2], successors[2, 1], successors.sum()) == (2, 0, 4 + 2 + 1)
    assert fitted.popularity.tolist() == [3, 2, 2, 2, 1]


def test_scores_equal_a_slow_loop(random_sequences, random_counts):
    counts = slow_transitions(random_sequences, 30)
    for sequence in random_sequences.values():
        np.testing.assert_allclose(all_scores(random_counts, sequence), slow_scores(counts, sequence))


def test_leaving_a_user_out_equals_refitting_without_it(random_sequences, random_counts):
    for user, sequence in random_sequences.items():
        rest = Counts.fit({other: items for other, items in random_sequences.items() if other != user}, 30)
        history = sequence[: len(sequence) // 2 + 1]
        left = all_scores(random_counts, history, sequence)
        assert (left == all_scores(rest, history)).all()  # exactly: not a crumb is left
        items, scores = top(random_counts, history, 8, sequence)
        assert items.tolist() == top(rest, history, 8)[0].tolist()
        features = features_of(random_counts, history, items, scores, sequence)
        wanted = features_of(replace(rest, facts=random_counts.facts), history, items, scores)
        lowered = rest.popularity[items] - ~np.isin(items, sequence)  # one lower where the user did not have an item
        wanted[:, FEATURES.index("popularity")] = popularity = np.maximum(lowered, 0)
        wanted[:, FEATURES.index("lift")] = wanted[:, FEATURES.index("sum_counts")] / np.sqrt(popularity + 1)
        inexact = ("lift", "near", "fit_history", "fit_recent")
        np.testing.assert_allclose(features, wanted, rtol=1e-4, atol=1e-7)
        exact = [number for number, name in enumerate(FEATURES) if name not in inexact]
        assert (features[:, exact] == wanted[:, exact]).all()


def test_popularity_of_a_training_row_leaves_out_its_label_and_does_not_tell_it():
    sequences = {0: np.array([0, 1]), 1: np.array([0, 2]), 2: np.array([3, 1]), 3: np.array([1, 3])}
    counts = Counts.fit(sequences, 5)
    users, histories, lists = [0, 1, 9], [np.array([0])] * 3, np.array([[1, 2, 4]] * 3)
    features = feature_rows(counts, histories, lists, np.zeros((3, 3)), counts.own(users, sequences))
    popularity = features[:, :, FEATURES.index("popularity")]
    assert popularity[0, 0] == 2  # two other users have 1, the target of user 0
    assert popularity[1, 1] == 0  # nobody else has 2, the target of user 1
    assert popularity[0].tolist() == popularity[1].tolist()  # an item is as popular where it is no target
    assert popularity[2].tolist() == [3, 1, 0]  # user 9 was not counted
    lift, total = (features[:, :, FEATURES.index(name)] for name in ("lift", "sum_counts"))
    np.testing.assert_allclose(lift, total / np.sqrt(popularity + 1))


def test_features_are_equal_where_a_machine_gives_the_embeddings_other_last_digits(random_sequences):
    vectors = np.random.default_rng(0).normal(size=(30, 384)).astype(np.float32)
    other = vectors * (1 + np.float32(1e-7) * np.random.default_rng(1).choice([-1, 1], vectors.shape)).astype(
        np.float32
    )
    histories, lists = list(random_sequences.values()), np.tile(np.arange(30), (len(random_sequences), 1))
    scores = np.zeros(lists.shape)
    features = [
        feature_rows(Counts.fit(random_sequences, 30, ItemFacts.of(30, given)), histories, lists, scores, None)
        for given in (vectors, other)
    ]
    assert (vectors != other).any() and np.array_equal(*features)


def test_linear_model_by_hand():
    # Two items, had together by one user: X'X + 300 I = [[301, 1], [1, 301]], so a weight of 1 / 301 each way.
    counts = Counts.fit({0: np.array([0, 1])}, 3)
    values = values_of(counts, [0, 2], 1)
    assert values["fit_history"] == pytest.approx(1 / 301)
    assert values["fit_recent"] == pytest.approx(np.exp(-1 / 10) / 301)  # one place back
    assert values_of(counts, [0], 1, [0, 1])["fit_history"] == pytest.approx(0, abs=1e-9)


def test_the_linear_model_scores_an_item_of_the_history_by_the_other_items_alone(random_sequences, random_counts):
    """EASE's weights have a zero diagonal; a candidate may be in the history where lists are given."""
    for own in (None, random_sequences[3]):
        left = {user: items for user, items in random_sequences.items() if own is None or user != 3}
        chosen = np.array([np.isin(np.arange(30), items) for items in left.values()], dtype=float)
        inverse = np.linalg.inv(chosen.T @ chosen + regression.RIDGE * np.eye(30))
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0)
        history = np.array([4, 9, 4, 17])
        columns = [FEATURES.index(name) for name in ("fit_history", "fit_recent")]
        found = features_of(random_counts, history, [4, 17, 2], [0.0] * 3, own)[:, columns]
        fading = np.exp(-np.arange(4)[::-1] / regression.FADING)
        wanted = np.stack([weights[history].sum(axis=0), fading @ weights[history]], axis=1)[[4, 17, 2]]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_linear_model_knows_the_most_popular_items_of_a_large_catalogue(monkeypatch):
    monkeypatch.setattr(regression, "MAX_ITEMS", 2)
    counts = Counts.fit({0: np.array([0, 1, 2]), 1: np.array([2, 0])}, 4)
    assert counts.regression.places.tolist() == [0, -1, 1, -1]
    fits = [values_of(counts, [0, 1], candidate)["fit_history"] for candidate in (2, 3)]
    assert fits == [pytest.approx(2 / 302), 0]  # both users had 0 and 2
    monkeypatch.setattr(regression, "MANY_ITEMS", 4)
    fits = [values_of(counts, [0, 1], candidate)["fit_history"] for candidate in (2, 3)]
    assert fits == pytest.approx([2 / 302, np.nan], nan_ok=True)  # 3 has no weights


def test_near_share_by_hand():
    # Item 0 was had by two users, one of whom took 1 ten places on; eleven places are too far.
    sequences = {0: np.array([0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 11]), 1: np.array([0])}
    counts = Counts.fit(sequences, 12)
    assert [values_of(counts, [0], candidate)["near"] for candidate in (1, 11)] == [pytest.approx(1 / (2 + 5)), 0]
    assert values_of(counts, [0], 1, sequences[0])["near"] == 0


def test_many_rows_at_once_equal_one_by_one(random_sequences, random_counts):
    users = list(random_sequences)
    histories = [random_sequences[user][:3] for user in users]
    own = random_counts.own([user if user % 2 else -1 for user in users], random_sequences)
    items, scores = random_counts.top_rows(histories, 6, own)
    features = feature_rows(random_counts, histories, items, scores, own)
    for row, user in enumerate(users):
        left_out = random_sequences[user] if user % 2 else None
        one_items, one_scores = top(random_counts, histories[row], 6, left_out)
        assert items[row].tolist() == one_items.tolist()
        assert scores[row].tolist() == one_scores.tolist()
        one_row = features_of(random_counts, histories[row], one_items, one_scores, left_out)
        assert (features[row] == one_row).all()


def test_top_breaks_ties_by_popularity_then_item():
    # After 0 come 1, 2 and 3, once each; 3 is also had alone by user 9. Items 4 and 5 have score 0, 5 is had twice.
    sequences = {0: np.array([0, 1]), 1: np.array([0, 2]), 2: np.array([0, 3]), 9: np.array([3])}
    sequences |= {5: np.array([5]), 6: np.array([5])}
    items, scores = top(Counts.fit(sequences, 6), [0], 5)
    assert items.tolist() == [3, 1, 2, 5, 4] and scores.tolist() == [1, 1, 1, 0, 0]


def test_top_refuses_a_list_longer_than_what_is_unseen():
    with pytest.raises(ValueError, match="row 0 has seen all but 2 of 5 items, fewer than the 3 of a list"):
        top(Counts.fit(TOY, 5), [0, 1, 2], 3)


def test_features_by_hand():
    facts = ItemFacts.of(
        4,
        np.array([[2.0, 0], [0, 1], [3, 4], [0, 0]]),
        ["Hair, Shampoo", "Hair", "Hair|Oil", ""],
        ["Soft oil", "the Oil", "Soft OIL for hair", "Red"],
        ["Acme", "", "Acme", ""],
    )
    counts = Counts.fit({0: np.array([0, 1, 2]), 1: np.array([0, 2]), 2: np.array([0, 2])}, 4, facts)
    rows = features_of(counts, [1, 0], [2, 3], [2.5, 0.5])
    values, unknown = (dict(zip(FEATURES, row.tolist(), strict=True)) for row in rows)
    assert values["place"] == 1 and unknown["place"] == 2
    assert values["first_stage_score"] == 2.5
    assert values["from_last"] == pytest.approx(2 + 1 / 2)  # 0 -> 2: users 1 and 2 next, user 0 two on
    assert values["from_second"] == 1  # 1 -> 2: user 0
    assert values["sum_counts"] == pytest.approx(3.5)
    assert values["direct_last"] == 2 and values["direct_second"] == 1 and values["direct_third"] == 0
    assert values["popularity"] == 3
    assert values["lift"] == pytest.approx(3.5 / np.sqrt(4))
    # unit vectors (1, 0), (0, 1) and (0.6, 0.8)
    assert values["cosine_last"] == pytest.approx(0.6, abs=1e-3)  # stored in half precision
    assert values["cosine_max"] == pytest.approx(0.8, abs=1e-3)
    assert values["cosine_mean"] == values["cosine_last_three"] == pytest.approx(0.7, abs=1e-3)
    # {Hair, Oil} and {Hair, Shampoo}: 1 of 3; and {Hair}: 1 of 2
    assert values["category_max"] == pytest.approx(1 / 2)
    assert values["category_mean"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert values["title_words"] == 2  # soft, oil
    assert values["same_brand"] == 1 and values["history_length"] == 2
    assert all(value == 0 for name, value in unknown.items() if name not in FEATURES[:2] + ("history_length",))


def test_counts_read_back_as_saved(random_counts, random_sequences, tmp_path):
    random_counts.save(tmp_path / "evidence.npz")
    loaded = Counts.load(tmp_path / "evidence.npz")
    for history in random_sequences.values():
        items, scores = top(random_counts, history, 5)
        assert top(loaded, history, 5)[0].tolist() == items.tolist()
        again, first = (features_of(counts, history, items, scores) for counts in (loaded, random_counts))
        assert (again == first).all()
    assert [path.name for path in tmp_path.iterdir()] == ["evidence.npz"]  # nothing temporary is left
    (tmp_path / "evidence.npz").unlink()
    with pytest.raises(FileNotFoundError, match="evidence.npz does not exist; run the candidates stage"):
        Counts.load(tmp_path / "evidence.npz")


@pytest.mark.parametrize(("values", "edges"), [
    ([0] * 500 + [*range(1, 91)], [1, 11, 21, 31, 41, 51, 61, 71, 81]),  # nine parts of ten; zeros stay apart
    ([1] * 10 + [2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 12, 24, 48]),  # ten ones fill one bucket; edges left double
    ([0, 0, 0], [1, 2, 4, 8, 16, 32, 64, 128, 256]),
])  # fmt: skip
def test_edges_cut_positive_values_into_nine_equal_parts(values, edges):
    assert fit_edges(np.array(values)) == edges


@pytest.mark.parametrize("name", ["first_stage_score", "candidate_margin"])
def test_edges_tell_negative_values_apart_where_zero_means_nothing(name):
    values = np.append(np.random.default_rng(0).normal(-3, 1, 5000), np.nan)
    shares = np.bincount(bucketed(values[:-1], fit_edges(values, name=name)).astype(int), minlength=10) / 5000
    assert shares == pytest.approx(0.1, abs=0.01)
    assert (
        np.all(np.diff(fit_edges(np.full(4, -2.0), name=name)) > 0) and fit_edges(np.full(4, -2.0), name=name)[0] == 0
    )
    positive = np.abs(values)
    assert fit_edges(positive, name=name) == fit_edges(positive, name="popularity")
    assert bucketed(np.array([-1.0]), fit_edges(values, name="fit_history")) == 0, "a shipped fact: nothing in common"


@pytest.fixture
def ranked_rows():
    """(features, relevance) of 200 rows of 5 candidates; the relevant one has the largest popularity."""
    rng = np.random.default_rng(0)
    features = [rng.random((5, len(FEATURES))) for _ in range(200)]
    best = [row[:, FEATURES.index("popularity")].argmax() for row in features]
    return features, [np.eye(5)[place] for place in best]


def users_of(rows):
    """Two rows a user."""
    return np.arange(len(rows)) // 2


def test_lambdamart_learns_a_clear_rule(ranked_rows):
    features, relevance = ranked_rows
    train, users = (features[:100], relevance[:100]), users_of(features[:100])
    fitted = fit_lambdamart(train, users, seed=1, min_rows_per_leaf=5, max_rounds=60)
    rows = zip(fitted.scores(features[100:]), relevance[100:], strict=True)
    assert np.mean([scores.argmax() == labels.argmax() for scores, labels in rows]) > 0.7  # chance: 0.2


def test_lambdamart_is_the_same_with_any_number_of_threads(ranked_rows, monkeypatch):
    features, relevance = ranked_rows
    train, users, scores = (features[:100], relevance[:100]), users_of(features[:100]), []
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        fitted = fit_lambdamart(train, users, seed=1, min_rows_per_leaf=5, max_rounds=3)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        scores.append(fitted.scores(features[100:]))
    assert np.array_equal(*scores)


def test_scores_are_means_of_fits_that_differ(ranked_rows):
    features, relevance = ranked_rows
    fitted = fit_lambdamart(ranked_rows, users_of(features), min_rows_per_leaf=5, max_rounds=10)
    of_fits = np.array(fitted.scores_of_fits(features))  # (fits, R, N)
    assert len(of_fits) == lambdamart.NUM_FITS and len(np.unique(of_fits, axis=0)) == lambdamart.NUM_FITS
    np.testing.assert_allclose(fitted.scores(features), of_fits.mean(axis=0))
    assert {booster.num_trees() for booster in fitted.boosters} == {fitted.num_trees}
    assert fitted.scores([]) == []


def test_the_number_of_trees_is_the_best_for_users_left_out(ranked_rows):
    """By hand: fits on all but one fold each, scored on that fold after any number of trees."""
    features, relevance = ranked_rows
    rng = np.random.default_rng(3)  # labels of chance for most users, so that more trees are soon worse
    noisy = [labels if row % 8 < 2 else rng.permutation(labels) for row, labels in enumerate(relevance)]
    users = users_of(features)
    fitted = fit_lambdamart((features, noisy), users, min_rows_per_leaf=5, max_rounds=80)
    folds = lambdamart.user_folds(users, lambdamart.STOPPING_FOLDS, 0)
    assert all(len(set(folds[users == user])) == 1 for user in users)
    curves = []
    for fold in range(lambdamart.STOPPING_FOLDS):
        rest, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        dataset = lightgbm.Dataset(
            np.concatenate([features[row] for row in rest]),
            np.concatenate([noisy[row] for row in rest]),
            group=[5] * len(rest),
            reference=lightgbm.Dataset(np.concatenate(features)),  # bins of all rows
        )
        booster = lightgbm.train(lambdamart._parameters(0, 5), dataset, 80)
        curves.append(
            [
                np.mean(
                    [
                        ndcg_at_k(
                            [
                                noisy[row][place]
                                for place in best_first(booster.predict(features[row], num_iteration=n))
                            ],
                            5,
                        )
                        for row in held
                    ]
                )
                for n in range(1, 81)
            ]
        )
    assert fitted.num_trees == np.mean(curves, axis=0).argmax() + 1 < 80


def test_lambdamart_ranks_by_a_shared_brand(ranked_rows):
    """Of two candidates that are equal but for the brand, that of the last item's brand comes next."""
    brands = ["Acme", "Bolt"] * 10
    counts = Counts.fit({0: np.array([0, 1])}, 20, ItemFacts.of(20, brands=brands))
    rng = np.random.default_rng(0)
    histories = [rng.permutation(10)[:2] for _ in range(200)]
    lists = np.array([rng.permutation([10, 11]) for _ in histories])
    features = list(feature_rows(counts, histories, lists, np.zeros(lists.shape), None))
    relevance = [(items % 2 == history[-1] % 2).astype(float) for items, history in zip(lists, histories, strict=True)]
    fitted = fit_lambdamart(
        (features[:150], relevance[:150]), range(150), min_rows_per_leaf=5, max_rounds=20, names=FEATURES
    )
    scores = fitted.scores(features[150:])
    assert all(row.argmax() == labels.argmax() for row, labels in zip(scores, relevance[150:], strict=True))
    assert all("same_brand" in booster.feature_name() for booster in fitted.boosters)


def test_out_of_fold_scores_do_not_depend_on_the_users_own_rows(ranked_rows):
    features, relevance = ranked_rows
    users = users_of(features)
    options = {"num_folds": 4, "seed": 2, "min_rows_per_leaf": 5, "max_rounds": 20}
    scores, _ = out_of_fold_scores(ranked_rows, users, **options)
    changed = [labels[::-1] if user == 3 else labels for labels, user in zip(relevance, users, strict=True)]
    other, _ = out_of_fold_scores((features, changed), users, **options)
    same = [np.array_equal(a, b) for a, b in zip(scores, other, strict=True)]
    assert all(same[row] for row in np.flatnonzero(users == 3))
    assert not all(same)  # rows of other folds were fitted on the change
    assert np.mean([s.argmax() == r.argmax() for s, r in zip(scores, relevance, strict=True)]) > 0.5


def test_rows_that_teach_nothing_are_scored_out_of_fold_too(ranked_rows):
    features, relevance = ranked_rows
    users, options = users_of(features), {"num_folds": 4, "seed": 2, "min_rows_per_leaf": 5, "max_rounds": 20}
    plain, folds = out_of_fold_scores(ranked_rows, users, **options)
    own = [features[row] for row in np.flatnonzero(users == 3)]  # shown again, with nothing liked; then to a stranger
    more = [*features, *own, *own], [*relevance, *[np.empty(0)] * 2 * len(own)]
    scores, of_all = out_of_fold_scores(more, [*users, *[3] * len(own), *[10**6] * len(own)], **options)
    assert all(np.array_equal(a, b) for a, b in zip(plain, scores[: len(plain)], strict=True))
    assert np.array_equal(of_all[: len(folds)], folds) and len(set(folds)) == 4
    mine = [plain[row] for row in np.flatnonzero(users == 3)]
    again, strangers = scores[len(plain) : len(plain) + len(own)], scores[len(plain) + len(own) :]
    assert all(np.array_equal(a, b) for a, b in zip(mine, again, strict=True))
    assert all(len(of_row) == len(row) for of_row, row in zip(strangers, own, strict=True))


def test_lambdamart_leaves_out_rows_without_a_relevant_candidate(ranked_rows):
    features, relevance = ranked_rows
    options = {"min_rows_per_leaf": 5, "max_rounds": 10}
    rows, padded = (features[:60], relevance[:40] + [np.zeros(5)] * 20), users_of(features[:60])
    plain = fit_lambdamart((features[:40], relevance[:40]), padded[:40], **options)
    padded = fit_lambdamart(rows, padded, **options)
    texts = [[booster.model_to_string() for booster in fitted.boosters] for fitted in (plain, padded)]
    assert texts[0] == texts[1]


def test_rows_that_nothing_can_be_fitted_on_are_refused(ranked_rows):
    features, relevance = ranked_rows
    with pytest.raises(ValueError, match="none of the 2 training rows has a relevant candidate"):
        fit_lambdamart((features[:2], [np.zeros(5)] * 2), [0, 1])
    with pytest.raises(ValueError, match="relevance 0.5 in the training rows is not a whole number"):
        fit_lambdamart((features, [row / 2 for row in relevance]), users_of(features))
    with pytest.raises(ValueError, match="all 200 training rows are of one user, so that none can be left out"):
        fit_lambdamart(ranked_rows, [7] * 200)
    few = "2 users have training rows with a relevant candidate, fewer than num_folds 5"
    with pytest.raises(ValueError, match=few):
        out_of_fold_scores((features[:4], relevance[:4]), [1, 1, 2, 2])
