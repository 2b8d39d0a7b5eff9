"""Rows with several graded positives and candidates that were not seen: each figure by hand, with and without top_k.

ROW shows five candidates in first-stage order with the grades 0, not seen, 1, 2, 0. Without the one that was not seen
the order shown is 0, 1, 2, 0, so that the target, of grade 2, stands third of four, and a positive second.
"""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from request_run import draw_requests, write_requests
from scripted_dapo import SETTINGS, sampler, stream
from toy_run import CATALOGUE, rollout, write_rollouts

from rerank import probe, scoring
from rerank.dapo.groups import record
from rerank.launch import validation
from rerank.metrics import auc as metrics_auc
from rerank.metrics import mean_random_metrics, ndcg_at_k, ranking_metrics, recall_at_k, reciprocal_rank
from rerank.plugins import load_function
from rerank.probe import policies
from rerank.probe.rows import ProbeRow
from rerank.probe.scores import Scale, Scorer, best_blind_order
from rerank.prompts import Parsed, PromptSettings, completion, parse_completion, word_labels
from rerank.report import rollouts as report_rollouts
from rerank.rollouts import metrics as rollout_metrics
from rerank.rollouts import rescore, text
from rerank.rollouts.groups import RolloutGroups
from rerank.rollouts.store import open_rollouts, read_rollouts, to_table
from rerank.rows import PromptedRow, Prompter, RankingRow, check_top_k, read_rows, reward_columns, stored
from rerank.rows.checks import check_log
from rerank.rows.stored import HitLists
from rerank.sft.rows import gold_order
from rerank.traces import TracesArguments, attempts, evidence
from rerank.traces.teachers import PromptWriter

OLD = Path(__file__).with_name("data") / "toy_run"  # its rollouts have schema version 2
NOT_SEEN = math.nan
LABELS = ["1", "2", "3", "4", "5"]
ROW = RankingRow(7, (9,), (0, 1, 2, 3, 4), (0.0, NOT_SEEN, 1.0, 2.0, 0.0), user=3)
SINGLE = RankingRow(8, (9,), (0, 1, 2, 3, 4), (0.0, 0.0, 1.0, 0.0, 0.0), user=3)
IDEAL = 3 + 1 / math.log2(3)  # gains 2^2 - 1 = 3 and 2^1 - 1 = 1 at the ranks 1 and 2


def text_of(order: str, trace: str = "why") -> str:
    """A completion that writes the candidates at these positions."""
    return completion(trace, [int(place) for place in order], LABELS)


# --- the row


def test_a_row_knows_its_best_candidates_and_the_places_of_its_positives_among_those_that_were_seen():
    assert (ROW.is_hit, ROW.best, ROW.target, ROW.target_rank, ROW.positives) == (True, (3,), 3, 4, [2, 3])
    assert ROW.positive_rank == 2  # of 0, 1, 2, 0
    # 3 2 1 0 4: grades 2, 1, not seen, 0, 0. 1 0 4 2 3: not seen, 0, 0, 1, 2, the first positive third
    assert [ROW.place_of_positive(order) for order in ([3, 2, 1, 0, 4], [1, 0, 4, 2, 3])] == [1, 3]
    assert [ROW.rank_gain(order) for order in ([3, 2, 1, 0, 4], [1, 0, 4, 2, 3], None)] == [1.0, -1.0, -math.inf]
    assert ROW.rank_gain([1, 0, 2, 3, 4]) == 0.0  # to move what was not seen is to move nothing
    assert ROW.place_of_target([1, 0, 4, 2, 3]) == 5  # among all candidates, as target_rank


def test_a_row_keeps_its_places_when_it_is_shown_in_another_order():
    shown = ROW.shuffled([4, 3, 2, 1, 0])
    assert (shown.target, shown.target_rank, shown.positive_rank) == (1, 4, 2)
    assert shown.rank_gain([1, 0, 2, 3, 4]) == 1.0  # the target first
    assert shown.rank_gain([4, 3, 2, 1, 0]) == 0.0  # the first stage's order


@pytest.mark.parametrize(
    ("grades", "best"),
    [
        ((0.0, 1.0), (1,)),
        ((1.0, 1.0), ()),  # nothing but positives: no ranking is better than another
        ((0.0, 0.0), ()),
        ((NOT_SEEN, 1.0), ()),  # one judged candidate
        ((1.0, 2.0), (1,)),  # all positive, and one better
        ((NOT_SEEN, 0.0, 2.0, 1.0, 2.0), (2, 4)),
        ((), ()),
    ],
)
def test_a_row_is_a_hit_where_a_ranking_of_its_judged_candidates_can_be_good_or_bad(grades, best):
    row = RankingRow(1, (), tuple(range(max(2, len(grades)))), grades)
    assert (row.best, row.is_hit, row.target) == (best, bool(best), best[0] if best else None)


