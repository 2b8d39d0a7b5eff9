"""What an engine saves where it computes fewer tokens, over what their number alone would save, for `serving`.

Tokens are those that the model computes: of prompts, where no other prompt has computed them, and of answers. Each
figure is the median of rounds in which the two sides alternate; the engine's cache is empty before each.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from rerank.models import engine as vllm_engine
from rerank.models import one_token
from rerank.models.ranker import Batch, RankingModel, ask, grammars_of
from rerank.prompts import prompt_ids
from rerank.rank.encoder import ReadyRow, RowEncoder
from rerank.rows import RankingRow

SLATES, USERS = 4, 32  # lists, and users that each is ranked for

Run = tuple[float, int]  # seconds, and tokens that were computed


def shared_by_users(encoder: RowEncoder, records: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
    """The tokens of prompts that rank one list for many users, list by list."""
    slates = [one["candidates"] for one in records[:SLATES]]
    asked = [[{**user, "candidates": slate} for user in records[:USERS]] for slate in slates]
    return [[one.tokens for one in encoder.prepare(rows) if isinstance(one, ReadyRow)] for rows in asked]


def computed_once(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of the prompts that remain where each beginning that some share is computed once."""
    ordered, number = sorted(map(list, prompts)), 0
    for before, prompt in zip([[], *ordered], ordered, strict=False):
        pairs = zip(before, prompt, strict=False)
        number += len(prompt) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return number


def share(slow: Callable[[], Run], fast: Callable[[], Run], repeats: int) -> float:
    """How many times faster one is than the other, over how many times fewer tokens it computes."""
    found = []
    for _ in range(repeats + 1):
        (seconds, tokens), (less, fewer) = slow(), fast()
        found.append(seconds / less / (tokens / fewer))
    return round(statistics.median(found[1:]), 4)


def shares(
    model_dir: Path, rows: Sequence[RankingRow], records: Sequence[dict[str, Any]], repeats: int
) -> dict[str, float | None]:
    """The figures of a model; None for one that it cannot have.

    Args:
        model_dir: Of the sft or dapo stage.
        rows: That it ranks.
        records: The same rows as `rerank rank` reads them.
        repeats: Rounds.
    """
    from vllm import TokensPrompt

    model = RankingModel.load(model_dir)
    encoder, tokenizer = RowEncoder(model, model.load_counts()), model.load_tokenizer()
    slates = shared_by_users(encoder, records)
    asked = {bypass: ask(model, Batch(rows, bypass_reasoning=bypass), tokenizer) for bypass in (False, True)}
    tokens = {bypass: prompt_ids(tokenizer, [row.prompt for row in of]) for bypass, of in asked.items()}
    longest = max(len(ids) for of in [*tokens.values(), *slates] for ids in of)
    engine = vllm_engine.open_engine(
        model_dir, longest + max(model.max_completion_tokens, one_token.ANSWER_TOKENS), constrained=True
    )

    def run(prompts: Sequence[list[int]], params: Sequence[Any], apart: bool = False) -> Run:
        salts = [{"cache_salt": str(number)} if apart else {} for number in range(len(prompts))]
        words = [TokensPrompt(prompt_token_ids=ids, **salt) for ids, salt in zip(prompts, salts, strict=True)]
        engine.reset_prefix_cache()
        began = time.perf_counter()
        outputs = engine.generate(words, list(params), use_tqdm=False)
        seconds = time.perf_counter() - began
        return seconds, sum(map(len, prompts)) + sum(len(one.outputs[0].token_ids) for one in outputs)

    def written(bypass: bool) -> Run:
        rules, limit = grammars_of(model, asked[bypass], tokenizer), model.max_completion_tokens
        return run(tokens[bypass], [vllm_engine.sampling_params(limit, grammar) for grammar in rules], apart=True)

    def ranked_by_one_token() -> Run:
        prompts = [one_token.prompt_tokens(tokenizer, ids) for ids in tokens[False]]
        labels = one_token.tokens_of(asked[False], tokenizer)
        params = [vllm_engine.sampling_params(1, logprob_token_ids=of_row) for of_row in labels]
        return run(prompts, params, apart=True)

    found: dict[str, float | None] = dict.fromkeys(("no_think_share", "one_token_share"))
    if model.has_trace and not model.prompter.bypass_reasoning:
        found["no_think_share"] = share(lambda: written(False), lambda: written(True), repeats)
    try:
        one_token.tokens_of(asked[False], tokenizer)
    except ValueError:
        pass
    else:
        if not model.one_token:
            found["one_token_share"] = share(lambda: written(False), ranked_by_one_token, repeats)
    prompts = [ids for of_slate in slates for ids in of_slate]
    first, once = [vllm_engine.sampling_params(1)] * len(prompts), computed_once(prompts) + len(prompts)

    def shared() -> Run:
        return run(prompts, first)[0], once

    found["prefix_share_of_limit"] = share(lambda: run(prompts, first, apart=True), shared, repeats)
    engine.llm_engine.engine_core.shutdown()
    return found | {"prefix_limit": round((sum(map(len, prompts)) + len(prompts)) / once, 2)}
