"""The traces stage without vLLM: what it cites is true, what it keeps is right, what it drops is counted."""

import contextlib
import json
import math
import re
import threading
import time
from http.server import ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from json_server import JsonHandler
from toy_run import NUM_CANDIDATES, NUM_ITEMS, finish, write_candidates, write_items, write_semantic_ids

from rerank import grading, prompts, traces
from rerank.baselines import FEATURES
from rerank.catalogue import Catalogue
from rerank.launch.shards import Shard
from rerank.prompts import FACTS, PromptSettings
from rerank.rows import Prompter, RankingRow, read_rows
from rerank.rows.stored import HitLists
from rerank.traces import attempts, evidence, teachers

GENRES = ["Drama", "Comedy, Drama", "Sci-Fi", "", "Crime, Drama", "War"]
EDGES = {name: [0.5 + step for step in range(9)] for name in FEATURES}  # bucket = value rounded, at most 9
SHORT = {"task": "short", "evidence": "codes", "item_fields": ["semantic_id"]}
ID = r"<s_a_\d+><s_b_\d+>"


def toy_rows(seed, num_rows, first_user=1):
    """Rows of users with three rows each, and one whose list holds no relevant item.

    The relevant candidate tends to follow the last item more often.
    """
    rng = np.random.default_rng(seed)
    made = []
    for number in range(num_rows):
        items = rng.permutation(NUM_ITEMS).tolist()
        features = rng.integers(0, 10, (NUM_CANDIDATES, len(FEATURES))).astype(float)
        place = int(rng.integers(NUM_CANDIDATES))
        features[place, FEATURES.index("direct_last")] += 4
        row = {"row_id": 100 * first_user + number, "user": first_user + number // 3, "features": features.tolist()}
        row |= {"history": items[NUM_CANDIDATES : NUM_CANDIDATES + 5], "candidates": items[:NUM_CANDIDATES]}
        made.append({**row, "relevance": np.eye(NUM_CANDIDATES)[place].tolist(), "hit": True})
    return [*made, {**made[0], "row_id": 9999, "relevance": [0.0] * NUM_CANDIDATES, "hit": False}]


@pytest.fixture
def run_path(tmp_path):
    """A run whose first four stages are done, with 30 hit training rows of 10 users."""
    write_items(tmp_path / "data", title=[f"Film {item}" for item in range(NUM_ITEMS)], category=GENRES * 2)
    write_semantic_ids(tmp_path / "semantic_ids")
    write_candidates(tmp_path / "candidates", EDGES, train=toy_rows(0, 30), valid=toy_rows(1, 12, first_user=50))
    for stage in ("data", "semantic_ids", "candidates"):
        finish(tmp_path / stage)
    return tmp_path


def ranking_rows(seed, num_rows, **changes):
    return [RankingRow.of({**row, **changes}) for row in toy_rows(seed, num_rows)[:-1]]


@pytest.fixture
def prompter(run_path):
    """From prompt settings to a `Prompter` of the run."""
    return lambda **settings: Prompter.of_run(run_path, settings=PromptSettings(**settings))


def checked(run_path, settings, **options):
    """The stage's options and prompt settings, which have passed its check."""
    args = traces.TracesArguments(run_dir=str(run_path), **{"teacher": "evidence", **options})
    prompt_settings = PromptSettings(**settings)
    traces.check(args, prompt_settings)
    return args, prompt_settings


def run_stage(run_path, settings, out="out", **options):
    out_dir = run_path / out
    out_dir.mkdir(exist_ok=True)
    return traces.main(*checked(run_path, settings, **options), out_dir), out_dir


def read(path):
    return pq.read_table(path).to_pylist()


# ---- the teacher `evidence`


@pytest.mark.parametrize("ranking", ["semantic_id", "number"])
def test_a_short_trace_grades_every_candidate_and_cites_true_facts_of_the_best(prompter, ranking):
    words = {FACTS[name][0]: FEATURES.index(name) for name in FACTS}
    asked, rng, cited = prompter(**SHORT, ranking=ranking), np.random.default_rng(3), []
    known = {*grading.trace_words(), *(f"{word}:{bucket}" for word in words for bucket in range(10))}
    for row in ranking_rows(5, 40):
        labels = asked.labels(row)
        grades = rng.integers(0, len(grading.GRADES), NUM_CANDIDATES)
        trace = grading.word_short(labels, grades, asked.facts(row))
        graded, best, codes = re.fullmatch(r"(.*) best ?(\S+?) (\w+:\d \w+:\d)", trace).groups()
        found = re.findall(rf"({ID}| \d+) (\w+)", graded)
        assert "".join(" ".join(pair) for pair in found) == graded
        assert [label.strip() for label, _ in found] == labels
        assert [grading.GRADES.index(word) for _, word in found] == grades.tolist()
        place = labels.index(best)
        assert grades[place] == max(grades) and max(grades[:place], default=-1) < max(grades)
        for word, digit in (code.split(":") for code in codes.split()):  # nine edges at 0.5, 1.5 .. 8.5
            assert int(digit) == min(round(row.features[place][words[word]]), 9)
        assert set(re.sub(ID, " ", trace).split()) <= known
        cited.append(codes)
    assert len(set(cited)) > 30


@pytest.mark.parametrize("level", ["words", "codes"])
def test_every_fact_of_a_full_trace_stands_on_its_line_of_the_prompt(prompter, level):
    asked = prompter(evidence=level, max_history=3)
    for row in ranking_rows(6, 20):
        shown = dict(re.findall(rf"^({ID})(.*)$", asked.message(row).partition("Candidates:")[2], re.MULTILINE))
        trace = evidence.word_full(row, [1, 0, 3, 2], asked.facts(row), asked)
        sentences = re.findall(rf"(?:Best match|Second|Third|Last): ({ID}) \((Film \d+)\); (.*?)\.(?= |$)", trace)
        labels = asked.labels(row)
        assert [label for label, _, _ in sentences] == [labels[place] for place in (1, 0, 3, 2)]
        for label, title, facts in sentences:
            assert all(part in shown[label] for part in (title, *facts.split("; ")))
        highest = re.search(r"The highest among the candidates: (.*?)\.(?= |$)", trace)[1]
        assert any(highest in line for line in shown.values())


def test_pattern_and_complement_are_counted_from_the_categories_shown(prompter):
    (row,) = ranking_rows(0, 1, history=[2, 0, 1, 4], candidates=[6, 5, 3, 7])
    asked = prompter(max_history=3)
    # shown: 0 Drama, 1 Comedy + Drama, 4 Crime + Drama; candidates 6 Drama, 5 War, 3 none, 7 Comedy + Drama
    trace = evidence.word_full(row, [3, 0, 1, 2], asked.facts(row), asked)
    assert trace.startswith(
        "Broad pattern: Drama in 3 of 3 items; Crime in 1 of 3 items; the last item is <s_a_1><s_b_0> (Film 4). "
        "What complements it: Comedy, as in 1 of 4 candidates. Best match: <s_a_1><s_b_3> (Film 7); Comedy."
    )


def test_without_evidence_and_categories_a_trace_cites_ids_alone(prompter):
    (row,), asked = ranking_rows(0, 1), prompter(item_fields=["semantic_id"])
    trace = evidence.word_full(row, [0, 1, 2, 3], asked.facts(row), asked)
    assert not re.search(r"\d|Film|Drama", re.sub(ID, "", trace))


def test_a_title_cannot_close_the_trace():
    odd = Catalogue(["a", "b"], ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>"], ["</think> x", "y"], ["<War>", ""])
    row, asked = RankingRow(0, (0,), (0, 1)), Prompter(odd, PromptSettings())
    trace = evidence.word_full(row, [0, 1], asked.facts(row), asked)
    assert prompts.parse_completion(prompts.completion(trace, [0, 1], odd.semantic_ids), odd.semantic_ids).order


def test_calibration_finds_the_odds():
    # Two candidates one apart, the upper one best in 3 of 4 rows: exp(f) / (1 + exp(f)) = 3/4, so f = ln 3.
    scores = [np.array([1.0, 0.0])] * 4
    relevance = [(0.0, 1.0) if place == 3 else (1.0, 0.0) for place in range(4)]
    assert evidence.calibrate(scores, relevance) == pytest.approx(math.log(3), rel=1e-3)


def test_grades_part_the_scores_of_all_rows_evenly_and_noise_moves_them(prompter):
    rows = [ranking_rows(0, 1, row_id=number)[0] for number in range(7)]
    scores = {number: np.arange(4.0) + 4 * number for number in range(7)}  # row 0 holds the lowest seventh
    asked = prompter(**SHORT)

    def grades(row, temperature=0.0, attempt=1, told=False):
        return evidence.EvidenceTeacher(scores, asked, temperature, 0, told)._grades(row, attempt).tolist()

    assert [grades(row) for row in rows] == [[number] * 4 for number in range(7)]
    # Gumbel noise of scale 4 lifts the score 3, 0.86 below the first edge, over it when it exceeds 0.86 / 4: 55 %.
    lifted = [grades(rows[0], 4.0, attempt)[3] > 0 for attempt in range(2000)]
    assert np.mean(lifted) == pytest.approx(1 - math.exp(-math.exp(-0.857 / 4)), abs=0.04)
    assert grades(rows[0], 4.0, attempt=3) == grades(rows[0], 4.0, attempt=3)
    assert [grade == 6 for grade in grades(rows[6], told=True)] == [value > 0 for value in rows[6].relevance]


def test_grades_that_grow_rarer_tell_the_best_apart(prompter):
    row = RankingRow(0, (), tuple(range(10)), (1.0, *[0.0] * 9))
    scores = {0: np.arange(10.0), 1: np.arange(10.0, 127)}  # of 127 the grades hold 64, 32, 16, 8, 4, 2 and 1
    teacher = evidence.EvidenceTeacher(scores, prompter(**SHORT), 0.0, 0, False, grade_ratio=0.5)
    teacher.scores = {0: np.array([0, 63, 64, 95, 96, 112, 120, 124, 125, 126.0])}
    assert teacher._grades(row, 1).tolist() == [0, 0, 1, 1, 2, 3, 4, 5, 5, 6]


def test_out_of_fold_scores_of_the_stage_beat_chance(run_path):
    train = read_rows(run_path / "candidates/train.parquet", needs_features=True)
    scores = evidence.fit_scores(HitLists.read(run_path / "candidates/train.parquet"), FEATURES, seed=0)
    hits = [np.argmax(scores[row.row_id]) == row.target for row in train]
    assert np.mean(hits) > 1 / NUM_CANDIDATES


def test_trees_of_shown_facts_know_nothing_else(run_path, prompter):
    shown, lists = ["direct_last", "popularity"], HitLists.read(run_path / "candidates/train.parquet")
    told, others = prompter(**(SHORT | {"evidence_names": shown})), np.isin(FEATURES, shown, invert=True)
    features = [np.array(of_row) for of_row in lists.features]
    changed = [np.where(others, -of_row, of_row) + 0.2 for of_row in features]  # .2 changes no bucket
    scores, again = (
        evidence.fit_scores(HitLists(lists.row_ids, lists.users, lists.relevance, values), FEATURES, 0, told)
        for values in (features, changed)
    )
    assert all(np.array_equal(scores[row_id], again[row_id]) for row_id in lists.row_ids)
    assert len(np.unique(np.concatenate(list(scores.values())))) > 2


def test_the_worth_of_scores_and_of_their_grades_is_that_of_the_orders_they_imply(run_path):
    metrics, out = run_stage(run_path, SHORT, max_attempts=2)
    rows = [row for row in read_rows(run_path / "candidates/train.parquet", needs_features=True) if row.is_hit]
    scores = {one["row_id"]: one["scores"] for one in pq.read_table(out / "scores.parquet").to_pylist()}
    every = sorted(value for of_row in scores.values() for value in of_row)
    edges = [np.quantile(every, part / 7) for part in range(1, 7)]
    gains = {"shown": [], "scores": [], "grades": []}
    for row in rows:
        of_row = scores[row.row_id]
        grades = [sum(edge < value for edge in edges) for value in of_row]
        for name, values in (("shown", [0] * len(of_row)), ("scores", of_row), ("grades", grades)):
            order = sorted(range(len(of_row)), key=lambda place: -values[place])  # noqa: B023
            gains[name].append(1 / math.log2(order.index(row.target) + 2) if order.index(row.target) < 10 else 0)
    assert metrics["teacher_ndcg"] == {name: pytest.approx(np.mean(of)) for name, of in gains.items()}
    assert len({round(value, 6) for value in metrics["teacher_ndcg"].values()}) == 3


def test_shown_facts_need_the_evidence_teacher_and_facts(run_path):
    for settings, options in (
        (SHORT | {"evidence": "none"}, {}),
        (SHORT, {"teacher": "openai", "teacher_model": "m"}),
    ):
        with pytest.raises(ValueError, match="shown_facts is true but teacher is (evidence|openai) and evidence"):
            checked(run_path, settings, shown_facts=True, **options)


# ---- judging and reporting

LABELS = A, B, C = ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>", "<s_a_0><s_b_2>"]


def judge(text, *relevance):
    row = RankingRow(1, (), (0, 1, 2), relevance=relevance, user=2)
    return attempts.judge(row, LABELS, 1, attempts.Draft(text, truncated=True))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"<think>why</think>{B}{A}{C}", "accepted"),
        (f"<think>why</think>{C}{B}{A}", "target_not_first"),  # relevant, not the most
        (f"<think> </think>{B}{A}{C}", "empty_trace"),
        (f"<think>why</think>{B}", "too_few"),
        ("<think>why", "no_trace_end"),
        (f"<think>why</think>{B} then {A}{C}", "junk"),
    ],
)
def test_a_draft_is_accepted_only_with_a_trace_and_a_valid_ranking_led_by_the_most_relevant(text, reason):
    line = judge(text, 0.0, 2.0, 1.0)
    assert (line["reason"], line["accepted"], line["target_rank_in"]) == (reason, reason == "accepted", 2)
    assert line["truncated"] and line["completion"] == text
    assert (line["failure"] is None) == (line["order"] is not None)


