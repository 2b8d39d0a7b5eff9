"""Rows, prompts and rewards for tests of the dapo stage, whose completions a script writes in place of an engine."""

import functools

import numpy as np

from rerank import scoring
from rerank.catalogue import Catalogue
from rerank.dapo.groups import Completion
from rerank.dapo.prompt_stream import PromptStream
from rerank.dapo.sampler import GroupSampler, SamplingOptions
from rerank.prompts import PromptSettings
from rerank.rows import Prompter, RankingRow

SIZE = 4  # completions of a prompt
LIMIT = 16  # tokens of a completion
ITEMS = range(160)
CATALOGUE = Catalogue(
    [f"m{i}" for i in ITEMS], [f"<s_a_{i}>" for i in ITEMS], [f"Title {i}" for i in ITEMS], ["drama" for _ in ITEMS]
)
SETTINGS = PromptSettings(item_fields=["semantic_id"], task="short")


def rows(count=5):
    """Rows of four candidates, the third of which is the target."""
    relevance = (0.0, 0.0, 1.0, 0.0)
    return [RankingRow(10 + i, (1,), tuple(range(4 * i, 4 * i + 4)), relevance, user=i) for i in range(count)]


def stream(count=5, seed=0, tokenizer=None):
    """Their prompts."""
    return PromptStream(rows(count), Prompter(CATALOGUE, SETTINGS, tokenizer=tokenizer), seed, LIMIT)


def row_ids(prompts):
    return [prompt.asked.row.row_id for prompt in prompts]


def first_drawn(count, number):
    """The first rows of a stream."""
    return row_ids(stream(count).take(0, number))


def num_tokens(completions, completion_ids, **columns):
    """The length of a completion: what groups of the scripts differ in."""
    return [float(len(ids)) for ids in completion_ids]


def evenness(completions, completion_ids, **columns):
    """The share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


ENTRIES = [{"name": f"{__file__}:num_tokens"}, {"name": f"{__file__}:evenness"}]  # as in a recipe
REWARDS = scoring.load_rewards(ENTRIES)


def random_tokens(seed, length, eos):
    """Tokens that end with `eos`, unless the limit cuts them off."""
    made = np.random.default_rng(seed).integers(10, 40, length - 1).tolist()
    return [*made, eos if length < LIMIT else 10]


def unequal(prompt, member):
    """A script: completions of unequal length."""
    return 3 + member


def useful_for(row_ids):
    """A script: completions of unequal length for these rows, of equal length for others."""
    return lambda prompt, member: 3 + member if prompt.asked.row.row_id in row_ids else 5


def sampler(lengths=unequal, count=8, rounds=1, rewards=REWARDS, text="junk", outcome="num_tokens", **options):
    """A sampler from a policy of one text whose completions have scripted numbers of tokens."""

    def generate(prompts):
        numbers = [lengths(prompt, place % SIZE) for place, prompt in enumerate(prompts)]
        return [Completion([1], [7] * number, text, None, number >= LIMIT) for number in numbers]

    chosen = SamplingOptions(SIZE, outcome, max(1, rounds), is_dynamic=rounds > 0, **options)
    return GroupSampler(generate, functools.partial(scoring.score, rewards), stream(count), chosen)
