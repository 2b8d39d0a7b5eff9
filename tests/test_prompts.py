import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rerank import baselines, prompts
from rerank.catalogue import Catalogue
from rerank.prompts import FAILURES, Parsed, PromptSettings, candidate_labels, completion, parse_completion
from rerank.rows import Prompter, RankingRow

LABELS = A, B, C = ["<s_a_1><s_b_2>", "<s_a_1><s_b_3>", "<s_a_12><s_b_3>"]
NUMBERS = [str(number) for number in range(1, 11)]
ROW = RankingRow(0, (3, 0), (1, 2), features=np.array([[1.0, 10.0, 0.25], [2.0, 0.0, 0.531]], dtype=np.float32))
SHOWN = ["direct_last", "cosine_last"]
FEATURE_NAMES = ["place", *SHOWN]
EDGES = {"direct_last": [1, 2, 3, 4, 5, 6, 7, 10, 20], "cosine_last": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}


CATALOGUE = Catalogue(
    ["w", "x", "y", "z"],
    [*LABELS, "<s_a_7><s_b_8>"],
    ["Dune", "Alien", "", "<think>\nHeat"],
    ["Sci-fi", "", "Drama", "Crime"],
)


def message(**shown):
    return Prompter(CATALOGUE, PromptSettings(**shown), FEATURE_NAMES, EDGES).message(ROW)


def test_a_full_prompt_shows_history_and_candidates_with_titles_and_categories():
    lines = message().split("\n")
    assert "re-ranker" in lines[0] and "2 candidates" in lines[0] and "write the ids" in lines[0]
    assert lines[1:] == [
        "History:",
        "<s_a_7><s_b_8> ‹think› Heat | Crime",  # one line, and no tag of ours from a title
        "<s_a_1><s_b_2> Dune | Sci-fi",
        "Candidates:",
        "<s_a_1><s_b_3> Alien",
        "<s_a_12><s_b_3> Drama",
    ]
    assert candidate_labels(ROW.candidates, CATALOGUE, PromptSettings()) == ["<s_a_1><s_b_3>", "<s_a_12><s_b_3>"]


def test_a_short_prompt_of_ids_and_codes_has_its_history_on_one_line():
    assert message(item_fields=["semantic_id"], evidence="codes", evidence_names=SHOWN, task="short") == (
        "Rank:\nHistory:<s_a_7><s_b_8><s_a_1><s_b_2>\nCandidates:\n"
        "<s_a_1><s_b_3> next:8 like:2\n"  # 10 has 8 of the edges at or below it, 0.25 has 2
        "<s_a_12><s_b_3> next:0 like:5"
    )


def test_evidence_in_words_gives_the_raw_values():
    assert message(evidence="words", evidence_names=SHOWN).endswith(
        "\n<s_a_1><s_b_3> Alien: chosen next by 10 others after the last item; similarity 0.25 to the last item"
        "\n<s_a_12><s_b_3> Drama: chosen next by 0 others after the last item; similarity 0.53 to the last item"
    )


def test_numbered_candidates_are_ranked_by_number():
    lines = message(ranking="number", item_fields=["semantic_id"], evidence="codes", evidence_names=SHOWN).split("\n")
    assert lines[1:] == [
        "History:<s_a_7><s_b_8><s_a_1><s_b_2>",
        "Candidates:",
        " 1.<s_a_1><s_b_3> next:8 like:2",
        " 2.<s_a_12><s_b_3> next:0 like:5",
    ]
    assert "write the numbers" in lines[0]
    assert candidate_labels(ROW.candidates, CATALOGUE, PromptSettings(ranking="number")) == ["1", "2"]


def test_candidates_stand_first_where_many_users_share_them():
    shown = {"layout": "candidates_first", "evidence": "codes", "evidence_names": SHOWN, "task": "short"}
    assert message(**shown, ranking="number", item_fields=["title"]).split("\n") == [
        "Rank:", "Candidates:", " 1. Alien", " 2. y", "History:", " ‹think› Heat", " Dune",
        "Facts:", " 1. next:8 like:2", " 2. next:0 like:5",
    ]  # fmt: skip
    assert message(**{**shown, "evidence": "words"}, item_fields=["semantic_id"]).split("\n") == [
        "Rank:", "Candidates:", "<s_a_1><s_b_3>", "<s_a_12><s_b_3>", "History:<s_a_7><s_b_8><s_a_1><s_b_2>", "Facts:",
        "<s_a_1><s_b_3> chosen next by 10 others after the last item; similarity 0.25 to the last item",
        "<s_a_12><s_b_3> chosen next by 0 others after the last item; similarity 0.53 to the last item",
    ]  # fmt: skip
    full = message(layout="candidates_first")
    assert "Below are 2 candidates and the items a user took, oldest first. Reorder the 2" in full
    assert "Facts:" not in full
    # whatever depends on the user stands behind the candidates
    prompter = Prompter(CATALOGUE, PromptSettings(**shown), FEATURE_NAMES, EDGES)
    other = replace(ROW, history=(3,), features=ROW.features + 1)
    head, of_user = prompter.message(ROW).split("\nHistory:")
    assert prompter.message(other).startswith(head + "\nHistory:") and prompter.message(other) != head + of_user


