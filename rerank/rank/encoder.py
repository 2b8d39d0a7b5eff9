"""Rows as an engine is asked about them, in batches: items and facts, prompts and their tokens, rules of the answers.

`rerank rank` and `rerank serve` call the same functions.
"""

from collections import ChainMap
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from rerank.baselines import Counts, list_features
from rerank.catalogue import check_vocabulary
from rerank.models.configs import context_length, read_config
from rerank.models.one_token import prompt_tokens, tokens_of
from rerank.models.ranker import RankingModel, grammars_of
from rerank.models.ranking_grammar import RankingGrammar
from rerank.prompts import prompt_ids
from rerank.rank.files import Record, Unreadable
from rerank.rank.items import NewItems, extended
from rerank.rank.rows import Encoded, EncodedRow, SettledRow, encode_row, shown_columns
from rerank.rows import PromptedRow, Prompter
from rerank.rows.checks import most_labels
from rerank.rows.histories import COLUMN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024  # rows whose prompts are held at a time
MOST_RULES = 256  # kept for lists with the same labels

Rules = RankingGrammar | list[int]  # of a written answer, or (N,) the tokens of the labels where one token ranks


@dataclass(frozen=True)
class ReadyRow:
    """A row as an engine is asked about it.

    Attributes:
        encoded: With facts about its candidates.
        asked: With its prompt and its labels.
        tokens: Of the prompt, where one token ranks with the tags of an empty trace behind it.
        rules: Of its answer.
    """

    encoded: EncodedRow
    asked: PromptedRow
    tokens: list[int]
    rules: Rules


Prepared = ReadyRow | SettledRow | str  # or why it cannot be ranked


