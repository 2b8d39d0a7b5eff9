"""Counts by a query over interactions: equal to those of sequences in memory, in passes, in part, added and cut."""

from dataclasses import fields

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerank.baselines import FEATURES, Counts, feature_rows, interactions, pair_query
from rerank.baselines.interactions import Interactions, engine
from rerank.baselines.pairs import ALL_WEIGHTS

NUM_ITEMS = 30
FACTS = [FEATURES.index(name) for name in ("from_last", "from_third", "direct_last", "near", "sum_counts")]
SPLITS = ("train", "rerank")


def drawn_log(seed=0, users=40, longest=40):
    """Interactions by row in no order, positions with gaps and times in another order; one user has no time."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, size=users)
    user = np.repeat(rng.permutation(3 * users)[:users], lengths)
    position = np.concatenate([np.sort(rng.permutation(3 * n)[:n]) for n in lengths])
    item = (NUM_ITEMS * rng.random(len(user)) ** 2).astype(int)
    time = pa.array(rng.integers(0, 1000, size=len(user)).astype(float), mask=user == user[0])
    split = rng.choice(["train", "rerank", "valid"], size=len(user), p=[0.7, 0.2, 0.1])
    table = pa.table({"user": user, "item": item, "position": position, "time": time, "split": split})
    return table.take(rng.permutation(len(user)))


def sequences_of(table):
    """User to the items of the splits, oldest first, and the times of these."""
    of_user = {}
    for row in sorted(table.to_pylist(), key=lambda row: row["position"]):
        if row["split"] in SPLITS:
            of_user.setdefault(row["user"], []).append((row["item"], row["time"]))
    return of_user


def counted(of_user, **options):
    return Counts.fit({user: np.array([i for i, _ in rows]) for user, rows in of_user.items()}, NUM_ITEMS, **options)


def assert_same(found, wanted):
    """To the last digit, the kind of number too."""
    for name in ("transitions", "successors", "near"):
        for part in ("data", "indices", "indptr"):
            ours, theirs = (getattr(getattr(one, name), part) for one in (found, wanted))
            assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype, (name, part)
    assert np.array_equal(found.popularity, wanted.popularity)
    assert all(np.array_equal(*(getattr(one.regression, field.name) for one in (found, wanted)))
               for field in fields(found.regression))  # fmt: skip


@pytest.fixture
def con():
    with engine() as con:
        yield con


def stored(con, path, table):
    pq.write_table(table, path)
    return Interactions.of_file(con, path, NUM_ITEMS, SPLITS)


@pytest.mark.parametrize(("pairs_in_pass", "neighbours"), [(None, None), (2500, 4)])
def test_a_query_gives_the_counts_of_sequences_in_memory(tmp_path, con, monkeypatch, pairs_in_pass, neighbours):
    if pairs_in_pass:  # of one item the engine sums what a pass cannot take
        monkeypatch.setattr(interactions, "PAIRS_IN_PASS", pairs_in_pass)
        monkeypatch.setattr(interactions, "INTERACTIONS_IN_BLOCK", 50)
    table = drawn_log()
    (tmp_path / "parts").mkdir()
    for number, start in enumerate(range(0, len(table), 100)):
        pq.write_table(table.slice(start, 100), tmp_path / f"parts/{number}.parquet")
    found = Interactions.of_file(con, tmp_path / "parts", NUM_ITEMS, SPLITS)
    assert_same(Counts.of(found, neighbours=neighbours), counted(sequences_of(table), neighbours=neighbours))
    of_user = sequences_of(table)
    assert list(found.sequences) == sorted(of_user) and -1 not in found.sequences
    assert all(found.sequences[user].tolist() == [item for item, _ in rows] for user, rows in of_user.items())


def test_counts_before_a_moment_and_without_users_know_nothing_of_the_others(tmp_path, con):
    table = drawn_log()
    events, of_user = stored(con, tmp_path / "log.parquet", table), sequences_of(table)
    before = {user: [row for row in rows if row[1] is not None and row[1] < 500] for user, rows in of_user.items()}
    assert_same(Counts.of(events.part(until=500)), counted(before))
    users = sorted(of_user)[::3]
    rest = {user: rows for user, rows in before.items() if user not in users}
    assert_same(Counts.of(events.part(until=500, without_users=np.array(users))), counted(rest))
    untimed = stored(con, tmp_path / "untimed.parquet", table.drop_columns("time"))
    assert not Counts.of(untimed.part(until=500)).popularity.any()
    assert events.latest() == max(time for rows in of_user.values() for _, time in rows if time is not None)
    assert np.isnan(untimed.latest())


def test_the_counts_of_new_days_are_added_to_those_before(tmp_path, con):
    table = drawn_log()
    assert not stored(con, tmp_path / "log.parquet", table).is_in_order_of_time
    in_order = table.set_column(3, "time", pa.array(table["position"].to_numpy() // 2 * 10.0))  # some at one moment
    events = stored(con, tmp_path / "ordered.parquet", in_order)
    assert events.is_in_order_of_time
    so_far = Counts.of(events.part(until=100))
    for since, until in ((100, 260), (260, 2000)):
        so_far = Counts.of(events.part(until=until), earlier=so_far, since=since)
        before = {user: [row for row in rows if row[1] < until] for user, rows in sequences_of(in_order).items()}
        assert_same(so_far, counted(before))
    with pytest.raises(ValueError, match="counts of 3 neighbours cannot be added to; count all interactions"):
        Counts.of(events, earlier=Counts.of(events.part(until=100), neighbours=3), since=100)


def test_a_user_of_many_interactions_is_counted_without_a_join(tmp_path, con):
    rng = np.random.default_rng(0)
    one = {"user": np.zeros(100_000, dtype=int), "item": rng.integers(NUM_ITEMS, size=100_000)}
    table = pa.table({**one, "position": np.arange(100_000), "split": ["train"] * 100_000})
    found = stored(con, tmp_path / "log.parquet", table)
    query = pair_query.summed(pair_query.weighted_pairs(pair_query.surroundings(found.table), *ALL_WEIGHTS[2]))
    plan = con.con.raw_sql(f"EXPLAIN {ibis.to_sql(query, dialect='duckdb')}").fetchall()[0][1]
    assert "Window" in plan and "join" not in plan.lower()
    assert_same(Counts.of(found), Counts.fit({0: one["item"]}, NUM_ITEMS))


sequences = st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 7), min_size=1, max_size=14), min_size=1)


@given(sequences, st.integers(1, 4))
def test_a_cut_table_is_exact_where_it_holds_something_and_never_negative(sequences, neighbours):
    sequences = {user: np.array(items) for user, items in sequences.items()}
    whole, found = Counts.fit(sequences, 8), Counts.fit(sequences, 8, neighbours=neighbours)
    for name in ("transitions", "successors", "near"):
        every, kept = (getattr(counts, name).toarray() for counts in (whole, found))
        assert ((kept == every) | (kept == 0)).all()
        for row, of_row in zip(every, kept, strict=True):
            best = sorted((-value, item) for item, value in enumerate(row) if value)[:neighbours]
            assert sorted((-value, item) for item, value in enumerate(of_row) if value) == best
    user = min(sequences)
    own, rest = found.own([user], sequences), Counts.fit({u: i for u, i in sequences.items() if u != user}, 8)
    items = np.arange(8)[None]
    for name in ("transitions", "successors", "near"):
        kept, subtracted = getattr(found, name).toarray(), np.zeros((8, 8))
        numbers = own.numbers(np.array([[0]]), items)[0]
        subtracted[numbers >= 0] = getattr(own, name).toarray()[numbers[numbers >= 0]]
        left, others = kept - subtracted, getattr(rest, name).toarray()
        assert ((left == others) | (left == 0)).all()
        for row in range(8):  # what is left of a row that was cut could be there without the user
            held = kept[row][kept[row] > 0]
            least = held.min() if len(held) >= neighbours else 1
            assert (left[row][left[row] > 0] >= least).all()
            assert np.array_equal(left[row] > 0, (kept[row] > 0) & (left[row] > 0) & (others[row] >= least))
            assert (left[row][(kept[row] > 0) & (others[row] > least)] > 0).all()


def test_a_cut_table_does_not_tell_the_target_of_a_training_row():
    rng, num_items = np.random.default_rng(0), 3000
    law = 1 / np.arange(1, num_items + 1) ** 0.7
    law /= law.sum()
    sequences = {user: rng.choice(num_items, 20, p=law) for user in range(2000)}  # in which nothing is to be found
    counts, users = Counts.fit(sequences, num_items, neighbours=20), list(range(1000))
    lists = np.stack([[sequences[user][-1], *rng.choice(num_items, 50, p=law)] for user in users])
    histories, scores = [sequences[user][:-1] for user in users], np.zeros(lists.shape)
    features = feature_rows(counts, histories, lists, scores, counts.own(users, sequences))
    for name in ("near", "from_last"):
        target, others = np.split(features[..., FEATURES.index(name)], [1], axis=1)
        # .57 and .53 where a user's own counts are subtracted from whatever value was kept
        assert ((target > others) + 0.5 * (target == others)).mean() == pytest.approx(0.5, abs=0.015), name


def test_no_fact_of_a_training_row_is_negative_after_a_cut():
    sequences = sequences_of(drawn_log(longest=15))
    sequences = {user: np.array([item for item, _ in rows]) for user, rows in sequences.items()}
    counts, histories = Counts.fit(sequences, NUM_ITEMS, neighbours=3), list(sequences.values())
    own = counts.own(list(sequences), sequences)
    all_of_own = Counts.fit(sequences, NUM_ITEMS).own(list(sequences), sequences)  # as from counts that were not cut
    lists = np.tile(np.arange(NUM_ITEMS), (len(histories), 1))
    least = [feature_rows(counts, histories, lists, lists, one)[..., FACTS].min() for one in (own, all_of_own)]
    assert least[0] >= 0 > least[1]
    assert (counts.top_rows(histories, 8, own)[1] >= 0).all()


def test_cut_counts_read_back_as_saved(tmp_path):
    counts = Counts.fit({0: np.arange(9) % 4, 1: np.array([3, 1])}, 4, neighbours=2)
    counts.save(tmp_path / "evidence.npz")
    found = Counts.load(tmp_path / "evidence.npz")
    assert_same(found, counts)
    assert found.neighbours == 2 and found.near.indices.dtype == np.int32