def test_only_the_latest_history_is_shown():
    assert "Dune" in message(max_history=1) and "Heat" not in message(max_history=1)


def test_knowledge_priming_is_one_sentence_that_can_be_left_out():
    assert "conditioner" in message(knowledge_priming=True) and "conditioner" not in message()


def test_every_fact_is_a_feature_and_has_a_short_word_of_its_own():
    assert set(prompts.FACTS) <= set(baselines.FEATURES)
    assert len({short for short, _ in prompts.FACTS.values()}) == len(prompts.FACTS)


def test_settings_come_back_as_saved(tmp_path):
    with pytest.raises(FileNotFoundError, match="prompt.json is missing"):
        PromptSettings.load(tmp_path)
    kept = PromptSettings(item_fields=["semantic_id"], evidence="codes", ranking="number", task="short")
    kept.save(tmp_path)
    assert PromptSettings.load(tmp_path) == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evidence": "code"}, "evidence is 'code' but must be one of none, codes, words"),
        ({"ranking": "ids"}, "ranking is 'ids' but must be one of"),
        ({"task": "long"}, "task is 'long' but must be one of"),
        ({"layout": "first"}, "layout is 'first' but must be one of history_first, candidates_first"),
        ({"item_fields": ["title"]}, "must hold semantic_id"),
        (
            {"item_fields": [], "ranking": "number"},
            "item_fields is empty and evidence is none, so that candidates have nothing but labels; name title",
        ),
        (
            {"item_fields": [], "ranking": "number", "evidence": "codes", "history_fields": ["time"]},
            "but item_fields is empty, so that no history is shown; name title",
        ),
        ({"item_fields": "semantic_id"}, "must be a list"),
        ({"evidence_names": ["lift", "lift"]}, "names each of its entries once"),
        ({"evidence_names": ["unit price"]}, "evidence_names holds 'unit price', but a fact is one word of letters"),
        (
            {"evidence_names": ["next", "direct_last"]},
            "'next' and 'direct_last', which prompts write with one word, next",
        ),
        ({"history_fields": ["age"]}, "a name in history_fields is 'age' but must be one of time, event"),
        ({"max_field_tokens": -1}, "max_field_tokens is -1 but must be at least 0"),
        ({"evidence": "words", "evidence_names": []}, "evidence_names is empty"),
        ({"max_history": 0}, "max_history is 0 but must be an integer of at least 1"),
        ({"max_history": 2.5}, "max_history is 2.5"),
    ],
)
def test_settings_refuse_what_they_do_not_know(options, message):
    with pytest.raises(ValueError, match=message):
        PromptSettings(**options)


def test_missing_facts_are_named():
    with pytest.raises(ValueError, match="evidence 'lift' has no feature or edges; run the candidates stage again"):
        message(evidence="codes", evidence_names=["lift"])


@pytest.mark.parametrize("labels", [LABELS, NUMBERS])
@pytest.mark.parametrize("trace", [None, "", "because <s_a_1><s_b_2>\nfits <think>"])
def test_a_completion_parses_to_its_order_and_trace(labels, trace):
    order = list(range(len(labels)))[::-1]
    assert parse_completion(completion(trace, order, labels), labels) == Parsed(order=order, trace=trace or "")


def test_a_trace_is_kept_with_a_failure_and_cannot_end_itself():
    assert parse_completion("<think>why</think>", LABELS) == Parsed(trace="why", failure="empty")
    with pytest.raises(ValueError, match="the trace holds </think>"):
        completion("a</think>b", [0, 1, 2], LABELS)


def test_a_parsed_order_is_the_callers_own():
    text = completion("why", [2, 0, 1], LABELS)
    parse_completion(text, LABELS).order.sort()
    assert parse_completion(text, LABELS).order == [2, 0, 1]


