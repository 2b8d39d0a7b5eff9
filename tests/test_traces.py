"""The traces stage without vLLM: what it cites is true, what it keeps is right, what it drops is counted."""

import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rerank import prompts, recipe, traces
from rerank.baselines import EVIDENCE, FEATURES
from rerank.catalogue import Catalogue
from rerank.prompts import PromptSettings
from rerank.traces import attempts, evidence, rows, teachers

GENRES = ["Drama", "Comedy, Drama", "Sci-Fi", "", "Crime, Drama", "War"]
NUM_ITEMS, NUM_CANDIDATES = 12, 4
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


def write_candidates(folder: Path, name: str, table_rows: list[dict]) -> None:
    missed = {**table_rows[0], "row_id": 9999, "relevance": [0.0] * NUM_CANDIDATES, "hit": False}
    pq.write_table(pa.Table.from_pylist([*table_rows, missed]), folder / f"{name}.parquet")


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    """A run whose first four stages are done, with 30 hit training rows of 10 users."""
    for stage in ("data", "semantic_ids", "candidates"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "stage.json").write_text(json.dumps({"id": stage, "given": {}, "inputs": {}}))
    items = {"item": range(NUM_ITEMS), "item_id": [f"m{i}" for i in range(NUM_ITEMS)]}
    items |= {"title": [f"Film {i}" for i in range(NUM_ITEMS)], "category": GENRES * 2}
    pq.write_table(pa.table({k: list(v) for k, v in items.items()}), tmp_path / "data/items.parquet")
    ids = [f"<s_a_{i // 4}><s_b_{i % 4}>" for i in range(NUM_ITEMS)]
    ids_table = pa.table({"item": list(range(NUM_ITEMS)), "semantic_id": ids})
    pq.write_table(ids_table, tmp_path / "semantic_ids/semantic_ids.parquet")
    write_candidates(tmp_path / "candidates", "train", toy_rows(0, 30, 1))
    write_candidates(tmp_path / "candidates", "valid", toy_rows(1, 12, 50))
    stored = {"names": list(FEATURES), "edges": EDGES}
    (tmp_path / "candidates/features.json").write_text(json.dumps(stored))
    return tmp_path


@pytest.fixture
def catalogue(run_path: Path) -> Catalogue:
    return Catalogue.load(run_path)


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
def test_a_short_trace_grades_every_candidate_and_cites_true_facts_of_the_best(
    catalogue: Catalogue, ranking: str
) -> None:
    words = {prompts.FACTS[name][0]: FEATURES.index(name) for name in EVIDENCE}
    settings, rng, cited = PromptSettings(**SHORT, ranking=ranking), np.random.default_rng(3), []
    known = {*evidence.EVIDENCE_WORDS, *prompts.evidence_words(settings)}
    for row in toy_rows(5, 40, 1):
        facts = evidence.Facts.of(row, settings, EDGES, FEATURES)
        labels = prompts.candidate_labels(row, catalogue, settings)
        grades = rng.integers(0, len(evidence.GRADES), NUM_CANDIDATES)
        trace = evidence.word_short(labels, grades, facts)
        graded, best, codes = re.fullmatch(r"(.*) best ?(\S+?) (\w+:\d \w+:\d)", trace).groups()
        found = re.findall(rf"({ID}| \d+) (\w+)", graded)
        assert "".join(" ".join(pair) for pair in found) == graded
        assert [label.strip() for label, _ in found] == labels
        assert [evidence.GRADES.index(word) for _, word in found] == grades.tolist()
        place = labels.index(best)
        assert grades[place] == max(grades) and max(grades[:place], default=-1) < max(grades)
        for word, digit in (code.split(":") for code in codes.split()):  # nine edges at 0.5, 1.5 .. 8.5
            assert int(digit) == min(round(row["features"][place][words[word]]), 9)
        assert set(re.sub(ID, " ", trace).split()) <= known
        cited.append(codes)
    assert len(set(cited)) > 30


def test_a_ranking_goes_by_grade_and_then_by_the_order_shown() -> None:
    assert evidence.by_grade([2, 6, 2, 0, 6]) == [1, 4, 0, 2, 3]


@pytest.mark.parametrize("level", ["words", "codes"])
def test_every_fact_of_a_full_trace_stands_on_its_line_of_the_prompt(catalogue: Catalogue, level: str) -> None:
    settings = PromptSettings(evidence=level, max_history=3)
    for row in toy_rows(6, 20, 1):
        prompt = prompts.rerank_prompt(row, catalogue, settings, EDGES, FEATURES)
        shown = dict(re.findall(rf"^({ID})(.*)$", prompt.partition("Candidates:")[2], re.MULTILINE))
        facts = evidence.Facts.of(row, settings, EDGES, FEATURES)
        trace = evidence.word_full(row, [1, 0, 3, 2], facts, catalogue, settings)
        sentences = re.findall(rf"(Best match|Second|Third|Last): ({ID}) \((Film \d+)\); (.*?)\.(?= |$)", trace)
        assert [catalogue.semantic_ids.index(label) for _, label, _, _ in sentences] == [
            row["candidates"][place] for place in (1, 0, 3, 2)
        ]
        for _, label, title, listed in sentences:
            assert title in shown[label]
            for fact in listed.split("; "):
                assert fact in shown[label]
        highest = re.search(r"The highest among the candidates: (.*?)\.(?= |$)", trace)[1]
        assert any(highest in line for line in shown.values())