def test_of_equally_good_candidates_the_target_is_the_one_that_the_first_stage_ranks_best():
    row = RankingRow(1, (), (5, 6, 7), (2.0, 0.0, 2.0), ranks=(3, 1, 2))
    assert (row.best, row.target, row.target_rank) == ((2, 0), 2, 2)


def test_requests_are_read_with_their_ids_times_and_grades(tmp_path):
    lines = [
        {"row_id": 1, "user": 0, "history": [4, 5], "candidates": [1, 2, 3], "relevance": [0.0, None, 2.0]}
        | {"request_id": "r1", "time": 9.5, "history_times": [1.0, None], "history_events": ["click", None]}
        | {"fields": json.dumps({"device": "phone"})},
        {"row_id": 2, "user": 1, "history": [], "candidates": [1, 2], "relevance": [1.0, 0.0]}
        | {"request_id": "r2", "time": None, "history_times": [], "history_events": [], "fields": "{}"},
        {"row_id": 3, "user": 1, "history": [], "candidates": [1, 2], "relevance": [1.0, None]}  # nothing to tell
        | {"request_id": "r3", "time": None, "history_times": None, "history_events": None, "fields": "{}"},
    ]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "train.parquet")
    first, second = read_rows(tmp_path / "train.parquet")
    assert (first.request_id, first.time, dict(first.fields)) == ("r1", 9.5, {"device": "phone"})
    assert (first.history_times, first.history_events) == ((1.0, None), ("click", None))
    assert first.relevance[0] == 0.0 and math.isnan(first.relevance[1]) and first.best == (2,)
    assert (second.time, second.history, second.history_times) == (None, (), ())
    with pytest.raises(ValueError, match="row_id 1: history_times has 1 entries but there are 2 items in the history"):
        RankingRow(1, (4, 5), (1, 2), history_times=(1.0,))


# --- metrics


@pytest.mark.parametrize("place", range(5))
def test_a_metric_of_a_ranking_is_that_of_the_ranking_without_what_was_not_seen(place):
    grades = [0.0, 2.0, 0.0, 1.0]
    with_unseen = [*grades[:place], NOT_SEEN, *grades[place:]]
    # grade 2 second, grade 1 fourth: (3 / log2 3 + 1 / log2 5) / IDEAL; 1 of 2 in the first two; 1 / 2; one of the
    # four pairs is in order
    assert ndcg_at_k(with_unseen, 4) == pytest.approx((3 / math.log2(3) + 1 / math.log2(5)) / IDEAL)
    assert recall_at_k(with_unseen, 2) == 0.5
    assert reciprocal_rank(with_unseen) == 0.5
    assert metrics_auc(with_unseen) == 0.25
    assert ranking_metrics(with_unseen) == ranking_metrics(grades)
    assert mean_random_metrics(with_unseen) == mean_random_metrics(grades)


# --- rewards and conditions

# The orders: shown; what was not seen moved to the end; the best one; the two positives swapped round the other way;
# the first positive last. In brackets their grades without what was not seen.
SHOWN, UNSEEN_LAST, BEST, TARGET_SECOND, DOWN = "01234", "02341", "32104", "23104", "14032"
BY_HAND = {
    # (gain of each place / log2(rank + 1), over IDEAL): 0 1 2 0, 2 1 0 0, 1 2 0 0, and 0 0 2 1
    "ndcg": {
        SHOWN: (1 / math.log2(3) + 3 / 2) / IDEAL,
        UNSEEN_LAST: (1 / math.log2(3) + 3 / 2) / IDEAL,
        BEST: 1.0,
        TARGET_SECOND: (1 + 3 / math.log2(3)) / IDEAL,
        DOWN: (3 / 2 + 1 / math.log2(5)) / IDEAL,
        "junk": 0.0,
    },
    # pairs of a positive and a 0 in order, of 2 * 2, whatever the grade: 0 1 2 0 has two
    "auc": {SHOWN: 0.5, UNSEEN_LAST: 0.5, BEST: 1.0, TARGET_SECOND: 1.0, DOWN: 0.0, "junk": 0.0},
    # the target is third of the four that were seen: (3 - 3) / 4, (3 - 1) / 4, (3 - 2) / 4, (3 - 3) / 4
    "rank_promotion": {SHOWN: 0.0, UNSEEN_LAST: 0.0, BEST: 0.5, TARGET_SECOND: 0.25, DOWN: 0.0, "junk": -1.0},
    # tau of four falls by 2 / 6 with each pair out of order, and (1 - tau) / 0.2 is 1 from one such pair on; a copy of
    # those that were seen is a copy, and what is better pays nothing: the AUC of DOWN is lower, its tau -1/3
    "not_a_copy": {SHOWN: 0.0, UNSEEN_LAST: 0.0, BEST: 1.0, TARGET_SECOND: 1.0, DOWN: 1.0, "junk": 0.0},
    "well_formed": {SHOWN: 1.0, UNSEEN_LAST: 1.0, BEST: 1.0, TARGET_SECOND: 1.0, DOWN: 1.0, "junk": 0.0},
    "grounded": {SHOWN: 1.0, BEST: 1.0, "junk": 0.0},
    "overlong": {SHOWN: 0.0, BEST: 0.0, "junk": 0.0},
    "conditions.not_a_suboptimal_copy": {SHOWN: False, UNSEEN_LAST: False, BEST: True, DOWN: True, "junk": False},
    "conditions.promoted_or_first": {SHOWN: False, UNSEEN_LAST: False, BEST: True, TARGET_SECOND: True, "junk": False},
    "conditions.promoted_or_kept_first": {SHOWN: False, UNSEEN_LAST: False, BEST: True, DOWN: False, "junk": False},
    "conditions.valid_ranking": {SHOWN: True, BEST: True, "junk": False},
}