WHOLE_TEXTS = [
    (f" \n<think></think>\n{B} {A}\n{C} ", [1, 0, 2]),
    ("", "no_trace_end"),
    (A + B + C, "no_trace_end"),
    (f"<think>{A}{B}{C}", "no_trace_end"),
    (f"</think>{A}{B}{C}", "junk"),
    (f"x<think></think>{A}{B}{C}", "junk"),
]
ID_ANSWERS = [  # after the trace
    (f"{B}{A}{C}", [1, 0, 2]),
    (f"<s_a_1> <s_b_3>{A}{C}", [1, 0, 2]),  # decoding may put spaces between tokens
    ("", "empty"),
    (" \n", "empty"),
    (f"{A}{B}{C}</think>", "junk"),
    (f"</think>{A}{B}{C}", "junk"),
    (f"{A}{B}{C}.", "junk"),
    (f"{A},{B},{C}", "junk"),
    (f"{A}{B}{C}<|im_end|>", "junk"),
    (f"{A}{B}<s_a_12>", "junk"),
    (f"{A}<s_b_3>{B}<s_a_12>", "junk"),  # four whole tokens after A, levels out of order
    (f"{A}{B}<s_a_99><s_b_1>", "foreign_item"),
    (f"{A}{B}<s_a_012><s_b_3>", "foreign_item"),
    (f"{A}{A}{B}{C}<s_a_99><s_b_1>", "foreign_item"),
    (f"{A}{A}{B}", "duplicate"),
    (f"{A}{A}", "duplicate"),
    (f"{A}{B}", "too_few"),
    (f"{A}{B}{C}{A}", "too_many"),
]
NUMBER_ANSWERS = [
    ("3,1, 2", [2, 0, 1]),
    ("3 1\n2,", [2, 0, 1]),
    ("312", "foreign_item"),
    ("3,1,02", "foreign_item"),
    ("3,1,٢", "junk"),  # another script's digit
    ("[3,1,2]", "junk"),
    (",", "junk"),
    ("-1,2,3", "junk"),
    ("1,1,2", "duplicate"),
    ("1,2", "too_few"),
    ("1,2,3,1", "too_many"),
]


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        *((text, LABELS, expected) for text, expected in WHOLE_TEXTS),
        *((f"<think>t</think>{answer}", LABELS, expected) for answer, expected in ID_ANSWERS),
        *((f"<think>t</think>{answer}", NUMBERS[:3], expected) for answer, expected in NUMBER_ANSWERS),
    ],
)
def test_a_completion_is_the_ranking_it_states_or_the_first_failure(text, labels, expected):
    parsed = parse_completion(text, labels)
    assert (parsed.order or parsed.failure) == expected


@pytest.mark.parametrize(
    ("labels", "message"), [([], "at least one"), (["1", "1"], "distinct"), (["one", "two"], "neither a number nor")]
)
def test_labels_that_no_row_has_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        parse_completion("<think></think>1", labels)


def test_mentions_of_an_id_that_candidates_share_stand_for_them_in_the_order_shown():
    labels = [A, B, A, C]
    answers = {A + B + A + C: [0, 1, 2, 3], C + A + A + B: [3, 0, 2, 1], B + C + A + A: [1, 3, 0, 2]}
    answers |= {A + B + C: "too_few", A + A + A + C: "duplicate", A + B + A + C + A: "too_many"}
    for answer, expected in answers.items():
        parsed = parse_completion(f"<think></think>{answer}", labels)
        assert (parsed.order or parsed.failure) == expected
        assert completion("", parsed.order or [], labels) in ("<think></think>", f"<think></think>{answer}")


def assert_is_a_ranking_or_a_failure(text, labels):
    parsed = parse_completion(text, labels)
    assert (parsed.order is None) != (parsed.failure is None)
    assert parsed.failure is None or parsed.failure in FAILURES
    if parsed.order is not None:  # it says what the text says, nothing is repaired
        assert sorted(parsed.order) == list(range(len(labels)))
        answer = text.split("</think>", 1)[1]
        written = re.sub(r"\s" if labels is LABELS else r"[\s,]", "", answer)
        assert written == "".join(labels[position] for position in parsed.order)


PIECES = [*LABELS, "<s_a_1>", "<s_b_3>", "<s_a_99><s_b_1>", "<s_", "<think>", "</think>", "10", *" \n,1x"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)), st.booleans())
def test_any_text_is_a_ranking_or_a_named_failure(text, after_trace):
    for labels in (LABELS, NUMBERS):
        assert_is_a_ranking_or_a_failure(("<think></think>" if after_trace else "") + text, labels)


EDITS = st.lists(st.tuples(st.sampled_from("drs"), st.integers(0, 400), st.integers(0, 255)), max_size=4)


def mutate(text, edits):
    """Delete, replace or insert ("d", "r", "s") single bytes."""
    data = bytearray(text.encode())
    for kind, place, byte in edits:
        place %= len(data)
        data[place : place + (kind != "s")] = b"" if kind == "d" else bytes([byte])
    return data.decode("utf-8", errors="surrogateescape")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.permutations(range(3)), st.permutations(range(10)), st.text(max_size=8), EDITS)
def test_any_byte_level_change_of_a_completion_is_a_ranking_or_a_named_failure(order, numbers, trace, edits):
    for ranking, labels in ((order, LABELS), (numbers, NUMBERS)):
        text = "<think>" + trace + "</think>" + completion(None, ranking, labels).removeprefix("<think></think>")
        assert_is_a_ranking_or_a_failure(mutate(text, edits), labels)


def chat_tokenizer(template, adds_bos=False):
    words = Tokenizer(models.WordLevel({"<bos>": 0, "<unk>": 1, "hello": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_render_ends_where_the_completion_starts_and_leaves_out_a_bos_that_the_tokenizer_adds():
    assert prompts.render(chat_tokenizer(TEMPLATE), "hello") == "<bos>user: hello\nassistant: "
    tokenizer = chat_tokenizer(TEMPLATE, adds_bos=True)
    text = prompts.render(tokenizer, "hello")
    assert text == "user: hello\nassistant: "
    assert tokenizer(text).input_ids.count(0) == 1


def test_render_refuses_a_tokenizer_without_a_template():
    with pytest.raises(ValueError, match="has no chat template"):
        prompts.render(chat_tokenizer(None), "hello")