def test_pattern_and_complement_are_counted_from_the_categories_shown(catalogue: Catalogue) -> None:
    row = {**toy_rows(0, 1, 1)[0], "history": [2, 0, 1, 4], "candidates": [6, 5, 3, 7]}
    settings = PromptSettings(max_history=3)
    none = evidence.Facts.of(row, settings, {}, ())
    # shown: 0 Drama, 1 Comedy + Drama, 4 Crime + Drama; candidates 6 Drama, 5 War, 3 none, 7 Comedy + Drama
    trace = evidence.word_full(row, [3, 0, 1, 2], none, catalogue, settings)
    assert trace.startswith(
        "Broad pattern: Drama in 3 of 3 items; Crime in 1 of 3 items; the last item is <s_a_1><s_b_0> (Film 4). "
        "What complements it: Comedy, as in 1 of 4 candidates. Best match: <s_a_1><s_b_3> (Film 7); Comedy."
    )


def test_without_evidence_and_categories_a_trace_cites_ids_alone(catalogue: Catalogue) -> None:
    row, settings = toy_rows(0, 1, 1)[0], PromptSettings(item_fields=["semantic_id"])
    trace = evidence.word_full(row, [0, 1, 2, 3], evidence.Facts.of(row, settings, {}, ()), catalogue, settings)
    assert set(re.findall(r"\d+", re.sub(ID, "", trace))) == set()
    assert "Film" not in trace and "Drama" not in trace


