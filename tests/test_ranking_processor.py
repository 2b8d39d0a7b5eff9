"""The engine's part of constrained rankings: batches that change, free requests beside others, and a real engine."""

import os
import random
from unittest.mock import patch

import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from rerank.launch import recipe
from rerank.models import engine as vllm_engine
from rerank.models.ranking_grammar import Choices, RankingGrammar
from rerank.models.ranking_processor import RankingProcessor
from rerank.prompts import parse_completion

THINK, THINK_END, END, VOCABULARY = 20, 21, 22, 30
LABELS = [[1], [2], [1, 0]]
GRAMMAR = RankingGrammar(LABELS, LABELS, 3, 2, THINK, THINK_END, END, [THINK, END])


def params(grammar=GRAMMAR):
    return SamplingParams(extra_args=None if grammar is None else {vllm_engine.GRAMMAR: grammar.as_options()})


def processor():
    return RankingProcessor(None, torch.device("cpu"), False)


def update(made, size, added=(), removed=(), moved=()):
    made.update_state(BatchUpdate(batch_size=size, removed=list(removed), added=list(added), moved=list(moved)))


def finite(made, size):
    """The tokens of each request that may come next."""
    logits = made.apply(torch.zeros(size, VOCABULARY))
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_each_request_of_a_batch_has_choices_of_its_own_and_free_ones_have_all():
    made, outputs = processor(), [[], [5], [THINK], [THINK, THINK_END, 1]]
    added = [(row, params(None if row == 1 else GRAMMAR), None, output) for row, output in enumerate(outputs)]
    update(made, 4, added)
    everything = list(range(VOCABULARY))
    free = [token for token in everything if token not in (THINK, END)]
    assert finite(made, 4) == [[THINK], everything, free, [0, 1, 2]]
    outputs[3] += [0, 2]
    assert finite(made, 4)[3] == [1]


def test_requests_move_leave_and_come_back_with_what_they_have_written():
    made, first, second = processor(), [THINK], [THINK, THINK_END]
    update(made, 2, [(0, params(), None, first), (1, params(), None, second)])
    update(made, 2, moved=[(0, 1, MoveDirectionality.SWAP)])
    assert finite(made, 2)[0] == [1, 2]
    update(made, 1, removed=[1])
    second.append(2)
    assert finite(made, 1) == [[1]]
    update(made, 2, [(1, params(), None, [THINK, THINK_END, 2, 1])])  # preempted before, and read anew
    assert finite(made, 2)[1] == [0, 1]


def test_a_million_random_steps_are_those_of_the_grammar():
    rng, steps = random.Random(0), 0
    while steps < 1_000_000:
        labels = [[rng.randrange(3) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(1, 12))]
        wanted = rng.randint(1, len(labels))
        choices, written = Choices(RankingGrammar(labels, labels, wanted, 3, THINK, THINK_END, END, [THINK, END])), []
        while not written or written[-1] != END:
            allowed = choices.allowed()
            assert allowed is None or allowed
            written.append(rng.choice(allowed or [5, THINK_END]))
            choices.push(written[-1])
        steps += len(written)
        assert len(written) <= 6 + sum(sorted(map(len, labels))[-wanted:])


MANY = pytest.param(100_000, 32, 1.5, marks=pytest.mark.matrix)


@pytest.mark.parametrize(("number", "limit", "temperature"), [(60, 120, 0.0), (60, 120, 1.5), MANY])
def test_an_engine_with_random_weights_writes_rankings_alone_where_it_is_told_to(tmp_path, number, limit, temperature):
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng, labels, grammars, made = random.Random(1), [], [], {}
    for place in range(number):
        size = rng.choice([2, 7, 24])
        key = size, 3 if size == 24 and limit < 120 else rng.choice([0, 3])
        labels.append([str(label) for label in range(1, size + 1)])
        if key not in made:
            made[key] = RankingGrammar.of_labels(tokenizer, labels[-1], key[1], limit)
        grammars.append(None if place % 4 == 0 and number == 60 else made[key])
    prompts = ["Rank: History: Candidates:"] * number
    with patch.dict(os.environ, {**recipe.ENVIRONMENT, "OMP_NUM_THREADS": "1"}):
        engine = vllm_engine.open_engine(folder, 200, constrained=True)
        seeds = range(3, 3 + number)
        found = vllm_engine.generate(engine, prompts, limit, temperature=temperature, seeds=seeds, grammars=grammars)
        assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"  # it takes no such processor
    for (completion,), of_row, rules in zip(found, labels, grammars, strict=True):
        failure = parse_completion(completion.text, of_row, 0 if rules is None else rules.wanted).failure
        assert (failure is None) == (rules is not None)
    engine.llm_engine.engine_core.shutdown()
