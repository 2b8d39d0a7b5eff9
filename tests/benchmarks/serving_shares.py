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

FIGURES = ("no_think_share", "one_token_share", "prefix_share_of_limit", "prefix_limit")
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


class Asked:
    """Rows of a model, asked in several ways by one engine."""

    def __init__(self, model_dir: Path, rows: Sequence[RankingRow], records: Sequence[dict[str, Any]]) -> None:
        """Start the engine.

        Args:
            model_dir: Of the sft or dapo stage.
            rows: That it ranks.
            records: The same rows as `rerank rank` reads them.
        """
        self.model = RankingModel.load(model_dir)
        self.tokenizer = self.model.load_tokenizer()
        slates = shared_by_users(RowEncoder(self.model, self.model.load_counts()), records)
        self.of_slates = [ids for of_slate in slates for ids in of_slate]
        self.rows = {
            bypass: ask(self.model, Batch(rows, bypass_reasoning=bypass), self.tokenizer) for bypass in (False, True)
        }
        self.tokens = {
            bypass: prompt_ids(self.tokenizer, [row.prompt for row in of]) for bypass, of in self.rows.items()
        }
        longest = max(map(len, [*self.tokens[False], *self.tokens[True], *self.of_slates]))
        room = max(self.model.max_completion_tokens, one_token.ANSWER_TOKENS)
        self.engine = vllm_engine.open_engine(model_dir, longest + room, constrained=True)

    def _run(self, prompts: Sequence[list[int]], params: Sequence[Any], apart: bool = True) -> Run:
        """Answer prompts by an empty cache, which with `apart` no two of them share."""
        from vllm import TokensPrompt

        salts = [{"cache_salt": str(number)} if apart else {} for number in range(len(prompts))]
        words = [TokensPrompt(prompt_token_ids=ids, **salt) for ids, salt in zip(prompts, salts, strict=True)]
        self.engine.reset_prefix_cache()
        began = time.perf_counter()
        outputs = self.engine.generate(words, list(params), use_tqdm=False)
        seconds = time.perf_counter() - began
        return seconds, sum(map(len, prompts)) + sum(len(one.outputs[0].token_ids) for one in outputs)

    def written(self, bypass: bool) -> Run:
        """Written rankings, with their reasoning or without."""
        rules, limit = grammars_of(self.model, self.rows[bypass], self.tokenizer), self.model.max_completion_tokens
        return self._run(self.tokens[bypass], [vllm_engine.sampling_params(limit, grammar) for grammar in rules])

    def labels(self) -> list[list[int]] | None:
        """The tokens of the labels of each row; None where one is not a single token."""
        try:
            return one_token.tokens_of(self.rows[False], self.tokenizer)
        except ValueError:
            return None

    def by_one_token(self, labels: Sequence[list[int]]) -> Run:
        """Rankings of one token."""
        prompts = [one_token.prompt_tokens(self.tokenizer, ids) for ids in self.tokens[False]]
        return self._run(prompts, [vllm_engine.sampling_params(1, logprob_token_ids=of_row) for of_row in labels])

    def of_users(self, shared: bool) -> Run:
        """The prompts of lists that many users share, each computed apart or what is shared once."""
        seconds, tokens = self._run(self.of_slates, [vllm_engine.sampling_params(1)] * len(self.of_slates), not shared)
        return seconds, computed_once(self.of_slates) + len(self.of_slates) if shared else tokens


def shares(
    model_dir: Path, rows: Sequence[RankingRow], records: Sequence[dict[str, Any]], repeats: int
) -> dict[str, float | None]:
    """The figures of a model, None for one that it cannot have; arguments as of `Asked`, and the number of rounds."""
    asked = Asked(model_dir, rows, records)
    model, labels = asked.model, asked.labels()
    found: dict[str, float | None] = dict.fromkeys(FIGURES)
    if model.has_trace and not model.prompter.bypass_reasoning:
        found["no_think_share"] = share(lambda: asked.written(False), lambda: asked.written(True), repeats)
    if labels is not None and not model.one_token:
        found["one_token_share"] = share(lambda: asked.written(False), lambda: asked.by_one_token(labels), repeats)
    if model.prompter.settings.layout == "candidates_first":
        found["prefix_share_of_limit"] = share(lambda: asked.of_users(False), lambda: asked.of_users(True), repeats)
        found["prefix_limit"] = round(asked.of_users(False)[1] / asked.of_users(True)[1], 2)
    asked.engine.llm_engine.engine_core.shutdown()
    return found
