"""Fields, facts and labels of prompts, and what is refused because a model, a log or an alphabet does not have it."""

import json
import logging
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_model import tiny_tokenizer
from toy_run import CATALOGUE as TOY
from toy_run import finish, write_candidates, write_items

from rerank import prompts, traces
from rerank.catalogue import Catalogue
from rerank.grading import trace_words
from rerank.midtrain import MidtrainArguments, exercises
from rerank.midtrain.words import fixed_words, warn_of_split_words
from rerank.models import base as base_model
from rerank.prompts import PromptSettings, completion, facts, parse_completion
from rerank.prompts.fields import FieldTexts, age, cut
from rerank.rows import Prompter, RankingRow, checks

CATALOGUE = Catalogue(
    ["w", "x", "y"],
    ["<s_a_1>", "<s_a_2>", "<s_a_3>"],
    ["Dune", "Alien  3", ""],
    ["Sci-fi", "", ""],
    {"brand": ["Warner", "Fox <tm>", ""], "price": ["9.5", "", ""]},
)
DAY = 86400.0
ROW = RankingRow(
    7,
    history=(0, 2, 1),
    candidates=(1, 2),
    features=np.array([[1, 0.5, 0.031, 40, 3], [2, np.nan, 0, 0, np.nan]], dtype=np.float32),
    fields={"age": 34, "city": "Bern\n<x>", "device": "phone", "hour": 8.0, "query": None, "member": True},
    time=100 * DAY,
    history_times=(100 * DAY - 400 * DAY, None, 100 * DAY - 2.6 * DAY),
    history_events=("click", "buy", None),
)
NAMES = ["place", "first_stage_score", "click_rate", "shown", "candidate_price"]
EDGES = {name: [0.01, 1, 2, 3, 4, 5, 6, 7, 50] for name in NAMES}


def prompter(catalogue=CATALOGUE, tokenizer=None, **shown):
    options = {"task": "short", "item_fields": ["title"], "ranking": "number", **shown}
    return Prompter(catalogue, PromptSettings(**options), NAMES, EDGES, tokenizer)


def test_any_column_of_items_stands_on_their_lines_with_its_name():
    assert prompter(item_fields=["title", "brand", "price"]).message(ROW) == (
        "Rank:\nHistory:\n Dune | brand: Warner | price: 9.5\n y\n Alien 3 | brand: Fox ‹tm›\n"
        "Candidates:\n 1. Alien 3 | brand: Fox ‹tm›\n 2. y"  # an item without any text goes by its id
    )
    shown = {"item_fields": ["semantic_id", "price"], "ranking": "semantic_id", "max_history": 1}
    assert prompter(**shown).message(ROW) == "Rank:\nHistory:\n<s_a_2>\nCandidates:\n<s_a_2>\n<s_a_3>"


@pytest.mark.parametrize(
    ("layout", "shown"),
    [
        ("history_first", "Rank:\nHistory:\nCandidates:\n 1. place:2\n 2. place:3"),
        ("candidates_first", "Rank:\nCandidates:\n 1.\n 2.\nHistory:\nFacts:\n 1. place:2\n 2. place:3"),
    ],
)
def test_without_fields_lines_hold_facts_alone(layout, shown):
    asked = prompter(item_fields=[], evidence="codes", evidence_names=["place"], layout=layout)
    assert asked.message(ROW) == shown


def test_fields_of_user_and_request_stand_before_the_history_without_empty_ones():
    shown = {"user_fields": ["age", "city", "member"], "request_fields": ["query", "device", "hour"], "max_history": 1}
    assert prompter(**shown).message(ROW) == (
        "Rank:\nUser: age: 34; city: Bern ‹x›; member: true\nRequest: device: phone; hour: 8\n"
        "History:\n Alien 3\nCandidates:\n 1. Alien 3\n 2. y"
    )
    assert "Request" not in prompter(request_fields=["query"]).message(ROW)
    with pytest.raises(ValueError, match="row_id 7: user_fields holds 'sex' but the row has age, city, device, hour"):
        prompter(user_fields=["sex"]).message(ROW)


