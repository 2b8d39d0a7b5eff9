"""Constrained completions: the choices of every prefix are those of all rankings written out."""

import itertools
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quirks import that_prepends
from tiny_model import ID_TOKENS, tiny_tokenizer

from rerank import prompts
from rerank.models import base
from rerank.models.ranking_grammar import Choices, RankingGrammar

THINK, THINK_END, END = 90, 91, 92


def grammar(labels, wanted=None, max_trace=2):
    wanted = len(labels) if wanted is None else wanted
    return RankingGrammar(labels, labels, wanted, max_trace, THINK, THINK_END, END, [THINK, END])


def answers(labels, wanted):
    """All answers behind a trace, as tokens."""
    orders = itertools.permutations(labels, wanted)
    return {(*itertools.chain.from_iterable(order), END) for order in orders}


def after_trace(rules, tokens=()):
    choices = Choices(rules)
    for token in (THINK, THINK_END, *tokens):
        choices.push(token)
    return choices


LABELS = {
    "one token each": [[1], [2], [3], [4]],
    "numbers whose digits are tokens": [[1], [2], [1, 0], [1, 1], [1, 1, 1]],
    "ids that share prefixes": [[5, 6, 7], [5, 6, 8], [5, 9, 7], [6, 6, 7]],
    "two items of one id": [[5, 6], [5, 6], [5, 7]],
    "one whose tokens are another's twice": [[1], [1, 1], [2]],
    "one candidate": [[1, 2]],
}


@pytest.mark.parametrize("wanted", [1, 2, None])
@pytest.mark.parametrize("name", LABELS)
def test_the_choices_of_every_prefix_are_those_of_all_rankings(name, wanted):
    labels = LABELS[name]
    wanted = min(wanted or len(labels), len(labels))
    whole = answers(labels, wanted)
    for prefix in {answer[:length] for answer in whole for length in range(len(answer))}:
        expected = {answer[len(prefix)] for answer in whole if answer[: len(prefix)] == prefix}
        assert set(after_trace(grammar(labels, wanted), prefix).allowed()) == expected, prefix


@pytest.mark.parametrize("name", LABELS)
def test_behind_the_tags_of_a_prompt_only_labels_are_written(name):
    rules = replace(grammar(LABELS[name]), begun=True)
    for prefix in {answer[:length] for answer in answers(LABELS[name], len(LABELS[name])) for length in range(9)}:
        choices = Choices(rules)
        for token in prefix[: -1 if END in prefix else None]:
            choices.push(token)
        inside = after_trace(grammar(LABELS[name]), prefix[: -1 if END in prefix else None])
        assert set(choices.allowed()) == set(inside.allowed()) and choices.written == inside.written - 2


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=5),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_a_random_walk_is_one_of_all_rankings(labels, wanted, rng):
    wanted = min(wanted, len(labels))
    choices, found = after_trace(grammar(labels, wanted)), []
    while not found or found[-1] != END:
        found.append(rng.choice(choices.allowed()))
        choices.push(found[-1])
    assert tuple(found) in answers(labels, wanted)


def test_a_trace_is_free_but_opened_first_never_ended_and_of_limited_length():
    choices = Choices(grammar([[1], [2]], max_trace=2))
    assert choices.allowed() == [THINK]
    choices.push(THINK)
    for token in (7, THINK):
        assert choices.allowed() is None and choices.forbidden() == [THINK, END]
        if token == THINK:
            with pytest.raises(ValueError, match="token 90 may not follow the 2 tokens before it"):
                choices.push(token)
        choices.push(7)
    assert choices.allowed() == [THINK_END]  # of three tokens two are the trace
    choices.push(THINK_END)
    assert choices.allowed() == [1, 2]
    choices.push(2)
    with pytest.raises(ValueError, match="token 2 may not follow"):
        choices.push(2)
    assert choices.allowed() == [1]