def values_of(name, row, texts, top_k=0, **kwargs):
    """The values of a reward or condition on completions of one row whose prompt has the numbers 1 to 5."""
    folder, _, plain = f"rewards.{name}".rpartition(".")
    asked = PromptedRow(row, "Candidates: 1 2 3 4 5", LABELS, 8192, top_k)
    columns = reward_columns([asked] * len(texts)) | {"completion_ids": [[1]] * len(texts)}
    return load_function(plain, folder, **kwargs)(completions=texts, **columns)


def test_there_is_an_example_of_every_reward_and_condition():
    from rerank.plugins import known_names

    conditions = [f"conditions.{name}" for name in known_names("rewards.conditions")]
    assert sorted(BY_HAND) == sorted([*known_names("rewards"), *conditions])


@pytest.mark.parametrize("name", BY_HAND)
def test_a_reward_of_graded_rows_is_that_by_hand(name):
    texts = [order if order == "junk" else text_of(order, "it is 3") for order in BY_HAND[name]]
    assert values_of(name, ROW, texts) == pytest.approx(list(BY_HAND[name].values()))


# The best two are written, and the others follow as shown: 3 2 | 0 1 4, 3 1 | 0 2 4 and 1 0 | 2 3 4, of the grades
# 2 1 0 0, 2 0 1 0 and 0 1 2 0; then one label too many, one too few and one twice.
TOP_2 = ["32", "31", "10", "320", "3", "33"]
TOP_2_BY_HAND = {
    "ndcg": [1.0, (3 + 1 / 2) / IDEAL, (1 / math.log2(3) + 3 / 2) / IDEAL, 0.0, 0.0, 0.0],
    "auc": [1.0, 0.75, 0.5, 0.0, 0.0, 0.0],
    "rank_promotion": [0.5, 0.5, 0.0, -1.0, -1.0, -1.0],
    "not_a_copy": [1.0, 1.0, 0.0, 0.0, 0.0, 0.0],
    "well_formed": [1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
    "grounded": [1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
    "overlong": [0.0] * 6,
    "conditions.not_a_suboptimal_copy": [True, True, False, False, False, False],
    "conditions.promoted_or_first": [True, True, False, False, False, False],
    "conditions.promoted_or_kept_first": [True, True, False, False, False, False],
    "conditions.valid_ranking": [True, True, True, False, False, False],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_reward_of_the_best_two_is_that_by_hand(name):
    texts = [text_of(order, "it is 3") for order in TOP_2]
    assert values_of(name, ROW, texts, top_k=2) == pytest.approx(TOP_2_BY_HAND[name])


def test_ranks_of_the_target_count_what_was_seen_alone():
    first_unseen = RankingRow(1, (), (0, 1, 2, 3, 4), (NOT_SEEN, 2.0, 0.0, 1.0, 0.0))
    kept, down = text_of("01234"), text_of("02134")  # the target is first of the seen, then second
    for name, expected in (
        ("rank_promotion", [0.0, -0.25]),
        ("conditions.promoted_or_first", [True, True]),
        ("conditions.promoted_or_kept_first", [True, False]),
    ):
        assert values_of(name, first_unseen, [kept, down]) == expected


def test_a_reward_does_not_apply_where_nothing_relevant_was_seen():
    row = RankingRow(1, (), (0, 1, 2, 3, 4), (0.0, NOT_SEEN, 0.0, 0.0, 0.0))
    for name in ("ndcg", "auc"):
        assert values_of(name, row, [text_of(SHOWN), "junk"]) == [None, None]


# --- top_k in texts


@pytest.mark.parametrize("labels", [LABELS[:3], ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>", "<s_a_1><s_b_0>"]])
def test_an_answer_of_the_best_k_ranks_all_candidates(labels):
    for order in ([2, 0, 1], [1, 2, 0]):
        answer = completion("why", order, labels, top_k=1)
        rest = [place for place in range(3) if place != order[0]]
        assert parse_completion(answer, labels, top_k=1) == Parsed(order=[order[0], *rest], trace="why")
        assert parse_completion(answer, labels).failure == "too_few"
        full = completion("why", order, labels)
        assert parse_completion(full, labels, top_k=1).failure == "too_many"
        for top_k in (3, 4):  # all there are
            assert completion("why", order, labels, top_k) == full
            assert parse_completion(full, labels, top_k).order == order


def test_of_candidates_that_share_an_id_the_first_shown_is_named_first():
    labels = ["<s_a_0>", "<s_a_1>", "<s_a_0>", "<s_a_0>"]
    assert parse_completion("<think></think><s_a_0><s_a_0>", labels, 2).order == [0, 2, 1, 3]


def test_a_prompt_asks_for_the_best_k_where_there_are_more():
    def message(top_k, size=5, **settings):
        prompter = Prompter(CATALOGUE, PromptSettings(ranking="number", top_k=top_k, **settings))
        return prompter.message(RankingRow(1, (9,), tuple(range(size))))

    assert "write the numbers, separated by spaces, of the best 2 candidates, best first" in message(2)
    assert "write the numbers, separated by spaces, of all 5 candidates, best first" in message(0)
    assert message(2, task="short").startswith("Rank the best 2:\n")
    for top_k, size in ((5, 5), (9, 5), (2, 2)):
        assert message(top_k, size) == message(0, size)
        assert message(top_k, size, task="short").startswith("Rank:\n")
    with pytest.raises(ValueError, match="top_k is -1 but must be an integer of at least 1, or 0 for all candidates"):
        PromptSettings(top_k=-1)


def test_a_top_k_above_every_list_is_refused(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"candidates": [[1, 2, 3], [4, 5, 6, 7]]}), path)
    check_top_k(path, 4)
    with pytest.raises(ValueError, match="top_k is 5 but the longest list of .*train.parquet has 4 candidates"):
        check_top_k(path, 5)
    check_top_k(path, 0)


def test_of_the_lists_of_a_log_those_for_training_are_compared_with_top_k(tmp_path):
    rows = draw_requests()
    write_requests(tmp_path, [row for row in rows if row["split"] != "rerank" or len(row["candidates"]) < 12])
    settings = {"item_fields": ["title"], "ranking": "number"}
    check_log(tmp_path, PromptSettings(**settings, top_k=7))
    with pytest.raises(ValueError, match="top_k is 8 but the longest list of .*data/rows.parquet has 7 candidates"):
        check_log(tmp_path, PromptSettings(**settings, top_k=8))


# --- traces and gold orders


@pytest.mark.parametrize(
    ("order", "first", "ndcg"),
    [
        (BEST, "accepted", "accepted"),
        (TARGET_SECOND, "target_not_first", "accepted"),  # 1 2 0 0 is better than 0 1 2 0
        (SHOWN, "target_not_first", "no_better"),
        (UNSEEN_LAST, "target_not_first", "no_better"),
        ("13204", "accepted", "accepted"),  # before the target stands only what was not seen
        ("30412", "accepted", "accepted"),  # 2 0 0 1: (3 + 1 / log2 5) / IDEAL against (1 / log2 3 + 3 / 2) / IDEAL
        (DOWN, "target_not_first", "no_better"),  # 0 0 2 1
    ],
)
def test_a_trace_is_accepted_for_its_first_item_or_for_its_ndcg(order, first, ndcg):
    for accept, reason in (("first", first), ("ndcg", ndcg)):
        line = attempts.judge(ROW, LABELS, 1, attempts.Draft(text_of(order)), accept)
        assert (line["reason"], line["accepted"], line["target_rank_in"]) == (reason, reason == "accepted", 4)


def test_the_best_order_is_accepted_where_the_input_order_is_no_worse():
    row = RankingRow(1, (), (0, 1, 2), (2.0, 1.0, 0.0))
    for order, reason in (("012", "accepted"), ("021", "no_better")):
        draft = attempts.Draft(completion("why", [int(place) for place in order], LABELS[:3]))
        assert attempts.judge(row, LABELS[:3], 1, draft, "ndcg")["reason"] == reason


def test_a_draft_of_the_best_two_is_judged_with_the_others_behind_them():
    line = attempts.judge(ROW, LABELS, 1, attempts.Draft(text_of("32")), "first", top_k=2)
    assert (line["accepted"], line["order"]) == (True, [3, 2, 0, 1, 4])
    assert attempts.judge(ROW, LABELS, 1, attempts.Draft(text_of("32140")), top_k=2)["reason"] == "too_many"


def test_to_name_any_of_several_best_items_as_told_gives_the_answer_away():
    row = RankingRow(1, (), (0, 1, 2), (1.0, 0.0, 1.0))
    told = {place: f"we have it as given: {place} is right" for place in ("1", "2", "3")}
    found = {
        place: attempts.judge(row, LABELS[:3], 1, attempts.Draft(f"<think>known: {place}</think> 1 2 3"))
        for place in told
    }
    assert [found[place]["gives_answer_away"] for place in told] == [True, False, True]


def test_what_is_accepted_is_an_option():
    with pytest.raises(ValueError, match="accept is 'best'"):
        TracesArguments(run_dir="run", teacher="evidence", accept="best")


@pytest.mark.parametrize(
    ("teacher", "gold"),
    [
        # grade 2, grade 1, then the zeros as the teacher has them; what was not seen keeps its place
        ([4, 2, 1, 0, 3], [3, 2, 1, 4, 0]),
        ([1, 0, 4, 2, 3], [1, 3, 2, 0, 4]),
        ([3, 2, 1, 0, 4], [3, 2, 1, 0, 4]),
    ],
)
def test_the_gold_order_goes_by_grade_then_teacher(teacher, gold):
    assert gold_order(ROW, teacher) == gold


def test_the_gold_order_of_the_best_k_keeps_the_input_order_behind_them():
    order = attempts.judge(ROW, LABELS, 1, attempts.Draft(text_of("34")), top_k=2)["order"]
    assert order == [3, 4, 0, 1, 2]
    assert gold_order(ROW, order) == [3, 2, 4, 1, 0]  # 1 was not seen, and keeps the fourth place


def test_with_one_positive_the_gold_order_is_that_of_an_accepted_teacher():
    rng = np.random.default_rng(0)
    for _ in range(50):
        others = rng.permutation([0, 1, 3, 4]).tolist()
        assert gold_order(SINGLE, [2, *others]) == [2, *others]


# --- the teacher evidence


def evidence_row(row_id, grades):
    size = len(grades)
    features = np.random.default_rng(row_id).random((size, 3), dtype=np.float32)
    features[:, 0] += np.nan_to_num(np.array(grades))  # the first feature tells the grade
    return RankingRow(row_id, (9,), tuple(range(size)), tuple(grades), user=row_id, features=features)


def test_calibration_asks_how_often_one_of_the_best_seen_candidates_is_drawn():
    # scores 1, 1, 0 and one that was not seen; in 3 of 4 rows the best are the two of score 1, in one the third:
    # 2 e^f / (2 e^f + 1) = 3/4, so that e^f = 3/2
    scores = [np.array([1.0, 1.0, 0.0, 50.0])] * 4
    grades = [(2.0, 2.0, 1.0, NOT_SEEN)] * 3 + [(0.0, 1.0, 2.0, NOT_SEEN)]
    assert evidence.calibrate(scores, grades) == pytest.approx(math.log(1.5), rel=1e-3)


def test_scores_of_all_folds_share_a_unit_and_a_zero():
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=6) for _ in range(50)]
    grades = [(np.arange(6) == (of_row + rng.gumbel(size=6)).argmax()).astype(float) for of_row in scores]
    later = [5 * of_row + 3 for of_row in scores]  # as of trees that stopped later
    found = np.stack(evidence.calibrated([*scores, *later], [*grades, *grades], np.repeat([1, 0], 50)))
    assert found[:50] == pytest.approx(found[50:], rel=1e-3, abs=1e-3)
    assert found.mean() == pytest.approx(0, abs=1e-9) and found.std() > 0.5
    assert all(np.array_equal(np.argsort(a), np.argsort(b)) for a, b in zip(scores, found[50:], strict=True))


def test_the_evidence_teacher_scores_and_ranks_lists_of_any_length():
    lists = [(0.0, 1.0), (2.0, 0.0, NOT_SEEN, 1.0, 0.0, 2.0, 0.0), (*[0.0] * 23, 1.0), (*[0.0, 1.0, 2.0] * 100,)]
    rows = [evidence_row(number, lists[number % 4]) for number in range(40)]
    columns = zip(*((row.row_id, row.user, row.relevance, row.features) for row in rows), strict=True)
    scores = evidence.fit_scores(HitLists(*columns), ["click_rate", "shown", "candidate_price"], seed=0)
    assert {row.row_id: len(scores[row.row_id]) for row in rows} == {row.row_id: len(row.candidates) for row in rows}
    prompter = Prompter(stream(1).prompter.catalogue, SETTINGS)
    rows = [row for row in rows if len(row.candidates) < 100]  # of as many items as the catalogue has
    for told in (False, True):
        teacher = evidence.EvidenceTeacher(scores, prompter, 1.0, 0, told)
        for row, draft in zip(rows, teacher(rows, 1), strict=True):
            order = parse_completion(draft.text, prompter.labels(row)).order
            assert sorted(order) == list(range(len(row.candidates)))
            if told:  # all of the highest grade first
                assert set(order[: len(row.best)]) == set(row.best)


def test_the_evidence_teacher_writes_the_best_k():
    row = evidence_row(0, (0.0, 1.0, 2.0, 0.0))
    prompter = Prompter(CATALOGUE, PromptSettings(ranking="number", top_k=2, task="short"))
    teacher = evidence.EvidenceTeacher({0: np.arange(4.0)}, prompter, 0.0, 0, told=True)
    (draft,) = teacher([row], 1)
    assert len(draft.text.partition("</think>")[2].split()) == 2
    assert parse_completion(draft.text, LABELS[:4], 2).order[0] == 2


def test_a_told_teacher_hears_all_of_the_best():
    prompter = Prompter(CATALOGUE, PromptSettings(ranking="number"))
    several = RankingRow(1, (9,), (0, 1, 2), (2.0, 1.0, 2.0))
    assert "The items taken next are 1, 3. Put them first" in PromptWriter(prompter, told=True)(several)
    assert "The item taken next is 4. Put it first" in PromptWriter(prompter, told=True)(ROW)


# --- outcomes, validation


def test_the_outcome_is_rank_gain_until_a_row_has_several_positives():
    specs = [{"name": "well_formed", "weight": 0.2}, {"name": "ndcg"}, {"name": "auc", "weight": 1.0}]
    rewards = scoring.load_rewards(specs)

    def chosen(given, *relevance):
        return scoring.choose_outcome(given, rewards, scoring.has_several_positives(relevance))

    assert chosen(None, SINGLE.relevance) == "rank_gain"
    assert chosen(None, (1.0, NOT_SEEN), SINGLE.relevance) == "rank_gain"
    assert chosen(None, SINGLE.relevance, ROW.relevance) == "ndcg"  # of equals the first
    assert chosen("well_formed", ROW.relevance) == "well_formed"
    assert chosen("rank_gain", ROW.relevance) == "rank_gain"


def test_a_sampler_reads_the_best_k_of_graded_rows():
    rewards = scoring.load_rewards([{"name": "ndcg"}])
    ids = [f"<s_a_{item}>" for item in range(4)]  # of the first row, whose third candidate of four is the target
    for written, ranked in (([2], [2, 0, 1, 3]), ([2, 0], None)):
        text = completion("why", written, ids)
        made = sampler(lambda prompt, member: 5, count=1, rewards=rewards, text=text, outcome="ndcg")
        settings = replace(made.prompts.prompter.settings, top_k=1)
        made.prompts.prompter = replace(made.prompts.prompter, settings=settings)
        (group,) = made.collect(0, 1)[0].sampled
        assert [rollout.order for rollout in group.rollouts] == [ranked] * 4
        assert group.rollouts[0].rewards == {"ndcg": 0.0 if ranked is None else 1.0}
        stored = record(group, group.rollouts[0], "toy")
        assert (stored["top_k"], stored["positive_rank"]) == (1, 3)
        assert stored["positive_rank_after"] == (None if ranked is None else 1)


def test_validation_measures_what_was_seen_and_knows_top_k():
    asked = [PromptedRow(ROW, "", LABELS, 9, top_k=2)] * 3
    found = validation.measure(asked, [text_of("32"), text_of("10"), text_of(SHOWN)])
    # 1, (1 / log2 3 + 3 / 2) / IDEAL, and no ranking, since it names five
    assert found["eval_N@5"] == pytest.approx((1 + (1 / math.log2(3) + 3 / 2) / IDEAL) / 3)
    assert found["eval_R@1"] == pytest.approx(0.5 / 3)  # one of two positives first, once
    assert (found["eval_parse_failures"], found["eval_copy_rate"]) == (pytest.approx(1 / 3), 0.0)


def test_requests_are_the_same_where_their_ids_are():
    same = RankingRow(1, (9,), (0, 1), (1.0, 0.0), user=3, request_id="a")
    assert stored._identity(same) == stored._identity(RankingRow(2, (), (4, 5), user=8, request_id="a"))
    other = RankingRow(1, (9,), (0, 1), (1.0, 0.0), user=3, request_id="b")
    assert stored._identity(same) != stored._identity(other)


# --- the probe


def probe_rows(lists, top_k=0, ranking="number"):
    """A row of each list of grades, with the labels of its length."""
    found = []
    for number, grades in enumerate(lists):
        ids = [f"<s_a_{place}>" for place in range(len(grades))]
        labels = ids if ranking == "semantic_id" else word_labels(ranking, len(grades))
        row = RankingRow(number, (9,), tuple(range(len(grades))), grades, user=number)
        found.append(ProbeRow(row, "Rank:", labels, 8192, top_k, popularity=list(range(len(grades)))))
    return found


@pytest.mark.parametrize("ranking", ["number", "semantic_id", "letter", "token"])
@pytest.mark.parametrize("top_k", [0, 1, 2, 9])
def test_every_policy_writes_what_it_says_for_lists_of_any_length(top_k, ranking):
    rows = probe_rows([(0.0, 1.0), (1.0, NOT_SEEN, 2.0, 0.0, 0.0), (0.0,) * 24 + (1.0, 2.0)], top_k, ranking)
    fixed = best_blind_order(Scorer(scoring.load_rewards([{"name": "ndcg"}]), "ndcg", 1), rows)
    for policy, kind in policies.all_of(rows, fixed):
        for row in rows:
            order = parse_completion(policy(row, random.Random(0)), row.labels, top_k).order
            assert (order is None) == (kind == "no ranking"), (policy.__name__, row.labels, order)
            if policy.__name__ == "oracle":
                assert order[0] == row.row.target
            if policy.__name__ == "swap_neighbours":  # nothing is won or lost
                moved = [row.row.relevance[place] for place in order]
                np.testing.assert_array_equal(moved, row.row.relevance)


def test_one_fixed_order_is_found_on_lists_of_all_lengths():
    # the positive is shown third in four lists of three to six candidates, and put first; a list of two has no third
    third = [(0.0, 0.0, 1.0, *[0.0] * more) for more in (0, 1, 1, 3)]
    rows = probe_rows([*third, (0.0, 1.0)])
    fixed = best_blind_order(Scorer(scoring.load_rewards([{"name": "rank_promotion"}]), "rank_gain", 1), rows)
    orders = [parse_completion(fixed(row, random.Random(0)), row.labels).order for row in rows]
    assert [order[0] for order in orders[:4]] == [2] * 4
    for row, order in zip(rows, orders, strict=True):  # one order for all, of the places that a list has
        assert order == [place for place in orders[3] if place < len(row.labels)]


def test_a_row_has_nothing_to_gain_where_its_best_placed_positive_is_first():
    lists = [(1.0, 0.0, 2.0), (NOT_SEEN, 2.0, 0.0), (0.0, 1.0, 2.0)]
    assert [row.row.positive_rank for row in probe_rows(lists)] == [1, 1, 2]
    scale = Scale.of(Scorer(scoring.load_rewards([{"name": "ndcg"}]), "ndcg", 1), probe_rows(lists[2:]))
    assert scale.oracle_gain == scale.oracle_reward == 1.0
    # of six orders the 0 comes first in two, and the first positive is second: 2/3 of a place is won on average
    assert scale.random_gain == pytest.approx(2 / 3, abs=0.15)


@pytest.mark.parametrize(
    ("kind", "share", "gain_share", "excess"),
    [
        ("blind", -0.2, -0.8, -0.45),  # it loses most of the rank, and NDCG pays less for the last places: no gift
        ("blind", 0.3, -0.1, 0.05),  # what it earns above random orders is not for rank: 0.3 - 0.25
        ("blind", 0.5, 0.4, -0.15),  # (0.5 - 0.4) - 0.25
        ("copy", -0.2, -0.8, 0.63),  # (-0.2 + 0.8) + 0.03: a copy must cost against its rank, however low that is
    ],
)
def test_an_order_that_earns_no_more_than_random_orders_is_not_refused(kind, share, gain_share, excess):
    numbers = dict.fromkeys(("spread", "above_no_op", "useful_with_no_op", "useful_with_random"), 0.0)
    outcome = probe.Outcome("p", kind, 1.0, 0.0, share, gain_share, **numbers, reward_if_first=None, parts={})
    assert outcome.excess(0.25) == pytest.approx(excess)


# --- what is stored and shown


def graded_rollout(**changes):
    """A rollout of ROW that ranks 1 2 3 0 4: grade 1 is first of those that were seen, and one place is won."""
    columns = reward_columns([PromptedRow(ROW, "Rank:", LABELS, 16)])
    told = {name: values[0] for name, values in columns.items() if name != "prompts"}
    order = [1, 2, 3, 0, 4]
    places = {"positive_rank": ROW.positive_rank, "positive_rank_after": ROW.place_of_positive(order)}
    made = {"order": order, "target": 3, "target_rank_after": 3, "completion": completion("why", order, LABELS)}
    return rollout(**{**told, **places, **made, **changes})


NO_RANKING = {"order": None, "failure": "junk", "target_rank_after": None, "positive_rank_after": None}


def test_the_store_keeps_what_was_not_seen_and_the_places_of_the_best_positive(tmp_path):
    write_rollouts(tmp_path, graded_rollout(top_k=2))
    (back,) = read_rollouts(tmp_path).to_pylist()
    assert math.isnan(back["relevance"][1]) and back["relevance"][2:] == [1.0, 2.0, 0.0]
    assert (back["positive_rank"], back["positive_rank_after"], back["top_k"]) == (2, 1, 2)
    assert (back["target_rank"], back["target_rank_after"]) == (4, 3)


def test_metrics_and_viewers_follow_the_best_placed_positive(tmp_path):
    write_rollouts(tmp_path, graded_rollout(), graded_rollout(group=1, **NO_RANKING))
    found = rollout_metrics.overall(read_rollouts(tmp_path))
    assert (found["rank_gain"], found["R@1/before"], found["R@1/after"]) == (1.0, 0.0, 0.5)
    assert (found["groups/all_best"], found["groups/all_worse"]) == (0.5, 0.5)
    groups = RolloutGroups(tmp_path)
    lines = groups.page(sort="group", descending=False)
    assert [(line["before"], line["after"]) for line in lines] == [(2, 1), (2, None)]
    shown = graded_rollout()
    assert text.outcome(shown).startswith("target 2 -> 1")
    lines = text.outgoing_order(shown, None).plain.splitlines()  # items are numbers: 1 was not seen, 3 has grade 2
    assert lines == [" 1 ? 1 ↑2", " 2 * 2 ↑3", " 3 *2 3 ↑4", " 4 0 ↓1", " 5 4"]
    packed = report_rollouts.sample(groups)
    assert packed["groups"][0][packed["group_fields"].index("relevance")] == [0.0, None, 1.0, 2.0, 0.0]
    json.dumps(packed, allow_nan=False)  # a page cannot read NaN


def test_the_histogram_of_first_ranks_of_long_lists_ends():
    size = 300
    row = RankingRow(1, (9,), tuple(range(size)), tuple(float(place == 299) for place in range(size)))
    columns = reward_columns([PromptedRow(row, "Rank:", [str(place) for place in range(size)], 16)])
    told = {name: values[0] for name, values in columns.items() if name != "prompts"}
    orders = [[*range(first, size), *range(first)] for first in (0, 29, 30, 299)]
    records = [
        rollout(**told | {"order": order, "target": 299, "positive_rank_after": row.place_of_positive(order)})
        for order in orders
    ]
    found = rollout_metrics.overall(to_table(records))
    ranks = [name for name in found if name.startswith("first_from/")]
    assert ranks == [f"first_from/{rank}" for rank in range(1, rollout_metrics.MOST_RANKS + 1)]
    assert sum(found[name] for name in ranks) == 0.5  # ranks 1 and 30, and not 31 and 300
    # the last of 300 stays, rises by the 29 and the 30 that went behind it, and becomes the first
    assert found["rank_gain"] == (0 + 29 + 30 + 299) / 4


def test_replay_keeps_groups_of_graded_rows_by_the_main_reward(tmp_path):
    # every ranking has a positive first, so that rank gains are equal; in group 0 one of the two is better
    for group, orders in enumerate(([[3, 2, 1, 0, 4], [2, 3, 1, 0, 4]], [[2, 3, 1, 0, 4]] * 2)):
        made = [{"order": order, "completion": completion("why", order, LABELS)} for order in orders]
        write_rollouts(tmp_path / "rollouts", *(graded_rollout(group=group, **one) for one in made), rank=group)

    def useful(**keys):
        (tmp_path / "other.yaml").write_text(json.dumps({"rewards": [{"name": "ndcg"}], **keys}))
        found = rescore.rescore(tmp_path, rescore.read_scoring(tmp_path / "other.yaml", tmp_path))
        return found.sort_values("group")["new/useful"].tolist()

    assert useful() == [True, True, False, False]
    assert useful(outcome="rank_gain") == [False] * 4


def test_older_stores_have_the_target_for_positive_and_all_candidates_named():
    old = open_rollouts(OLD)
    assert not {"top_k", "positive_rank", "positive_rank_after"} & set(old.absent)
    for row in old.records("SELECT * FROM rollouts"):
        places = row["positive_rank"], row["positive_rank_after"]
        assert (*places, row["top_k"]) == (row["target_rank"], row["target_rank_after"], 0)
