"""Further lists of training rows on the toy data: what they hold, and that nothing of the row's user is in them."""

from dataclasses import replace

import numpy as np
import pytest
from toy_run import NUM_ITEMS, finish, toy_sequences, write_interactions, write_items, write_semantic_ids

from rerank import candidates
from rerank.baselines import FEATURES, Counts, feature_names, feature_rows
from rerank.candidates.augmentation import FIRST_STAGES, AugmentationArguments, DrawnLists, further_lists
from rerank.catalogue import Catalogue
from rerank.dapo.prompt_stream import PromptStream
from rerank.prompts import PromptSettings
from rerank.rows import Prompter, TargetRows, read_rows

SIZE, POOL = 3, 5
ALL_STAGES = list(FIRST_STAGES)
SEQUENCES = toy_sequences()
SPLITS = ["train"] * 4 + ["rerank"] * 2 + ["valid", "test"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with finished data and semantic_ids stages; each of thirty users has two training rows."""
    folder = tmp_path_factory.mktemp("run")
    write_items(folder / "data")
    write_interactions(folder / "data", SEQUENCES, SPLITS * len(SEQUENCES))
    write_semantic_ids(folder / "semantic_ids")
    finish(folder / "semantic_ids")
    return folder


def fitted(sequences):
    """Counts of what training may know of the users."""
    return Counts.fit({user: items[:6] for user, items in sequences.items()}, NUM_ITEMS)


def draw(run, number=1, **options):
    """The training rows, and a further list of each."""
    rows = TargetRows.load(run).of_split("rerank")
    args = AugmentationArguments(run_dir=str(run), lists_per_row=4, **{"pool_size": POOL, **options})
    sequences = {user: items[:6] for user, items in SEQUENCES.items()}
    parts = list(further_lists(args, SIZE, rows, fitted(SEQUENCES), sequences, number))
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    histories = [history for part in parts for history in part.histories]
    return rows, DrawnLists(np.concatenate([part.rows for part in parts]), histories, columns)


def pool_without_user(stage: str, user: int, history) -> list[int]:
    """The longer list from counts of the others, made the slow way for each first stage."""
    counts = fitted({other: items for other, items in SEQUENCES.items() if other != user})
    if stage == "transitions":
        return counts.top_rows([history], POOL)[0][0].tolist()
    everyone = np.arange(NUM_ITEMS)
    scores = {"popularity": counts.popularity, "ease": counts.regression.scores([history], everyone[None], None)[0][0]}
    # ties by the popularity among all users
    order = sorted(everyone, key=lambda item: (-scores[stage][item], -fitted(SEQUENCES).popularity[item], item))
    return [int(item) for item in order if item not in history][:POOL]


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_lists_are_drawn_from_a_longer_list_that_leaves_the_user_out(run, stage):
    rows, drawn = draw(run, first_stages=[stage])
    pools = [pool_without_user(stage, rows.users[row], rows.histories[row]) for row in range(len(rows))]
    hits = [row for row in range(len(rows)) if rows.targets[row] in pools[row]]
    assert drawn.rows.tolist() == hits and 0 < len(hits) < len(rows)
    for row, items in zip(hits, drawn.columns["candidates"].tolist(), strict=True):
        places = [pools[row].index(item) for item in items]
        assert places == sorted(set(places)) and rows.targets[row] in items
    assert (drawn.columns["first_stage_ranks"] == np.arange(1, SIZE + 1)).all()


def test_every_other_item_of_the_longer_list_is_drawn_as_often(run):
    seen = np.zeros(POOL)
    rows, drawn = draw(run)
    row = drawn.rows[0]
    pool = pool_without_user("transitions", rows.users[row], rows.histories[row])
    for number in range(1, 301):
        _, drawn = draw(run, number)
        seen[[pool.index(item) for item in drawn.columns["candidates"][0]]] += 1
    target = pool.index(rows.targets[row])
    others = np.delete(seen, target) / 300
    assert seen[target] == 300
    assert others == pytest.approx(np.full(POOL - 1, (SIZE - 1) / (POOL - 1)), abs=4 * np.sqrt(0.4 * 0.6 / 300))


def test_features_are_those_of_the_others_counts(run):
    rows, drawn = draw(run, first_stages=ALL_STAGES, cut_histories=True)
    rest_on_popularity = ("popularity", "lift")  # see _count_facts
    for place, row in enumerate(drawn.rows):
        counts = fitted({user: items for user, items in SEQUENCES.items() if user != rows.users[row]})
        names = feature_names(counts)  # none of embeddings, which this run lacks
        scores = drawn.columns["first_stage_scores"][place][None]
        made = feature_rows(counts, [drawn.histories[place]], drawn.columns["candidates"][place][None], scores, None)
        chosen = [name for name in names if name not in rest_on_popularity]
        found = drawn.columns["features"][place][:, [names.index(name) for name in chosen]]
        expected = made[0][:, [FEATURES.index(name) for name in chosen]]
        assert len(chosen) < len(FEATURES) - 2 and found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_cut_history_is_of_the_last_items_and_brings_none_of_the_others_back(run):
    rows, drawn = draw(run, cut_histories=True)
    lengths = set()
    for place, row in enumerate(drawn.rows):
        whole, cut = rows.histories[row].tolist(), drawn.histories[place].tolist()
        assert cut == whole[-len(cut) :] and cut
        lengths.add(len(whole) - len(cut))
        pool = pool_without_user("transitions", rows.users[row], drawn.histories[place])
        old = {item for item in whole if item != rows.targets[row]}
        room = len(set(pool) - old)
        assert len(old & set(drawn.columns["candidates"][place].tolist())) == max(0, SIZE - room)
    assert len(lengths) > 2


def test_shuffled_candidates_keep_their_ranks_and_facts(run):
    (_, plain), (_, drawn) = draw(run), draw(run, shuffle_candidates=True)
    ranks = drawn.columns["first_stage_ranks"]
    assert (np.sort(ranks, axis=1) == np.arange(1, SIZE + 1)).all() and (ranks != np.arange(1, SIZE + 1)).any()
    for name in ("candidates", "first_stage_scores", "features"):
        back = [values[np.argsort(order)] for values, order in zip(drawn.columns[name], ranks, strict=True)]
        assert np.array_equal(back, plain.columns[name])


def test_draws_follow_from_the_seed_and_the_number_alone(run):
    options = {"first_stages": ALL_STAGES, "cut_histories": True, "shuffle_candidates": True}
    first, again = draw(run, **options)[1], draw(run, **options)[1]
    assert all(np.array_equal(first.columns[name], again.columns[name]) for name in first.columns)
    for other in (draw(run, 2, **options)[1], draw(run, seed=1, **options)[1]):
        assert not np.array_equal(first.columns["candidates"], other.columns["candidates"])


def test_each_epoch_of_dapo_is_of_one_list_of_every_row(run, tmp_path):
    args = candidates.CandidatesArguments(run_dir=str(run), num_candidates=SIZE, pool_size=POOL, lists_per_row=3,
                                          shuffle_candidates=True)  # fmt: skip
    candidates.check(args)
    metrics = candidates.main(args, tmp_path)
    rows = read_rows(tmp_path / "train.parquet", needs_features=True)
    by_list = [[row for row in rows if row.list_number == number] for number in range(3)]
    plain = candidates.main(replace(args, lists_per_row=1, pool_size=None, shuffle_candidates=False), tmp_path)
    assert read_rows(tmp_path / "train.parquet") == by_list[0]  # the first list is that of validation and test
    assert metrics["splits"] == plain["splits"] and metrics["further_lists"] == len(by_list[1]) + len(by_list[2])
    assert len(by_list[1]) > len(by_list[0])  # a longer list holds more targets
    assert len({row.row_id for row in rows}) == len(rows)
    assert {row.ranks for row in by_list[0]} == {(1, 2, 3)} != {row.ranks for row in by_list[1]}

    stream = PromptStream(rows, Prompter(Catalogue.load(run), PromptSettings()), 0, 9)
    taken, start = stream.take(0, 2 * len(rows)), 0
    for epoch in range(6):
        expected = by_list[epoch % 3]
        prompts = taken[start : start + len(expected)]
        assert {prompt.epoch for prompt in prompts} == {epoch}
        assert sorted(prompt.asked.row.row_id for prompt in prompts) == [row.row_id for row in expected]
        start += len(expected)
    assert start == len(taken)
    one_by_one = [stream.take(number, 1)[0].asked.row for number in range(len(taken))]
    assert [prompt.asked.row for prompt in taken] == one_by_one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 5}, "pool_size changes the further lists of a training row, of which there are none"),
        ({"lists_per_row": 2}, "lists_per_row is 2 but all lists of a row would be the same; set pool_size"),
        ({"lists_per_row": 0}, "lists_per_row is 0 but must be at least 1"),
        ({"lists_per_row": 2, "pool_size": 3}, "pool_size is 3 but must be above 3"),
        (
            {"lists_per_row": 2, "first_stages": ["easy"]},
            "first_stages is 'easy' but must be one of transitions, ease",
        ),
        (
            {"lists_per_row": 2, "first_stages": []},
            "first_stages is empty; name some of transitions, ease",
        ),
        ({"lists_per_row": 2, "pool_size": 9}, "pool_size is 9 but the longest history leaves 5 of 12 items; use at"),
    ],
)
def test_refused(run, options, message):
    with pytest.raises(ValueError, match=message):
        candidates.check(candidates.CandidatesArguments(run_dir=str(run), num_candidates=SIZE, **options))