@pytest.mark.parametrize("ranking", [A + B + C, C + A + B])
def test_of_two_equally_relevant_items_either_may_come_first(ranking):
    assert judge(f"<think>why</think>{ranking}", 1.0, 0.0, 1.0)["accepted"]


@pytest.mark.parametrize(
    ("label", "trace", "gives_away"),
    [
        (B, f"{B} is the correct answer", True),
        (B, "the ground-truth item follows", True),
        (B, "Matches the target well", True),
        (B, "we were told so", True),
        (B, f"since it is given that {B} came next", True),
        (B, f"{B}, which was provided, fits", True),
        (B, f"{B} fits best: next:9", False),
        (B, f"given the dramas before it, something light and short and new such as {B}", False),
        (B, "the user took three dramas", False),
        (B, "", False),
        ("1", "told that it is 1.", True),
        ("1", "told that it is 11.", False),
    ],
)
def test_giving_the_answer_away(label, trace, gives_away):
    assert attempts.gives_answer_away(trace, label) is gives_away


def test_yield_by_rank_by_hand():
    lines = [  # row_id, attempt, first-stage rank of the target, reason, trace
        (1, 1, 1, "accepted", "a"),
        (2, 1, 1, "junk", "b"),
        (2, 2, 1, "accepted", "a"),
        (3, 1, 4, "target_not_first", "c"),
        (3, 2, 4, "target_not_first", "d"),
        (4, 1, 4, "accepted", "told"),
    ]
    names = ("row_id", "attempt", "target_rank_in", "reason", "trace")
    table = [dict(zip(names, line, strict=True)) for line in lines]
    for line in table:
        line |= {"accepted": line["reason"] == "accepted", "gives_answer_away": line["trace"] == "told"}
    found = attempts.summarize(pa.Table.from_pylist([{**line, "truncated": False} for line in table], attempts.SCHEMA))
    assert (found["rows"], found["accepted"], found["yield"], found["mean_attempts"]) == (4, 3, 3 / 4, 6 / 4)
    assert found["yield_by_first_stage_rank"] == {
        "1": {"rows": 2, "accepted": 2, "yield": 1.0},
        "4": {"rows": 2, "accepted": 1, "yield": 0.5},
    }
    assert found["reasons"] == {"accepted": 3, "target_not_first": 2, "junk": 1}
    assert found["distinct_trace_share"] == pytest.approx(2 / 3)  # a, a, told
    assert found["gives_answer_away_share"] == pytest.approx(1 / 3)


