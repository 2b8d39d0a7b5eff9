"""The traces stage without vLLM: what it cites is true, what it keeps is right, what it drops is counted."""

import contextlib
import json
import math
import re
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_run import NUM_CANDIDATES, NUM_ITEMS, finish, write_candidates, write_items, write_semantic_ids

from rerank import grading, prompts, traces
from rerank.baselines import FEATURES
from rerank.catalogue import Catalogue
from rerank.launch import recipe
from rerank.prompts import FACTS, PromptSettings
from rerank.rows import Prompter, RankingRow, read_rows
from rerank.traces import attempts, evidence, split, teachers

GENRES = ["Drama", "Comedy, Drama", "Sci-Fi", "", "Crime, Drama", "War"]
EDGES = {name: [0.5 + step for step in range(9)] for name in FEATURES}  # bucket = value rounded, at most 9
SHORT = {"task": "short", "evidence": "codes", "item_fields": ["semantic_id"]}
ID = r"<s_a_\d+><s_b_\d+>"


def toy_rows(seed: int, num_rows: int, first_user: int) -> list[dict]:
    """Rows of users with three rows each; the relevant candidate tends to follow the last item more often."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(num_rows):
        items = rng.permutation(NUM_ITEMS)
        features = rng.integers(0, 10, (NUM_CANDIDATES, len(FEATURES))).astype(float)
        place = int(rng.integers(NUM_CANDIDATES))
        features[place, FEATURES.index("direct_last")] += 4
        made.append(
            {
                "row_id": 100 * first_user + number,
                "user": first_user + number // 3,
                "history": items[NUM_CANDIDATES : NUM_CANDIDATES + 5].tolist(),
                "candidates": items[:NUM_CANDIDATES].tolist(),
                "relevance": [float(position == place) for position in range(NUM_CANDIDATES)],
                "hit": True,
                "features": features.tolist(),
            }
        )
    return made


def with_a_miss(table_rows: list[dict]) -> list[dict]:
    """The rows and one whose list holds no relevant item."""
    return [*table_rows, {**table_rows[0], "row_id": 9999, "relevance": [0.0] * NUM_CANDIDATES, "hit": False}]


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    """A run whose first four stages are done, with 30 hit training rows of 10 users."""
    write_items(tmp_path / "data", title=[f"Film {item}" for item in range(NUM_ITEMS)], category=GENRES * 2)
    write_semantic_ids(tmp_path / "semantic_ids")
    splits = {"train": with_a_miss(toy_rows(0, 30, 1)), "valid": with_a_miss(toy_rows(1, 12, 50))}
    write_candidates(tmp_path / "candidates", EDGES, **splits)
    for stage in ("data", "semantic_ids", "candidates"):
        finish(tmp_path / stage)
    return tmp_path


def ranking_rows(seed: int, num_rows: int, **changes: object) -> list[RankingRow]:
    return [RankingRow.of({**row, **changes}) for row in toy_rows(seed, num_rows, 1)]


@pytest.fixture
def prompter(run_path: Path):
    """From prompt settings to a `Prompter` of the run."""
    return lambda **settings: Prompter.of_run(run_path, settings=PromptSettings(**settings))


def run_stage(run_path: Path, settings: dict, out: str = "out", **options) -> tuple[dict, Path]:
    out_dir = run_path / out
    out_dir.mkdir(exist_ok=True)
    args = traces.TracesArguments(run_dir=str(run_path), **{"teacher": "evidence", **options})
    prompt_settings = PromptSettings(**settings)
    traces.check(args, prompt_settings)
    return traces.main(args, prompt_settings, out_dir), out_dir


def read(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


# ---- the teacher `evidence`


@pytest.mark.parametrize("ranking", ["semantic_id", "number"])
def test_a_short_trace_grades_every_candidate_and_cites_true_facts_of_the_best(prompter, ranking: str) -> None:
    words = {FACTS[name][0]: FEATURES.index(name) for name in FACTS}
    asked, rng, cited = prompter(**SHORT, ranking=ranking), np.random.default_rng(3), []
    known = {*grading.EVIDENCE_WORDS, *(f"{word}:{bucket}" for word in words for bucket in range(10))}
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


def test_a_ranking_goes_by_grade_and_then_by_the_order_shown() -> None:
    assert grading.by_grade([2, 6, 2, 0, 6]) == [1, 4, 0, 2, 3]


@pytest.mark.parametrize("level", ["words", "codes"])
def test_every_fact_of_a_full_trace_stands_on_its_line_of_the_prompt(prompter, level: str) -> None:
    asked = prompter(evidence=level, max_history=3)
    for row in ranking_rows(6, 20):
        shown = dict(re.findall(rf"^({ID})(.*)$", asked.message(row).partition("Candidates:")[2], re.MULTILINE))
        trace = evidence.word_full(row, [1, 0, 3, 2], asked.facts(row), asked)
        sentences = re.findall(rf"(Best match|Second|Third|Last): ({ID}) \((Film \d+)\); (.*?)\.(?= |$)", trace)
        assert [asked.catalogue.semantic_ids.index(label) for _, label, _, _ in sentences] == [
            row.candidates[place] for place in (1, 0, 3, 2)
        ]
        for _, label, title, listed in sentences:
            assert title in shown[label]
            for fact in listed.split("; "):
                assert fact in shown[label]
        highest = re.search(r"The highest among the candidates: (.*?)\.(?= |$)", trace)[1]
        assert any(highest in line for line in shown.values())


def test_pattern_and_complement_are_counted_from_the_categories_shown(prompter) -> None:
    (row,) = ranking_rows(0, 1, history=[2, 0, 1, 4], candidates=[6, 5, 3, 7])
    asked = prompter(max_history=3)
    # shown: 0 Drama, 1 Comedy + Drama, 4 Crime + Drama; candidates 6 Drama, 5 War, 3 none, 7 Comedy + Drama
    trace = evidence.word_full(row, [3, 0, 1, 2], asked.facts(row), asked)
    assert trace.startswith(
        "Broad pattern: Drama in 3 of 3 items; Crime in 1 of 3 items; the last item is <s_a_1><s_b_0> (Film 4). "
        "What complements it: Comedy, as in 1 of 4 candidates. Best match: <s_a_1><s_b_3> (Film 7); Comedy."
    )


def test_without_evidence_and_categories_a_trace_cites_ids_alone(prompter) -> None:
    (row,), asked = ranking_rows(0, 1), prompter(item_fields=["semantic_id"])
    trace = evidence.word_full(row, [0, 1, 2, 3], asked.facts(row), asked)
    assert set(re.findall(r"\d+", re.sub(ID, "", trace))) == set()
    assert "Film" not in trace and "Drama" not in trace


def test_a_title_cannot_close_the_trace() -> None:
    odd = Catalogue(["a", "b"], ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>"], ["</think> x", "y"], ["<War>", ""])
    row, asked = RankingRow(0, (0,), (0, 1)), Prompter(odd, PromptSettings())
    trace = evidence.word_full(row, [0, 1], asked.facts(row), asked)
    assert prompts.parse_completion(prompts.completion(trace, [0, 1], odd.semantic_ids), odd.semantic_ids).order


def test_calibration_finds_the_odds() -> None:
    # Two candidates one apart, the upper one best in 3 of 4 rows: exp(f) / (1 + exp(f)) = 3/4, so f = ln 3.
    scores = [np.array([1.0, 0.0])] * 4
    assert evidence.calibrate(scores, [0, 0, 0, 1]) == pytest.approx(math.log(3), rel=1e-3)


def test_grades_part_the_scores_of_all_rows_evenly_and_noise_moves_them(prompter) -> None:
    rows = [ranking_rows(0, 1, row_id=number)[0] for number in range(7)]
    scores = {number: np.arange(4.0) + 4 * number for number in range(7)}  # row 0 holds the lowest seventh

    def teacher(temperature: float, told: bool = False) -> evidence.EvidenceTeacher:
        return evidence.EvidenceTeacher(scores, prompter(**SHORT), temperature, 0, told)

    grades = [teacher(0.0)._grades(row, 1).tolist() for row in rows]
    assert grades == [[number] * 4 for number in range(7)]
    # Gumbel noise of scale 4 lifts the score 3, 0.86 below the first edge, over it when it exceeds 0.86 / 4: 55 %.
    noisy = teacher(4.0)
    lifted = [noisy._grades(rows[0], attempt)[3] > 0 for attempt in range(2000)]
    assert np.mean(lifted) == pytest.approx(1 - math.exp(-math.exp(-0.857 / 4)), abs=0.04)
    assert noisy._grades(rows[0], 3).tolist() == teacher(4.0)._grades(rows[0], 3).tolist()
    told = teacher(0.0, told=True)._grades(rows[6], 1)
    assert [grade == 6 for grade in told] == [value > 0 for value in rows[6].relevance]


def test_out_of_fold_scores_of_the_stage_beat_chance(run_path: Path) -> None:
    train = read_rows(run_path / "candidates/train.parquet", needs_features=True)
    scores = evidence.fit_scores(train, run_path / "candidates/valid.parquet", seed=0)
    hits = [np.argmax(scores[row.row_id]) == row.target for row in train]
    assert np.mean(hits) > 1 / NUM_CANDIDATES


# ---- judging and reporting

LABELS = ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>", "<s_a_0><s_b_2>"]
ROW = RankingRow(1, (), (0, 1, 2), relevance=(0.0, 2.0, 1.0), user=2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"<think>why</think>{LABELS[1]}{LABELS[0]}{LABELS[2]}", "accepted"),
        (f"<think>why</think>{LABELS[2]}{LABELS[1]}{LABELS[0]}", "target_not_first"),  # relevant, not the most
        (f"<think> </think>{LABELS[1]}{LABELS[0]}{LABELS[2]}", "empty_trace"),
        (f"<think>why</think>{LABELS[1]}", "too_few"),
        ("<think>why", "no_trace_end"),
        (f"<think>why</think>{LABELS[1]} then {LABELS[0]}{LABELS[2]}", "junk"),
    ],
)
def test_a_draft_is_accepted_only_with_a_trace_and_a_valid_ranking_led_by_the_most_relevant(
    text: str, reason: str
) -> None:
    line = attempts.judge(ROW, LABELS, 1, attempts.Draft(text, truncated=True))
    assert (line["reason"], line["accepted"], line["target_rank_in"]) == (reason, reason == "accepted", 2)
    assert line["truncated"] and line["completion"] == text
    assert (line["failure"] is None) == (line["order"] is not None)


def test_of_two_equally_relevant_items_either_may_come_first() -> None:
    row = replace(ROW, relevance=(1.0, 0.0, 1.0))
    for first in (0, 2):
        order = [first, *({0, 1, 2} - {first})]
        draft = attempts.Draft(prompts.completion("why", order, LABELS))
        assert attempts.judge(row, LABELS, 1, draft)["accepted"]


@pytest.mark.parametrize(
    ("trace", "gives_away"),
    [
        ("<s_a_0><s_b_1> is the correct answer", True),
        ("the ground-truth item follows", True),
        ("Matches the target well", True),
        ("we were told so", True),
        (f"since it is given that {LABELS[1]} came next", True),
        (f"{LABELS[1]}, which was provided, fits", True),
        (f"{LABELS[1]} fits best: next:9", False),
        (f"given the dramas before it, something light and short and new such as {LABELS[1]}", False),
        ("the user took three dramas", False),
        ("", False),
    ],
)
def test_giving_the_answer_away(trace: str, gives_away: bool) -> None:
    assert attempts.gives_answer_away(trace, LABELS[1]) is gives_away


def test_naming_number_1_as_told_is_not_naming_number_11() -> None:
    assert attempts.gives_answer_away("told that it is 1.", "1")
    assert not attempts.gives_answer_away("told that it is 11.", "1")


def test_yield_by_rank_by_hand() -> None:
    def line(row_id: int, attempt: int, rank: int, reason: str, trace: str) -> dict:
        made = {"row_id": row_id, "attempt": attempt, "target_rank_in": rank, "reason": reason, "trace": trace}
        return {**made, "accepted": reason == "accepted", "truncated": False, "gives_answer_away": trace == "told"}

    table = pa.Table.from_pylist(
        [
            line(1, 1, 1, "accepted", "a"),
            line(2, 1, 1, "junk", "b"),
            line(2, 2, 1, "accepted", "a"),
            line(3, 1, 4, "target_not_first", "c"),
            line(3, 2, 4, "target_not_first", "d"),
            line(4, 1, 4, "accepted", "told"),
        ],
        schema=attempts.SCHEMA,
    )
    found = attempts.summarize(table)
    assert (found["rows"], found["accepted"], found["yield"], found["mean_attempts"]) == (4, 3, 3 / 4, 6 / 4)
    assert found["yield_by_first_stage_rank"] == {
        "1": {"rows": 2, "accepted": 2, "yield": 1.0},
        "4": {"rows": 2, "accepted": 1, "yield": 0.5},
    }
    assert found["reasons"] == {"accepted": 3, "target_not_first": 2, "junk": 1}
    assert found["distinct_trace_share"] == pytest.approx(2 / 3)  # a, a, told
    assert found["gives_answer_away_share"] == pytest.approx(1 / 3)


# ---- the stage


def test_the_stage_keeps_the_first_accepted_draft_of_each_row(run_path: Path) -> None:
    metrics, out_dir = run_stage(run_path, SHORT, rows_for_sft=0.6, batch_size=7, max_attempts=6)
    table, accepted = read(out_dir / "attempts.parquet"), read(out_dir / "accepted.parquet")
    relevance = {row["row_id"]: row["relevance"] for row in toy_rows(0, 30, 1)}
    by_row: dict[int, list[dict]] = {}
    for line in table:
        by_row.setdefault(line["row_id"], []).append(line)
    for row_id, lines in by_row.items():
        assert [line["attempt"] for line in lines] == list(range(1, len(lines) + 1))
        assert not any(line["accepted"] for line in lines[:-1])
        assert lines[-1]["accepted"] or len(lines) == 6
        for line in lines:
            assert line["accepted"] == (relevance[row_id][line["order"][0]] == 1.0)
    kept = [(line["row_id"], line["trace"], line["order"]) for line in table if line["accepted"]]
    assert [tuple(line.values()) for line in accepted] == kept
    assert 0 < metrics["accepted"] == len(kept) and metrics["teacher_is_language_model"] is False
    assert metrics["attempts"] == len(table) and metrics["distinct_trace_share"] > 0.9
    assert PromptSettings.load(out_dir) == PromptSettings(**SHORT)
    split = {line["row_id"]: line["used_for"] for line in read(out_dir / "row_split.parquet")}
    assert set(by_row) == {row_id for row_id, use in split.items() if use == "sft"}
    assert sorted(path.name for path in out_dir.iterdir()) == [
        "accepted.parquet",
        "attempts.parquet",
        "prompt.json",
        "row_split.parquet",
    ]


def test_rows_for_sft_and_dapo_share_no_user_and_leave_out_none(run_path: Path) -> None:
    train = read_rows(run_path / "candidates/train.parquet")
    users = [row.user for row in train]
    chosen = split.users_for_sft(users, 0.5, seed=0)
    assert len(chosen) == 5  # ten users of three rows: 15 of 30
    assert split.users_for_sft(users, 1.0, seed=0) == set(users)
    assert len(split.users_for_sft(users, 0.01, seed=0)) == 1
    assert split.users_for_sft(users, 0.5, seed=1) != chosen
    split.write_split(run_path / "split.parquet", train, chosen)
    used = {line["row_id"]: line["used_for"] for line in read(run_path / "split.parquet")}
    assert all(used[row.row_id] == ("sft" if row.user in chosen else "dapo") for row in train)
    assert 9999 not in used  # its list does not hold the target


def test_max_rows_limits_the_rows_that_are_written_for(run_path: Path) -> None:
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        metrics, out_dir = run_stage(run_path, SHORT, f"out{number}", max_rows=5, seed=seed)
        assert (metrics["rows"], metrics["sft_rows"]) == (5, 30)
        chosen.append({line["row_id"] for line in read(out_dir / "attempts.parquet")})
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_stopped_stage_continues_without_repeating_a_draw(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"batch_size": 4, "max_attempts": 3}
    whole, whole_dir = run_stage(run_path, SHORT, "whole", **options)
    draft, calls, deadly = evidence.EvidenceTeacher._draft, [], [True]

    def stop_after_30(self, row, attempt):  # noqa: ANN001, ANN202
        calls.append((row.row_id, attempt))
        if deadly and len(calls) == 30:
            raise RuntimeError("killed")
        return draft(self, row, attempt)

    monkeypatch.setattr(evidence.EvidenceTeacher, "_draft", stop_after_30)
    with pytest.raises(RuntimeError, match="killed"):
        run_stage(run_path, SHORT, "stopped", **options)
    stored = attempts.AttemptStore(run_path / "stopped").read()
    assert len(stored) == 28  # seven whole batches of four
    calls.clear()
    deadly.clear()
    resumed, resumed_dir = run_stage(run_path, SHORT, "stopped", **options)
    before = set(zip(stored["row_id"].to_pylist(), stored["attempt"].to_pylist(), strict=True))
    assert before.isdisjoint(calls) and len(calls) == whole["attempts"] - 28
    assert resumed == whole
    for name in ("attempts", "accepted", "row_split"):
        assert read(resumed_dir / f"{name}.parquet") == read(whole_dir / f"{name}.parquet")


def test_a_stage_stopped_after_its_last_draw_draws_no_more(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, out_dir = run_stage(run_path, SHORT, max_attempts=2)
    table = read(out_dir / "attempts.parquet")
    monkeypatch.setattr(traces, "fit_scores", None)  # would fail when called
    assert run_stage(run_path, SHORT, max_attempts=2)[0] == first
    assert read(out_dir / "attempts.parquet") == table


def test_targeted_evidence_accepts_every_row_in_one_draw_and_gives_nothing_away(run_path: Path) -> None:
    metrics, _ = run_stage(run_path, {"evidence": "words"}, strategy="targeted")
    assert (metrics["yield"], metrics["mean_attempts"], metrics["gives_answer_away_share"]) == (1.0, 1.0, 0.0)


# ---- teachers that are language models


def test_a_teacher_reads_the_full_task_what_codes_mean_and_what_it_is_told(prompter) -> None:
    (row,) = ranking_rows(0, 1, relevance=[0.0, 0.0, 1.0, 0.0])
    asked = prompter(**SHORT, knowledge_priming=True)
    hidden, told = (teachers.PromptWriter(asked, told)(row) for told in (False, True))
    assert "You are an expert" in hidden and "shampoo" in hidden
    assert "next (chosen next by N others after the last item)" in hidden
    label = asked.labels(row)[2]
    assert told.startswith(hidden) and f"The item taken next is {label}." in told.removeprefix(hidden)


class Server(BaseHTTPRequestHandler):
    """A chat completions server whose answer depends on the first candidate's place in the catalogue."""

    requests: list[dict] = []
    busy = 0  # requests that are refused before one is answered
    open, most_open = 0, 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.answer(200, {"object": "list", "data": [{"id": "toy", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        with Server.lock:
            Server.open += 1
            Server.most_open = max(Server.open, Server.most_open)
        time.sleep(0.005)
        try:
            self.complete(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        finally:
            with Server.lock:
                Server.open -= 1

    def complete(self, body: dict) -> None:
        if Server.busy > 0:
            Server.busy -= 1
            return self.answer(503, {"error": {"message": "busy"}})
        Server.requests.append({**body, "key": self.headers["Authorization"]})
        if body["max_completion_tokens"] == 1:
            return self.answer(400, {"error": {"message": "too long"}})
        self.answer(200, {**CHAT, "choices": [self.choice(body["messages"][0]["content"])]})

    def choice(self, content: str) -> dict:
        ids = re.findall(rf"^{ID}", content.partition("Candidates:")[2], re.MULTILINE)
        told = re.search(rf"taken next is ({ID})", content)
        if told:
            rest = [label for label in ids if label != told[1]]
            known = "It is the correct answer." if told[1] == ids[0] else "It follows the history."
            return self.message(f"<think>{known}</think>{told[1]}{''.join(rest)}")
        if "<s_a_0><s_b_0>" in ids[:2]:
            return self.message(f"<think>Too long a {ids[0]}", "length")
        if "<s_a_2>" in ids[-1]:  # a server that parts reasoning from the answer
            return self.message("".join(ids), reasoning_content=f"First {ids[0]}")
        return self.message(f"<think>First {ids[0]}</think>{''.join(ids)}")

    @staticmethod
    def message(text: str, finish_reason: str = "stop", **extra: str) -> dict:
        return {
            "index": 0,
            "finish_reason": finish_reason,
            "message": {"role": "assistant", "content": text, **extra},
        }

    def answer(self, status: int, value: dict) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_) -> None:  # noqa: ANN002
        pass


CHAT = {"id": "1", "object": "chat.completion", "created": 0, "model": "toy"}


@pytest.fixture
def base_url(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Server.requests, Server.busy, Server.most_open = [], 0, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_the_openai_teacher_keeps_some_refuses_some_and_says_why(run_path: Path, base_url: str) -> None:
    Server.busy = 1  # the first request is tried again
    options = {"teacher": "openai", "teacher_model": "toy", "base_url": base_url, "max_attempts": 2}
    metrics, out_dir = run_stage(run_path, {}, max_completion_tokens=50, temperature=0.7, **options)
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
    assert all(
        (r["model"], r["temperature"], r["max_completion_tokens"], r["key"]) == ("toy", 0.7, 50, "Bearer none")
        for r in Server.requests
    )


@pytest.mark.parametrize("most", [1, 3])
def test_the_openai_teacher_sends_max_concurrency_requests_at_a_time(run_path: Path, base_url: str, most: int) -> None:
    options = {"teacher": "openai", "teacher_model": "toy", "base_url": base_url, "max_concurrency": most}
    run_stage(run_path, {}, max_attempts=1, **options)
    assert Server.most_open == most


@pytest.mark.parametrize("max_retries", [0, 1])
def test_a_failed_request_is_sent_again_max_retries_times(run_path: Path, base_url: str, max_retries: int) -> None:
    from openai import InternalServerError

    Server.busy = 1
    options = {"teacher": "openai", "teacher_model": "toy", "base_url": base_url, "max_concurrency": 1}
    with contextlib.nullcontext() if max_retries else pytest.raises(InternalServerError, match="busy"):
        run_stage(run_path, {}, strategy="targeted", max_rows=2, max_retries=max_retries, **options)
    assert len(Server.requests) == 1 + max_retries  # of two rows, what the server did not refuse


def test_the_share_of_targeted_traces_that_give_the_answer_away(run_path: Path, base_url: str) -> None:
    options = {"teacher": "openai", "teacher_model": "toy", "base_url": base_url, "strategy": "targeted"}
    metrics, _ = run_stage(run_path, {}, **options)
    # The canned teacher blurts it out where the target heads the list.
    first = sum(row["relevance"][0] == 1.0 for row in toy_rows(0, 30, 1))
    assert metrics["yield"] == metrics["mean_attempts"] == 1.0
    assert metrics["gives_answer_away_share"] == pytest.approx(first / 30)


def test_a_refused_prompt_is_named(run_path: Path, base_url: str) -> None:
    options = {"teacher": "openai", "teacher_model": "toy", "base_url": base_url, "max_completion_tokens": 1}
    with pytest.raises(ValueError, match=r"refuses the prompt of row_id \d+: .*too long.*lower max_history"):
        run_stage(run_path, {}, **options)


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
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        traces.TracesArguments(run_dir="runs/x", **{"teacher": "evidence", **options})


def check(run_path: Path, settings: dict | None = None, **options) -> None:
    args = traces.TracesArguments(run_dir=str(run_path), **{"teacher": "evidence", **options})
    traces.check(args, PromptSettings(**(settings or {})))


def test_a_model_folder_that_is_not_there_is_refused(run_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\./nowhere is not there; give a"):
        check(run_path, teacher="vllm", teacher_model="./nowhere")
    check(run_path, teacher="vllm", teacher_model="Qwen/Qwen3-8B")  # a hub name


def test_a_server_that_cannot_be_reached_is_refused(run_path: Path) -> None:
    options = {"teacher": "openai", "teacher_model": "toy", "base_url": "http://127.0.0.1:9/v1"}
    with pytest.raises(
        ValueError, match="http://127.0.0.1:9/v1 cannot be reached; start its server, such as `vllm se"
    ):
        check(run_path, **options)


def test_a_server_without_the_model_is_refused(run_path: Path, base_url: str) -> None:
    with pytest.raises(ValueError, match="teacher_model other is not served at .*; it serves toy"):
        check(run_path, teacher="openai", teacher_model="other", base_url=base_url)


def test_candidates_without_features_are_refused_where_evidence_needs_them(run_path: Path) -> None:
    path = run_path / "candidates/train.parquet"
    table = read(path)
    table[2]["features"] = None
    pq.write_table(pa.Table.from_pylist(table), path)
    with pytest.raises(ValueError, match="train.parquet: row_id 102 has no features"):
        check(run_path)
    pq.write_table(pa.Table.from_pylist(table).drop_columns("features"), path)
    with pytest.raises(ValueError, match="train.parquet has no column features"):
        check(run_path, {"evidence": "codes"}, teacher="vllm", teacher_model="a/b")
    check(run_path, teacher="vllm", teacher_model="a/b")


def test_a_fact_that_the_candidates_lack_is_refused(run_path: Path) -> None:
    stored = {"names": ["lift"], "edges": {"lift": EDGES["lift"]}}
    (run_path / "candidates/features.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="evidence_names holds 'direct_last' but .*features.json has lift; run the"):
        check(run_path, {"evidence": "codes"})


def test_candidates_without_a_hit_are_refused(run_path: Path) -> None:
    path = run_path / "candidates/train.parquet"
    pq.write_table(pa.Table.from_pylist(read(path)[-1:]), path)
    with pytest.raises(ValueError, match="none of its 1 rows lists a relevant item"):
        run_stage(run_path, SHORT)


def test_training_rows_of_one_user_cannot_be_scored_out_of_fold(run_path: Path) -> None:
    write_candidates(run_path / "candidates", train=with_a_miss(toy_rows(0, 3, 1)))
    with pytest.raises(ValueError, match="all 3 training rows are of one user"):
        run_stage(run_path, SHORT)


def test_a_teacher_that_never_ranks_the_target_first_is_refused(run_path: Path, base_url: str) -> None:
    last = [{**row, "relevance": [0.0, 0.0, 0.0, 1.0]} for row in toy_rows(0, 6, 1)]
    write_candidates(run_path / "candidates", train=with_a_miss(last))
    options = {"teacher": "openai", "teacher_model": "toy", "base_url": base_url, "max_attempts": 1}
    with pytest.raises(ValueError, match=r"none of 6 attempts on 6 rows was accepted \(.*target_not_first"):
        run_stage(run_path, {}, **options)


def test_the_shipped_recipe_resolves() -> None:
    path = Path(__file__).parents[1] / "recipes/ml100k/5_traces.yaml"
    args, settings = recipe.resolve("traces", recipe.load(path), str(path))
    assert (args.teacher, settings.task, settings.evidence) == ("evidence", "short", "codes")