def test_ages_and_events_of_the_history_stand_behind_its_items():
    lines = prompter(history_fields=["time", "event"]).message(ROW).split("\n")
    assert lines[1:5] == ["History:", " Dune | 13mo | click", " y | buy", " Alien 3 | 2d"]
    shown = {"item_fields": ["semantic_id"], "ranking": "semantic_id", "history_fields": ["event"], "max_history": 2}
    assert prompter(**shown).message(ROW).split("\n")[1] == "History:<s_a_3> buy<s_a_2>"
    unknown = RankingRow(8, (0,), (1, 2))  # of a file without times
    assert prompter(history_fields=["time"]).message(unknown).split("\n")[2] == " Dune"
    full = prompter(history_fields=["time"], task="full").message(ROW).split("\n")[0]
    assert "such as 2d for two days" in full and "name items by their numbers" in full
    assert "2d" not in prompter(task="full").message(ROW)


@pytest.mark.parametrize(
    ("seconds", "word"),
    [(-5, "0m"), (59, "0m"), (3599, "59m"), (3600, "1h"), (DAY - 1, "23h"), (DAY, "1d"), (59.9 * DAY, "59d")]
    + [(60 * DAY, "2mo"), (729 * DAY, "24mo"), (730 * DAY, "2y"), (math.nan, "")],
)
def test_an_age_is_one_short_word_rounded_down(seconds, word):
    assert age(seconds) == word


def test_texts_are_cut_by_the_models_tokens_or_by_words():
    long = Catalogue(["w"], [""], ["the title of a drama about nothing"], ["drama"], {"text": ["one two  three"]})
    row = RankingRow(1, (), (0, 0), fields={"query": "red shoes for children"})
    shown = {"item_fields": ["title", "text"], "request_fields": ["query"], "max_field_tokens": 2}
    assert prompter(long, **shown).message(row).split("\n")[1:3] == ["Request: query: red shoes", "History:"]
    assert prompter(long, **shown).message(row).split("\n")[4] == " 1. the title | text: one two"
    tokenizer = tiny_tokenizer()
    num_tokens = len(tokenizer("the title of").input_ids)
    texts = prompter(long, tokenizer, **{**shown, "max_field_tokens": num_tokens}).texts
    assert texts.item(0, "title") == "the title of"
    ids = tokenizer(" ".join(long.fields["text"][0].split())).input_ids
    assert len(ids) > num_tokens and texts.item(0, "text") == tokenizer.decode(ids[:num_tokens]).rstrip()
    assert cut("naïve é", 3, tokenizer) == "naï"  # a letter of two byte tokens is kept whole
    assert cut("the title", 0, tokenizer) == cut("the title", 9, tokenizer) == "the title"


def test_defaults_cut_nothing():
    assert prompter(item_fields=["title"]).texts.item(1, "title") == "Alien 3"
    assert PromptSettings().max_field_tokens == 0


def test_facts_of_the_first_stage_the_log_and_the_users_own_columns_in_words_and_codes():
    worded = prompter(evidence="words", evidence_names=NAMES).message(ROW).split("\n")
    assert worded[-2:] == [
        " 1. Alien 3: at place 1 of the first stage; first-stage score 0.50; clicked in 0.031 of the lists that "
        "showed it; shown in 40 lists; candidate_price 3.00",
        " 2. y: at place 2 of the first stage; score unknown; clicked in 0.000 of the lists that showed it; shown in "
        "0 lists; candidate_price unknown",
    ]
    coded = prompter(evidence="codes", evidence_names=NAMES).message(ROW).split("\n")
    assert coded[-2:] == [
        " 1. Alien 3 place:2 score:1 ctr:1 shown:8 candidate_price:4",
        " 2. y place:3 score:? ctr:0 shown:0 candidate_price:?",
    ]


def test_an_unknown_number_orders_as_the_mean_of_the_list():
    found = prompter(evidence="words", evidence_names=["candidate_price", "shown"]).facts(ROW)
    assert found.values.tolist() == [[3, 40], [3, 0]]
    alone = RankingRow(1, (), (0, 1), features=np.full((2, 5), np.nan))
    assert prompter(evidence="words", evidence_names=["shown"]).facts(alone).values.tolist() == [[0], [0]]