def test_a_title_cannot_close_the_trace() -> None:
    odd = Catalogue(["a", "b"], ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>"], ["</think> x", "y"], ["<War>", ""])
    row = {"history": [0], "candidates": [0, 1], "features": []}
    trace = evidence.word_full(row, [0, 1], evidence.Facts([[], []], np.zeros((2, 0))), odd, PromptSettings())
    assert prompts.parse_completion(prompts.completion(trace, [0, 1], odd.semantic_ids), odd.semantic_ids).order


def test_calibration_finds_the_odds() -> None:
    # Two candidates one apart, the upper one best in 3 of 4 rows: exp(f) / (1 + exp(f)) = 3/4, so f = ln 3.
    scores = [np.array([1.0, 0.0])] * 4
    assert evidence.calibrate(scores, [0, 0, 0, 1]) == pytest.approx(math.log(3), rel=1e-3)


def test_grades_part_the_scores_of_all_rows_evenly_and_noise_moves_them(catalogue: Catalogue) -> None:
    row = {**toy_rows(0, 1, 1)[0], "row_id": 0}
    scores = {number: np.arange(4.0) + 4 * number for number in range(7)}  # row 0 holds the lowest seventh

    def teacher(temperature: float, told: bool = False) -> evidence.EvidenceTeacher:
        given = scores, catalogue, PromptSettings(**SHORT), EDGES, FEATURES
        return evidence.EvidenceTeacher(*given, temperature, 0, told)

    grades = [teacher(0.0)._grades({**row, "row_id": number}, 1).tolist() for number in range(7)]
    assert grades == [[number] * 4 for number in range(7)]
    # Gumbel noise of scale 4 lifts the score 3, 0.86 below the first edge, over it when it exceeds 0.86 / 4: 55 %.
    lifted = [teacher(4.0)._grades(row, attempt)[3] > 0 for attempt in range(2000)]
    assert np.mean(lifted) == pytest.approx(1 - math.exp(-math.exp(-0.857 / 4)), abs=0.04)
    assert teacher(4.0)._grades(row, 3).tolist() == teacher(4.0)._grades(row, 3).tolist()
    told = teacher(0.0, told=True)._grades({**row, "row_id": 6}, 1)
    assert [grade == 6 for grade in told] == [value > 0 for value in row["relevance"]]


def test_out_of_fold_scores_of_the_stage_beat_chance(run_path: Path) -> None:
    train = rows.read_hit_rows(run_path / "candidates/train.parquet", with_features=True)
    scores = evidence.fit_scores(train, run_path / "candidates/valid.parquet", seed=0)
    hits = [np.argmax(scores[row["row_id"]]) == rows.best_position(row) for row in train]
    assert np.mean(hits) > 1 / NUM_CANDIDATES


# ---- judging and reporting

LABELS = ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>", "<s_a_0><s_b_2>"]
ROW = {"row_id": 1, "user": 2, "candidates": [0, 1, 2], "relevance": [0.0, 2.0, 1.0]}


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
    row = {**ROW, "relevance": [1.0, 0.0, 1.0]}
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
    assert json.loads((out_dir / "features.json").read_text())["names"] == list(FEATURES)
    split = {line["row_id"]: line["used_for"] for line in read(out_dir / "row_split.parquet")}
    assert set(by_row) == {row_id for row_id, use in split.items() if use == "sft"}
    assert sorted(path.name for path in out_dir.iterdir()) == [
        "accepted.parquet",
        "attempts.parquet",
        "features.json",
        "prompt.json",
        "row_split.parquet",
    ]


def test_rows_for_sft_and_dapo_share_no_user_and_leave_out_none(run_path: Path) -> None:
    train = rows.read_hit_rows(run_path / "candidates/train.parquet", with_features=False)
    users = [row["user"] for row in train]
    chosen = rows.users_for_sft(users, 0.5, seed=0)
    assert len(chosen) == 5  # ten users of three rows: 15 of 30
    assert rows.users_for_sft(users, 1.0, seed=0) == set(users)
    assert len(rows.users_for_sft(users, 0.01, seed=0)) == 1
    assert rows.users_for_sft(users, 0.5, seed=1) != chosen
    rows.write_split(run_path / "split.parquet", train, chosen)
    used = {line["row_id"]: line["used_for"] for line in read(run_path / "split.parquet")}
    assert all(used[row["row_id"]] == ("sft" if row["user"] in chosen else "dapo") for row in train)
    assert 9999 not in used  # its list does not hold the target


def test_max_rows_draws_a_seeded_choice(run_path: Path) -> None:
    train = rows.read_hit_rows(run_path / "candidates/train.parquet", with_features=False)
    assert rows.choose(train, 0, 0) == train
    assert rows.choose(train, 5, 0) == rows.choose(train, 5, 0) != rows.choose(train, 5, 1)
    assert len(rows.choose(train, 5, 0)) == 5


def test_a_stopped_stage_goes_on_without_repeating_a_draw(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"batch_size": 4, "max_attempts": 3}
    whole, whole_dir = run_stage(run_path, SHORT, "whole", **options)
    draft, calls, deadly = evidence.EvidenceTeacher._draft, [], [True]

    def stop_after_30(self, row, attempt):  # noqa: ANN001, ANN202
        calls.append((row["row_id"], attempt))
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


def test_a_teacher_reads_the_full_task_what_codes_mean_and_what_it_is_told(catalogue: Catalogue) -> None:
    row = {**toy_rows(0, 1, 1)[0], "relevance": [0.0, 0.0, 1.0, 0.0]}
    settings = PromptSettings(**SHORT, knowledge_priming=True)
    hidden = teachers.PromptWriter(catalogue, settings, EDGES, FEATURES, told=False)(row)
    told = teachers.PromptWriter(catalogue, settings, EDGES, FEATURES, told=True)(row)
    assert "You are an expert" in hidden and "shampoo" in hidden
    assert "next (chosen next by N others after the last item)" in hidden
    label = catalogue.semantic_ids[row["candidates"][2]]
    assert told.startswith(hidden) and f"The item taken next is {label}." in told.removeprefix(hidden)


class Server(BaseHTTPRequestHandler):
    """A chat completions server whose answer depends on the first candidate's place in the catalogue."""

    requests: list[dict] = []
    paths: list[str] = []
    busy = 0

    def do_GET(self) -> None:
        self.answer(200, {"object": "list", "data": [{"id": "toy", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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
    Server.requests, Server.busy = [], 0
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
    with pytest.raises(FileNotFoundError, match=r"teacher_model \./nowhere is no model folder"):
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
    write_candidates(run_path / "candidates", "train", toy_rows(0, 3, 1))
    with pytest.raises(ValueError, match="all 3 training rows are of one user"):
        run_stage(run_path, SHORT)


def test_a_teacher_that_never_ranks_the_target_first_is_refused(run_path: Path, base_url: str) -> None:
    last = [{**row, "relevance": [0.0, 0.0, 0.0, 1.0]} for row in toy_rows(0, 6, 1)]
    write_candidates(run_path / "candidates", "train", last)
    options = {"teacher": "openai", "teacher_model": "toy", "base_url": base_url, "max_attempts": 1}
    with pytest.raises(ValueError, match=r"none of 6 attempts on 6 rows was accepted \(.*target_not_first"):
        run_stage(run_path, {}, **options)


def test_the_shipped_recipe_resolves() -> None:
    path = Path(__file__).parents[1] / "recipes/ml100k/5_traces.yaml"
    args, settings = recipe.resolve("traces", recipe.load(path), str(path))
    assert (args.teacher, settings.task, settings.evidence) == ("evidence", "short", "codes")