# ---- the stage


def test_the_stage_keeps_the_first_accepted_draft_of_each_row(run_path):
    metrics, out_dir = run_stage(run_path, SHORT, rows_for_sft=0.6, batch_size=7, max_attempts=6)
    table, accepted, used_for = (read(out_dir / f"{name}.parquet") for name in ("attempts", "accepted", "row_split"))
    hits = {row["row_id"]: row for row in toy_rows(0, 30)[:-1]}
    assert sorted(line["row_id"] for line in used_for) == sorted(hits)
    assert len({(hits[line["row_id"]]["user"], line["used_for"]) for line in used_for}) == 10  # whole users
    sft_rows = {line["row_id"] for line in used_for if line["used_for"] == "sft"}
    assert {line["row_id"] for line in table} == sft_rows
    for row_id in sft_rows:
        lines = [line for line in table if line["row_id"] == row_id]
        assert [line["attempt"] for line in lines] == list(range(1, len(lines) + 1))
        assert not any(line["accepted"] for line in lines[:-1])
        assert lines[-1]["accepted"] or len(lines) == 6
        for line in lines:
            assert line["accepted"] == (hits[row_id]["relevance"][line["order"][0]] == 1.0)
    kept = [(line["row_id"], line["trace"], line["order"]) for line in table if line["accepted"]]
    assert [tuple(line.values()) for line in accepted] == kept
    assert 0 < metrics["accepted"] == len(kept) and metrics["teacher_is_language_model"] is False
    assert metrics["attempts"] == len(table) and metrics["distinct_trace_share"] > 0.9
    assert PromptSettings.load(out_dir) == PromptSettings(**SHORT)
    files = {path.name for path in out_dir.iterdir()}
    assert files == {"accepted.parquet", "attempts.parquet", "prompt.json", "row_split.parquet", "scores.parquet"}
    scores = dict(zip(*pq.read_table(out_dir / "scores.parquet").to_pydict().values(), strict=True))
    assert {row_id: len(of_row) for row_id, of_row in scores.items()} == {
        row_id: len(row["candidates"]) for row_id, row in hits.items()
    }
    assert np.std(np.concatenate(list(scores.values()))) > 0