@pytest.mark.parametrize(
    ("labels", "top_k"), [(["1", "2", "3"], 0), ([*"ABCD"], 2), (["<s_a_0><s_b_0>", "<s_a_0><s_b_1>"], 0)]
)
def test_text_of_constrained_tokens_is_a_ranking(labels, top_k):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([*ID_TOKENS, prompts.THINK, prompts.THINK_END])
    rules = RankingGrammar.of_labels(tokenizer, labels, top_k, max_tokens=40)
    rng, seen = random.Random(0), set()
    for _ in range(60):
        choices, found = Choices(RankingGrammar(**rules.as_options())), []
        while not found or found[-1] != tokenizer.eos_token_id:
            free = [token for token in range(20, 60) if token not in choices.forbidden()]
            found.append(rng.choice(choices.allowed() or free))
            choices.push(found[-1])
        assert len(found) <= 40
        parsed = prompts.parse_completion(prompts.completion_text(tokenizer, found), labels, top_k)
        assert parsed.failure is None
        seen.add(tuple(parsed.order[: top_k or None]))
    assert seen == set(itertools.permutations(range(len(labels)), top_k or len(labels)))


def test_too_small_a_limit_and_tags_of_several_tokens_are_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="<think> is [2-9] tokens to the model"):
        RankingGrammar.of_labels(tokenizer, ["1", "2"], 0, 100)
    tokenizer.add_tokens([prompts.THINK, prompts.THINK_END])
    with pytest.raises(ValueError, match=r"a ranking of 2 of 2 candidates takes up to \d+ tokens but a "):
        RankingGrammar.of_labels(tokenizer, ["1", "2"], 0, 4)
    needed = {}
    for begun in (False, True):
        with pytest.raises(ValueError, match="takes up to") as refused:
            RankingGrammar.of_labels(tokenizer, ["1", "2"], 0, 1, begun=begun)
        needed[begun] = int(re.search(r"up to (\d+)", str(refused.value))[1])
        RankingGrammar.of_labels(tokenizer, ["1", "2"], 0, needed[begun], begun=begun)
    assert needed[True] == needed[False] - 2  # the prompt has the tags


@pytest.mark.parametrize("ranking", ["number", "letter", "token", "semantic_id"])
@pytest.mark.parametrize("prepends", [False, True])
def test_what_a_model_is_trained_to_write_is_allowed(ranking, prepends):
    tokenizer = tiny_tokenizer()
    if prepends:  # a label is then written otherwise behind a tag than behind another label
        tokenizer = that_prepends(tokenizer)
    added = [*ID_TOKENS, prompts.THINK, prompts.THINK_END, *prompts.word_labels("token", 12)]
    base.extend_vocabulary(tokenizer, added)
    labels = {"semantic_id": [a + b for a in ID_TOKENS[:2] for b in ID_TOKENS[2:]]}
    labels = labels.get(ranking) or prompts.word_labels(ranking, 12)
    for top_k in (0, 3):
        rules = RankingGrammar.of_labels(tokenizer, labels, top_k, max_tokens=200)
        for seed in range(20):
            order = random.Random(seed).sample(range(len(labels)), len(labels))
            text = prompts.completion("so it is", order, labels, top_k)
            choices, tokens = Choices(rules), tokenizer(text, add_special_tokens=False).input_ids
            for token in tokens:
                choices.push(token)  # or it raises
            assert choices.written == len(tokens) and tokenizer.eos_token_id in choices.allowed()


def test_labels_that_a_tokenizer_merges_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([prompts.THINK, prompts.THINK_END, " 1 2"])
    with pytest.raises(ValueError, match="the labels ' 1', ' 2' are written with other tokens within a ranking"):
        RankingGrammar.of_labels(tokenizer, ["1", "2", "3"], 0, 100)


def test_special_tokens_and_further_ends_are_no_part_of_a_trace():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([prompts.THINK, prompts.THINK_END])
    rules = RankingGrammar.of_labels(tokenizer, ["1", "2"], 0, 100, ends=[42])
    assert {42, rules.end, rules.think, *tokenizer.convert_tokens_to_ids(["<|pad|>", "<|user|>"])} <= {
        *rules.not_in_trace
    }
    assert rules.think_end not in rules.not_in_trace
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        RankingGrammar.of_labels(tokenizer, ["1", "2"], 0, 100)