def test_a_small_tokenizer_has_one_token_for_each_word_of_the_facts_and_labels_that_a_recipe_names(caplog):
    options = {"list_facts": ["place", "candidate_price", "pop-2"], "list_labels": "letter", "longest_list": 24}
    args = MidtrainArguments(run_dir="run", vocab_size=2000, num_buckets=12, **options)
    tokenizer = base_model.train_tokenizer(["History: Title"] * 8, args.vocab_size, fixed_words(args))
    for word in [*facts.code_words(options["list_facts"], 12), *"AX", "24", "top", "Rank:"]:
        assert len(tokenizer(word).input_ids) == len(tokenizer(f" {word}").input_ids) == 1, word
    assert facts.code_words(["place", "near"], 2) == ["place:0", "place:1", "place:?", "soon:0", "soon:1"]
    warn_of_split_words(tokenizer, args)
    assert not caplog.records
    small = base_model.train_tokenizer(["History: Title"] * 8, 400, fixed_words(args))
    warn_of_split_words(small, args)
    assert "vocab_size 2000 leaves" in caplog.text and "words of lists in several tokens" in caplog.text


def test_the_words_of_the_default_lists_are_the_shipped_facts_and_ten_numbers():
    words = fixed_words(MidtrainArguments(run_dir="run"))
    shipped = [f"{word}:{bucket}" for word, _ in facts.FACTS.values() for bucket in range(10)]
    assert words[: len(shipped)] == shipped and "10" in words and "11" not in words and "place:0" not in words
    assert [word for word in fixed_words(MidtrainArguments(run_dir="run"), 50_000) if word not in words] == [
        "fit:?",
        "now:?",
    ]
    assert trace_words(2) == ["bad", "poor", "weak", "fair", "good", "strong", "top", "best", "1", "2"]


# --- labels


LETTERS = list("ABC")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(" C A B", [2, 0, 1]), ("C,A\nB", [2, 0, 1]), (" C A", "too_few"), (" C A A", "duplicate")]
    + [(" C A B A", "too_many"), (" D A B", "foreign_item"), ("CAB", "junk"), (" c a b", "junk"), (" C A 2", "junk")],
)
def test_letters_are_written_and_read_as_numbers_are(answer, expected):
    parsed = parse_completion(f"<think>A fits</think>{answer}", LETTERS)
    assert (parsed.order or parsed.failure) == expected
    if parsed.order:
        assert completion("A fits", parsed.order, LETTERS) == "<think>A fits</think> C A B"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("<c_3><c_1><c_2>", [2, 0, 1]), (" <c_3> <c_1>\n<c_2>", [2, 0, 1]), ("<c_3><c_1>", "too_few")]
    + [("<c_3><c_1><c_1>", "duplicate"), ("<c_3><c_1><c_2><c_1>", "too_many"), ("<c_4><c_1><c_2>", "foreign_item")]
    + [("<c_3>,<c_1>,<c_2>", "junk"), ("<c_3><s_a_1><c_2>", "junk"), ("3 1 2", "junk")],
)
def test_labels_may_be_tokens_of_their_own(answer, expected):
    labels = prompts.word_labels("token", 3)
    parsed = parse_completion(f"<think><c_1> fits</think>{answer}", labels)
    assert labels == ["<c_1>", "<c_2>", "<c_3>"] and (parsed.order or parsed.failure) == expected
    if parsed.order:
        assert completion("<c_1> fits", parsed.order, labels) == "<think><c_1> fits</think><c_3><c_1><c_2>"


def test_tokens_name_candidates_without_an_end():
    shown = prompter(ranking="token", item_fields=["title"], task="full")
    lines = shown.message(ROW).split("\n")
    assert (
        lines[-2:] == [" <c_1>. Alien 3", " <c_2>. y"] and shown.labels(RankingRow(1, (), (0,) * 300))[-1] == "<c_300>"
    )
    assert "write the labels of all 2 candidates" in lines[0]


def test_letters_name_candidates_and_end_at_z():
    shown = prompter(ranking="letter", item_fields=["title"], task="full")
    lines = shown.message(ROW).split("\n")
    assert lines[-2:] == [" A. Alien 3", " B. y"] and shown.labels(ROW) == ["A", "B"]
    assert "write the letters, separated by spaces, of all 2 candidates" in lines[0]
    assert prompts.word_labels("letter", 26)[-1] == "Z"
    with pytest.raises(ValueError, match="27 candidates but 26 letters to name them; set ranking: number or token"):
        shown.labels(RankingRow(1, (), tuple([0] * 27)))