def test_users_for_sft_are_drawn_until_their_rows_reach_the_share():
    users = [row // 3 for row in range(30)]
    chosen = traces.is_for_sft(users, 0.5, seed=0)
    assert chosen.sum() == 15  # ten users of three rows: five of them
    assert (chosen.reshape(10, 3) == chosen[::3, None]).all()  # whole users
    assert traces.is_for_sft(users, 1.0, seed=0).all()
    assert traces.is_for_sft(users, 0.01, seed=0).sum() == 3
    assert (traces.is_for_sft(users, 0.5, seed=1) != chosen).any()


def test_max_rows_limits_the_rows_that_are_written_for(run_path):
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        metrics, out_dir = run_stage(run_path, SHORT, f"out{number}", max_rows=5, seed=seed)
        assert (metrics["rows"], metrics["sft_rows"]) == (5, 30)
        chosen.append({line["row_id"] for line in read(out_dir / "attempts.parquet")})
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_stopped_stage_continues_without_repeating_a_draw(run_path, monkeypatch):
    options = {"batch_size": 4, "max_attempts": 3}
    whole, whole_dir = run_stage(run_path, SHORT, "whole", **options)
    draft, calls = evidence.EvidenceTeacher._draft, []

    def stop_at_30(self, row, attempt):
        calls.append((row.row_id, attempt))
        if len(calls) == 30:
            raise RuntimeError("killed")
        return draft(self, row, attempt)

    monkeypatch.setattr(evidence.EvidenceTeacher, "_draft", stop_at_30)
    with pytest.raises(RuntimeError, match="killed"):
        run_stage(run_path, SHORT, "stopped", **options)
    stored = attempts.AttemptStore(run_path / "stopped").read()
    assert len(stored) == 28  # seven whole batches of four
    resumed, resumed_dir = run_stage(run_path, SHORT, "stopped", **options)
    before = set(zip(stored["row_id"].to_pylist(), stored["attempt"].to_pylist(), strict=True))
    assert before.isdisjoint(calls[30:]) and len(calls[30:]) == whole["attempts"] - 28
    monkeypatch.setattr(traces, "fit_scores", None)  # with nothing left to draw, no teacher is opened
    assert run_stage(run_path, SHORT, "stopped", **options)[0] == resumed == whole
    for name in ("attempts", "accepted", "row_split"):
        assert read(resumed_dir / f"{name}.parquet") == read(whole_dir / f"{name}.parquet")


def test_shards_of_evidence_give_its_traces_and_scores(run_path):
    whole, whole_dir = run_stage(run_path, SHORT, "whole", max_attempts=3)
    given = checked(run_path, SHORT, max_attempts=3)
    for shard in (Shard(1, 2), Shard(2, 2)):
        folder = run_path / shard.name("traces")
        folder.mkdir()
        traces.make_shard(*given, shard, folder)
        finish(folder)
    merged, merged_dir = run_stage(run_path, SHORT, "merged", max_attempts=3)
    assert merged == whole
    for path in whole_dir.glob("*.parquet"):
        assert pq.read_table(path) == pq.read_table(merged_dir / path.name)


def test_targeted_evidence_accepts_every_row_in_one_draw_and_gives_nothing_away(run_path):
    metrics, _ = run_stage(run_path, {"evidence": "words"}, strategy="targeted")
    assert (metrics["yield"], metrics["mean_attempts"], metrics["gives_answer_away_share"]) == (1.0, 1.0, 0.0)


# ---- teachers that are language models


def test_a_teacher_reads_the_full_task_what_codes_mean_and_what_it_is_told(prompter):
    (row,) = ranking_rows(0, 1, relevance=[0.0, 0.0, 1.0, 0.0])
    asked = prompter(**SHORT, knowledge_priming=True)
    hidden, told = (teachers.PromptWriter(asked, told)(row) for told in (False, True))
    assert "You are an expert" in hidden and "shampoo" in hidden
    assert "next (chosen next by N others after the last item)" in hidden
    label = asked.labels(row)[2]
    assert told.startswith(hidden) and f"The item taken next is {label}." in told.removeprefix(hidden)


class Server(JsonHandler):
    """A chat completions server that ranks in the order shown, but puts first what it is told."""

    requests: list[dict] = []
    busy = 0  # requests that are refused before one is answered
    open, most_open = 0, 0
    lock = threading.Lock()

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": "toy", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self):
        with Server.lock:
            Server.open += 1
            Server.most_open = max(Server.open, Server.most_open)
        time.sleep(0.005)
        self.complete(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        with Server.lock:  # before the connection closes, for which the client waits
            Server.open -= 1

    def complete(self, body):
        if Server.busy > 0:
            Server.busy -= 1
            return self.answer(503, {"error": {"message": "busy"}})
        Server.requests.append({**body, "key": self.headers["Authorization"]})
        if body.get("max_completion_tokens") == 1:
            return self.answer(400, {"error": {"message": "too long"}})
        message, reason = self.write(body["messages"][0]["content"])
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", **message}}
        self.answer(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "toy", "choices": [choice]})

    @staticmethod
    def write(prompt):
        """The message, and why it ends."""
        ids = re.findall(rf"^{ID}", prompt.partition("Candidates:")[2], re.MULTILINE)
        trace, ranking = f"First {ids[0]}", "".join(ids)
        if told := re.search(rf"taken next is ({ID})", prompt):
            trace = "It is the correct answer." if told[1] == ids[0] else "It follows the history."
            ranking = told[1] + ranking.replace(told[1], "")
        elif "<s_a_0><s_b_0>" in ids[:2]:
            return {"content": f"<think>Too long a {ids[0]}"}, "length"
        elif "<s_a_2>" in ids[-1]:  # a server that parts reasoning from the answer
            return {"content": ranking, "reasoning_content": trace}, "stop"
        return {"content": f"<think>{trace}</think>{ranking}"}, "stop"


@pytest.fixture
def served(monkeypatch):
    """Options that name a teacher which is served."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Server.requests, Server.busy, Server.most_open = [], 0, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield {"teacher": "openai", "teacher_model": "toy", "base_url": url}
    server.shutdown()
    server.server_close()


def test_the_openai_teacher_keeps_some_refuses_some_and_says_why(run_path, served):
    Server.busy = 1  # the first request is tried again
    options = {"max_attempts": 2, "max_completion_tokens": 50, "temperature": 0.7}
    metrics, out_dir = run_stage(run_path, {}, **served, **options)
    table = read(out_dir / "attempts.parquet")
    cut = [line for line in table if line["failure"] == "no_trace_end"]
    assert cut and all(line["truncated"] and line["order"] is None for line in cut)
    parted = [line for line in table if line["completion"].startswith("<think>First")]
    assert parted and all(line["order"] == [0, 1, 2, 3] for line in parted)
    # The canned ranking is the first-stage order, so that only targets of rank 1 can be accepted.
    assert {line["target_rank_in"] for line in table if line["accepted"]} == {1}
    assert set(metrics["reasons"]) == {"accepted", "target_not_first", "no_trace_end"}
    assert metrics["teacher_is_language_model"] is True
    assert len(Server.requests) == metrics["attempts"] == len(table)
    assert len({request["seed"] for request in Server.requests}) == len(table)
    sent = {"model": "toy", "temperature": 0.7, "max_completion_tokens": 50, "key": "Bearer none"}
    assert all(sent.items() <= request.items() for request in Server.requests)


@pytest.mark.parametrize("most", [1, 3])
def test_the_openai_teacher_sends_max_concurrency_requests_at_a_time(run_path, served, most):
    run_stage(run_path, {}, max_attempts=1, max_concurrency=most, **served)
    assert Server.most_open == most


@pytest.mark.parametrize("max_retries", [0, 1])
def test_a_failed_request_is_sent_again_max_retries_times(run_path, served, max_retries):
    from openai import InternalServerError

    Server.busy = 1
    options = {"strategy": "targeted", "max_rows": 2, "max_concurrency": 1, "max_retries": max_retries}
    with contextlib.nullcontext() if max_retries else pytest.raises(InternalServerError, match="busy"):
        run_stage(run_path, {}, **options, **served)
    assert len(Server.requests) == 1 + max_retries  # of two rows, what the server did not refuse


def test_the_share_of_targeted_traces_that_give_the_answer_away(run_path, served):
    metrics, _ = run_stage(run_path, {}, strategy="targeted", **served)
    # The canned teacher blurts it out where the target heads the list.
    first = sum(row["relevance"][0] == 1.0 for row in toy_rows(0, 30))
    assert metrics["yield"] == metrics["mean_attempts"] == 1.0
    assert metrics["gives_answer_away_share"] == pytest.approx(first / 30)


def test_the_offline_teacher_is_spread_over_gpus(monkeypatch):
    monkeypatch.setattr(teachers, "find_model", str)
    monkeypatch.setattr(teachers, "load_tokenizer", str)
    monkeypatch.setattr("rerank.models.engine.open_engine", lambda *args, **options: options)
    options = {"teacher": "vllm", "teacher_model": "a/b", "tensor_parallel_size": 4}
    teacher = teachers.VllmTeacher(traces.TracesArguments(run_dir="-", **options), None)
    assert teacher.engine == {"tensor_parallel_size": 4}


def test_a_refused_prompt_is_named(run_path, served):
    with pytest.raises(ValueError, match=r"refuses the prompt of row_id \d+: .*too long.*lower max_history"):
        run_stage(run_path, {}, max_completion_tokens=1, **served)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "oracle"}, "teacher is 'oracle' but must be one of vllm, openai, evidence"),
        ({"strategy": "hope"}, "strategy is 'hope' but must be one of rejection, targeted"),
        ({"max_attempts": 0}, "max_attempts is 0 but must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0 but must be at least 0"),
        ({"temperature": 0.0}, "temperature is 0, so that all 8 draws of a row are the same"),
        ({"rows_for_sft": 1.5}, "rows_for_sft is 1.5 but must be above 0 and at most 1"),
        ({"teacher": "vllm"}, "teacher_model is missing but teacher is vllm"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        traces.TracesArguments(run_dir="runs/x", **{"teacher": "evidence", **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teacher": "vllm", "teacher_model": "./nowhere"}, FileNotFoundError, r"\./nowhere is not there; give a"),
        (
            {"base_url": "http://127.0.0.1:9/v1"},
            ValueError,
            "9/v1 cannot be reached; start its server, such as `vllm",
        ),
        ({"teacher_model": "other"}, ValueError, "teacher_model other is not served at .*; it serves toy"),
    ],
)
def test_a_teacher_that_is_not_there_is_refused(run_path, served, options, error, message):
    with pytest.raises(error, match=message):
        checked(run_path, {}, **{**served, **options})


def test_candidates_without_features_are_refused_where_evidence_needs_them(run_path):
    language_model = {"teacher": "vllm", "teacher_model": "a/b"}
    rows = toy_rows(0, 30)
    write_candidates(run_path / "candidates", train=[*rows[:2], {**rows[2], "features": None}])
    with pytest.raises(ValueError, match="train.parquet: row_id 102 has no features"):
        checked(run_path, {})
    pq.write_table(pa.Table.from_pylist(rows).drop_columns("features"), run_path / "candidates/train.parquet")
    with pytest.raises(ValueError, match="train.parquet has no column features"):
        checked(run_path, {"evidence": "codes"}, **language_model)
    checked(run_path, {}, **language_model)


def test_a_fact_that_the_candidates_lack_is_refused(run_path):
    stored = {"names": ["lift"], "edges": {"lift": EDGES["lift"]}}
    (run_path / "candidates/features.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="evidence_names holds 'direct_last' but .*features.json has lift; run the"):
        checked(run_path, {"evidence": "codes"})


def test_training_rows_of_two_users_cannot_be_scored_out_of_fold(run_path):
    write_candidates(run_path / "candidates", train=toy_rows(0, 6))
    with pytest.raises(
        ValueError, match="the 6 training rows are of 2 of the 3 users at least that scores out of fold"
    ):
        run_stage(run_path, SHORT)


def test_a_teacher_that_never_ranks_the_target_first_is_refused(run_path, served):
    last = [{**row, "relevance": [0.0, 0.0, 0.0, 1.0]} for row in toy_rows(0, 6)[:-1]]
    write_candidates(run_path / "candidates", train=last)
    with pytest.raises(ValueError, match=r"none of 6 attempts on 6 rows was accepted \(.*target_not_first"):
        run_stage(run_path, {}, max_attempts=1, **served)


def make_graded(run_path):
    """Give every row further grades: 2 for a second candidate, and one that was not seen; returns them by row_id."""
    path = run_path / "candidates/train.parquet"
    table = read(path)
    for line in table:
        places = np.random.default_rng(line["row_id"]).permutation(NUM_CANDIDATES)
        line["relevance"][places[0]], line["relevance"][places[1]] = 2.0, None
    pq.write_table(pa.Table.from_pylist(table), path)
    return {line["row_id"]: line["relevance"] for line in table}


@pytest.mark.parametrize("accept", ["first", "ndcg"])
@pytest.mark.parametrize("top_k", [0, 2])
def test_the_stage_accepts_rankings_of_graded_rows_by_option(run_path, accept, top_k):
    grades = make_graded(run_path)
    _, out_dir = run_stage(run_path, {**SHORT, "top_k": top_k}, accept=accept, max_attempts=3)

    def dcg(order, row_id):
        seen = [grades[row_id][place] for place in order if grades[row_id][place] is not None]
        return sum((2**grade - 1) / math.log2(rank + 1) for rank, grade in enumerate(seen, start=1))

    lines = read(out_dir / "attempts.parquet")
    for line in lines:
        row_id, order = line["row_id"], line["order"]
        assert line["completion"].partition("</think>")[2].count("<s_a_") == (top_k or NUM_CANDIDATES)
        assert sorted(order) == list(range(NUM_CANDIDATES)) and (not top_k or order[2:] == sorted(order[2:]))
        best = max(grade for grade in grades[row_id] if grade is not None)
        first = next(grade for grade in (grades[row_id][place] for place in order) if grade is not None)
        shown = dcg(range(NUM_CANDIDATES), row_id)
        ideal = dcg(sorted(order, key=lambda place: -(grades[row_id][place] or 0)), row_id)
        is_better = dcg(order, row_id) > shown + 1e-9 or dcg(order, row_id) == pytest.approx(ideal)
        assert line["accepted"] == (first == best if accept == "first" else is_better)
    assert 0 < sum(line["accepted"] for line in lines) < len(lines)


def test_a_top_k_above_every_list_is_refused_before_the_stage(run_path):
    with pytest.raises(ValueError, match="top_k is 9 but the longest list of .*train.parquet has 4 candidates; lower"):
        checked(run_path, {**SHORT, "top_k": 9})


def test_an_answer_without_the_opening_tag_is_a_trace_up_to_the_closing_one(run_path, served, monkeypatch):
    def write(prompt):
        message, reason = Server.written(prompt)
        return {**message, "content": message["content"].removeprefix("<think>")}, reason

    monkeypatch.setattr(Server, "written", Server.write, raising=False)
    monkeypatch.setattr(Server, "write", staticmethod(write))
    metrics, _ = run_stage(run_path, {}, **served)
    assert metrics["accepted"] > 0 and "junk" not in metrics["reasons"]


def test_a_teacher_whose_first_batch_is_all_junk_is_stopped_with_the_reason(run_path, served, monkeypatch):
    monkeypatch.setattr(Server, "write", staticmethod(lambda prompt: ({"content": "I cannot rank these."}, "stop")))
    with pytest.raises(
        ValueError, match=r"^none of the first \d+ answers is a ranking \(no_trace_end \d+\), such as "
    ):
        run_stage(run_path, {}, **served)
    assert len(Server.requests) < 100


def test_a_gateway_that_refuses_a_key_is_named_and_can_do_without_it(run_path, served, monkeypatch):
    complete = Server.complete

    def refuse(self, body):
        if "seed" in body:
            return self.answer(400, {"error": {"message": "Unrecognized request argument supplied: seed"}})
        return complete(self, body)

    monkeypatch.setattr(Server, "complete", refuse)
    with pytest.raises(ValueError, match=r"supplied: seed; set leave_out: \[seed\]$"):
        run_stage(run_path, {}, **served)
    metrics, _ = run_stage(run_path, {}, **served, leave_out=["seed"])
    assert metrics["accepted"] > 0


def test_a_context_too_short_is_not_taken_for_a_key_that_is_refused(run_path, served, monkeypatch):
    reason = "max_completion_tokens=1024 cannot be greater than max_model_len=512. Please request fewer output tokens."
    monkeypatch.setattr(Server, "complete", lambda self, body: self.answer(400, {"error": {"message": reason}}))
    with pytest.raises(ValueError, match=r"refuses the prompt of row_id \d+: .*; lower max_history or max_completion"):
        run_stage(run_path, {}, **served)


def test_a_limit_left_out_is_sent_by_its_older_name(run_path, served):
    run_stage(run_path, {}, **served, leave_out=["max_completion_tokens"], max_completion_tokens=77)
    assert {body.get("max_tokens") for body in Server.requests} == {77}
    assert not any("max_completion_tokens" in body for body in Server.requests)