@dataclass
class RowEncoder:
    """Makes rows ready for a model, with what it needs for that read once.

    Attributes:
        model: That will rank them.
        counts: Facts about its items, where its prompts show any.
        unknown: `last`, `drop` or `refuse`: what becomes of candidates that the model does not know.
        one_token: Whether the first label's probabilities will rank them.
        context: Tokens of a prompt and its answer; None for no limit.
    """

    model: RankingModel
    counts: Counts | None
    unknown: str = "last"
    one_token: bool = False
    context: int | None = None
    items: MutableMapping[str, int] = field(default_factory=dict, repr=False)  # numbers of items by their ids
    _rules: dict[tuple[tuple[str, ...], int], Rules | str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.one_token = self.one_token or self.model.one_token
        self.context = self.context or context_length(read_config(self.model.folder))
        if not self.items:
            self.items = {item_id: item for item, item_id in enumerate(self.model.prompter.catalogue.item_ids)}

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Of the model."""
        return self.model.load_tokenizer()

    @cached_property
    def prompter(self) -> Prompter:
        """Of the model, with its tokenizer; it keeps the texts of items that it has written."""
        return replace(self.model.prompter, tokenizer=self.tokenizer)

    def with_items(self, new: NewItems, source: str) -> "RowEncoder":
        """The same with new items; `source` says in messages where they come from.

        Raises:
            ValueError: When their numbers are none, or they have semantic ids that the model does not know.
        """
        model, counts = extended(self.model, self.counts, new, source)
        numbers = {item_id: len(self.items) + place for place, item_id in enumerate(new.catalogue.item_ids)}
        bigger = replace(self, model=model, counts=counts, items=ChainMap(numbers, self.items))
        if model.prompter.settings.shows_ids:
            check_vocabulary(self.tokenizer, new.catalogue.semantic_ids, model.folder)
        vars(bigger)["tokenizer"] = self.tokenizer
        return bigger

    def with_top_k(self, ready: ReadyRow, top_k: int) -> ReadyRow:
        """The same row, of which a written answer names the best `top_k` at most; its prompt stays as trained."""
        asked = replace(ready.asked, top_k=min(top_k, ready.asked.top_k or top_k))
        rules = ready.rules if self.one_token else self.rules(asked)
        assert not isinstance(rules, str), "fewer labels fit where more did"
        return replace(ready, asked=asked, rules=rules)

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Rows, numbered from 1, each as far as it can be ranked.

        Args:
            records: With `history` and `candidates` as lists.
        """
        starts = range(0, len(records), CHUNK)
        found = [one for start in starts for one in self.prepare(records[start : start + CHUNK], start + 1)]
        return [one.encoded if isinstance(one, ReadyRow) else one for one in found]

    def prepare(self, records: Sequence[Record], first: int = 1) -> list[Prepared]:
        """The same rows with their prompts and the rules of their answers, numbered from `first`."""
        shown, encoded = shown_columns(self.model), list[Encoded]()
        for number, record in enumerate(records, start=first):
            if isinstance(record, Unreadable):
                encoded.append(record.problem)
                continue
            try:
                settings = self.model.prompter.settings
                encoded.append(encode_row(record, number, self.items, shown, settings, self.unknown, self.most_labels))
            except ValueError as error:
                encoded.append(str(error))
        rows = [one for one in encoded if isinstance(one, EncodedRow)]
        ready = iter(self._ready(self._with_features(rows)) if rows else [])
        return [next(ready) if isinstance(one, EncodedRow) else one for one in encoded]

    @cached_property
    def most_labels(self) -> int | None:
        """Candidates that the model has labels for; None for no limit."""
        return most_labels(self.model.prompter.settings.ranking, self.tokenizer)

    def _with_features(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """The rows with facts about each candidate: from the counts, and from columns of the file."""
        if self.counts is None:
            return list(rows)
        names = self.model.prompter.names

        def of_file(column: str) -> list[np.ndarray]:
            """Zeros for a column that no prompt shows."""
            return [one.numbers.get(column, np.zeros(len(one.ids))) for one in rows]

        columns = {name: of_file(name.removeprefix(COLUMN)) for name in names if name.startswith(COLUMN)}
        histories = [np.array(one.row.history, dtype=np.int64) for one in rows]
        candidates = [np.array(one.row.candidates) for one in rows]
        facts = list_features(names, self.counts, histories, candidates, of_file("scores"), None, columns)
        return [replace(one, row=replace(one.row, features=found)) for one, found in zip(rows, facts, strict=True)]

    def _ready(self, rows: Sequence[EncodedRow]) -> Iterator[ReadyRow | str]:
        """The rows, but for those that are too long, or whose answers cannot be made rankings."""
        asked = [self.prompter.ask(one.row, self.model.max_completion_tokens) for one in rows]
        tokens = prompt_ids(self.tokenizer, [row.prompt for row in asked])
        room = None if self.context is None else self.context - self.model.max_completion_tokens
        for one, row, ids in zip(rows, asked, tokens, strict=True):
            rules = self.rules(row)
            if isinstance(rules, str):
                yield rules
            elif room is not None and len(ids) > room:
                yield (
                    f"its prompt has {len(ids)} tokens but the model's context leaves {room}; give shorter lists or "
                    "texts."
                )
            else:
                yield ReadyRow(one, row, prompt_tokens(self.tokenizer, ids) if self.one_token else ids, rules)

    def rules(self, row: PromptedRow) -> Rules | str:
        """The rules of a row's answer, or why it cannot be made a ranking; rows of the same labels share them."""
        key = tuple(row.labels), row.top_k
        if key not in self._rules:
            if len(self._rules) >= MOST_RULES:
                self._rules.clear()
            try:
                (self._rules[key],) = (
                    tokens_of([row], self.tokenizer)
                    if self.one_token
                    else grammars_of(self.model, [row], self.tokenizer)
                )
            except ValueError as error:
                self._rules[key] = str(error).removeprefix(f"row {row.row.row_id}: ")
        return self._rules[key]


def encode_rows(
    records: Sequence[Record], model: RankingModel, counts: Counts | None, unknown: str, one_token: bool = False
) -> list[Encoded]:
    """`RowEncoder.encode` of rows of a file, with its attributes."""
    return RowEncoder(model, counts, unknown, one_token).encode(records)