def test_a_word_that_tells_the_answer_is_no_letter_within_another_word():
    assert traces.attempts.gives_answer_away("as I was given: B fits", "B")
    assert not traces.attempts.gives_answer_away("known by all", "B")
    assert not traces.attempts.gives_answer_away("a known pattern", "A")


def test_list_exercises_grow_to_the_longest_list_with_letters_and_numbers():
    rng = np.random.default_rng(0)
    made = list(exercises.list_documents(300, ["place"], "number", TOY, rng, longest=60, num_buckets=4))
    sizes = [len(document.answer.partition("</think>")[2].split()) for document in made]
    assert max(sizes[:20]) <= 10 and max(sizes) == 60
    shown = {line.split(" place:")[1] for document in made for line in document.prompt.split("\n")[3:]}
    assert shown == set("0123")
    for document in exercises.list_documents(50, ["place"], "letter", TOY, rng, longest=26):
        labels = [chr(ord("A") + place) for place in range(len(document.answer.partition("</think>")[2].split()))]
        assert parse_completion(document.given + document.answer, labels).order is not None
        assert [line[:3] for line in document.prompt.split("\n")[3:]] in ([], [f" {label}." for label in labels])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"list_labels": "letter", "longest_list": 27},
            "longest_list with list_labels: letter is 27 but must be at m",
        ),
        ({"longest_list": 1}, "longest_list is 1 but must be at least 2"),
        ({"list_facts": ["a b"]}, "list_facts holds 'a b', but a fact is one word"),
        ({"list_facts": []}, "list_facts is empty; name facts"),
        ({"mixture": {"lists": 1}}, "num_documents is 0, every sequence once, but mixture .* without sequence"),
        ({"mixture": {"list": 1}}, "give shares of sequence, persona, caption, text, lists, titles"),
        ({"mixture": {"lists": 0}, "num_documents": 5}, "one of them above 0"),
    ],
)
def test_lists_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MidtrainArguments(run_dir="run", **options)


class Digits:
    """A tokenizer that parts a space and every digit from one another, as Qwen's does."""

    def __call__(self, text, add_special_tokens=True):
        texts = [text] if isinstance(text, str) else text
        ids = [list(range(len(one) if one[1:].isdecimal() else 1)) for one in texts]
        return type("Encoded", (), {"input_ids": ids[0] if isinstance(text, str) else ids})


def test_labels_of_several_tokens_are_said(tmp_path, caplog):
    rows = [{"candidates": list(range(size))} for size in (3, 12)]
    write_candidates(tmp_path, train=rows)
    caplog.set_level(logging.WARNING)
    checks.warn_of_split_labels(Digits(), tmp_path, PromptSettings(ranking="letter", item_fields=["title"]))
    checks.warn_of_split_labels(Digits(), tmp_path, PromptSettings())
    assert not caplog.records
    checks.warn_of_split_labels(Digits(), tmp_path, PromptSettings(ranking="number", item_fields=["title"]))
    assert "12 of 12 labels are more than one token to the model (' 10' is 3)" in caplog.text
    assert "a ranking of all takes 27" in caplog.text  # nine of two, three of three


# --- what a run has


@pytest.fixture
def run(tmp_path):
    """A run of requests with finished data and candidates."""
    write_items(tmp_path / "data", brand=["b"] * 12, text=["t"] * 12)
    fields = json.dumps({"device": "phone", "age": 3})
    finish(tmp_path / "data", rows=pa.table({"row_id": [0], "fields": [fields], "history_times": [[1.0]]}))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"item_fields": ["title", "brnd"]},
            r"holds 'brnd' but .*items.parquet has title, category, brand, text; name",
        ),
        (
            {"user_fields": ["sex"]},
            "user_fields holds 'sex' but the rows of the data stage have device, age; name it in",
        ),
        ({"request_fields": ["hour"]}, "request_fields holds 'hour' but the rows of the data stage have device, age"),
        ({"history_fields": ["event"]}, "history_fields holds 'event', but the rows of the data stage do not know it"),
    ],
)
def test_a_field_that_the_data_stage_has_not_is_refused_by_the_dry_run(run, options, message):
    settings = PromptSettings(**{"ranking": "number", "item_fields": ["title"], **options})
    with pytest.raises(ValueError, match=message):
        traces.check(traces.TracesArguments(run_dir=str(run), teacher="evidence"), settings)


def test_fields_that_are_there_pass_the_dry_run_and_come_back_from_a_model_folder(run):
    known = {"user_fields": ["age"], "request_fields": ["device"], "history_fields": ["time"]}
    settings = PromptSettings(ranking="number", item_fields=["brand", "title", "text"], **known)
    traces.check(traces.TracesArguments(run_dir=str(run), teacher="evidence"), settings)
    catalogue = Catalogue.load(run)
    assert catalogue.fields == {"brand": ["b"] * 12, "text": ["t"] * 12} and not catalogue.has_ids
    catalogue.save(run, ["brand", "title"])
    kept = Catalogue.load(run)
    assert kept == catalogue and kept.fields == {"brand": ["b"] * 12}
    assert pq.read_schema(run / "catalogue.parquet").names == ["item_id", "semantic_id", "title", "category", "brand"]
    with pytest.raises(ValueError, match="item_fields holds 'text' but the catalogue has title, category, brand"):
        Prompter(kept, settings)


def test_numbers_of_items_are_texts_as_short_as_they_are_written(tmp_path):
    columns = {"price": [9.5, 10.0, None], "year": [1999, None, 2001], "tags": [["a"], [], None]}
    write_items(tmp_path / "data", 3, **columns)
    fields = Catalogue.load(tmp_path).fields
    assert fields == {"price": ["9.5", "10", ""], "year": ["1999", "", "2001"]}
    moved = Catalogue.load(tmp_path).with_texts_of([2, 0, 1])
    assert moved.fields["year"] == ["2001", "1999", ""] and moved.titles[1] == TOY.titles[0]


def test_a_list_longer_than_the_alphabet_is_refused_by_its_row(run):
    rows = [{"row_id": size, "candidates": list(range(size))} for size in (2, 27)]
    write_candidates(run / "candidates", {}, train=rows[:1], valid=rows[:1], test=rows)
    checks.check_lists(run / "candidates", PromptSettings(ranking="number", item_fields=["title"]))
    with pytest.raises(
        ValueError, match="test.parquet: row_id 27 has 27 candidates but ranking: letter names at most"
    ):
        checks.check_lists(run / "candidates", PromptSettings(ranking="letter", item_fields=["title"]))


def test_a_prompt_beyond_the_context_is_named_with_its_longest_field():
    long = Catalogue(["w", "x"], ["", ""], ["a", "b"], ["", ""], {"plot": ["the title of a drama " * 9, "drama"]})
    asked = prompter(long, tiny_tokenizer(), item_fields=["title", "plot"], request_fields=["query"])
    rows = [RankingRow(3, (), (1, 1), fields={"query": "b"}), RankingRow(4, (1,), (0, 1), fields={"query": "a"})]
    prompted = [asked.ask(row, 8) for row in rows]
    lengths = checks.prompt_lengths(asked.tokenizer, prompted)
    checks.check_context(asked, prompted, lengths, "the context", max(lengths) + 8, 8)
    checks.check_context(asked, prompted, lengths, "the context", None, 8)
    plot = sum(len(asked.tokenizer(asked.texts.item(item, "plot")).input_ids) for item in (1, 0, 1))
    message = (
        rf"1 of 2 prompts \(row_id 4\) have more than {max(lengths) - 1} tokens, the longest {max(lengths)}: the "
        rf"context is {max(lengths) + 7} and a completion takes up to 8 \(in row_id 4, of 2 candidates, item_fields: "
        rf"plot takes {plot}\); raise it, or set max_field_tokens"
    )
    with pytest.raises(ValueError, match=message):
        checks.check_context(asked, prompted, lengths, "the context", max(lengths) + 7, 8)


def test_an_item_field_is_read_and_cut_once():
    texts = FieldTexts(CATALOGUE, PromptSettings(ranking="number", item_fields=["brand"]))
    assert texts.item(1, "brand") is texts.item(1, "brand")
