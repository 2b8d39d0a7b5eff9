"""The tokens that may come next where a completion is to be a ranking.

A completion is `<think>`, a trace, `</think>`, then labels of the row's candidates, each once, then the end token. The
trace is free but for its length. Labels may be several tokens, and the tokens of one may begin those of another (" 1",
" 10"): every reading of what is written is followed until one is left.

Letters of shapes: N candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rerank.prompts import THINK, THINK_END, spaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RankingGrammar:
    """The rules of one row's completions; a mapping of plain values, so that it travels to an engine.

    Attributes:
        labels: Tokens of each label as it stands in a running text, (N,) of any lengths; equal ones may repeat.
        wanted: Labels to write.
        max_trace: Tokens of a trace at most.
        think: The opening tag.
        think_end: The closing tag.
        end: The token that ends a completion.
    """

    labels: list[list[int]]
    wanted: int
    max_trace: int
    think: int
    think_end: int
    end: int

    @classmethod
    def of_labels(
        cls, tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str], top_k: int, max_tokens: int
    ) -> "RankingGrammar":
        """Of a row.

        Args:
            tokenizer: Of the model.
            labels: As of `prompts.candidate_labels`.
            top_k: Labels to write; 0 for all.
            max_tokens: Of a completion. What the longest ranking leaves of it is for the trace.

        Raises:
            ValueError: Where a tag is not one token, or `max_tokens` too few for a ranking without a trace.
        """
        tags = tokenizer([THINK, THINK_END], add_special_tokens=False).input_ids
        for name, ids in zip((THINK, THINK_END), tags, strict=True):
            if len(ids) != 1:
                raise ValueError(f"{name} is {len(ids)} tokens to the model, so that it cannot be constrained")
        tokens: list[list[int]] = tokenizer([*map(spaced, labels)], add_special_tokens=False).input_ids
        wanted = min(top_k or len(labels), len(labels))
        needed = 3 + sum(sorted(map(len, tokens))[-wanted:])  # two tags, the longest labels, the end
        if needed > max_tokens:
            raise ValueError(
                f"a ranking of {wanted} of {len(labels)} candidates takes up to {needed} tokens but a completion has "
                f"{max_tokens}; raise the limit, or lower top_k"
            )
        return cls(tokens, wanted, max_tokens - needed, tags[0][0], tags[1][0], int(tokenizer.eos_token_id or 0))

    def as_options(self) -> dict[str, Any]:
        """Plain values, from which `RankingGrammar(**values)` makes it again."""
        return dict(vars(self))


class _Reading(NamedTuple):
    """One way to read the labels that are written: those left of each kind, and the place within the next one."""

    left: tuple[int, ...]
    node: int


@dataclass
class Choices:
    """The choices in one completion, token by token.

    Attributes:
        grammar: Its rules.
        written: Tokens so far.
    """

    grammar: RankingGrammar
    written: int = 0
    _in_trace: bool = True
    _children: list[dict[int, int]] = field(default_factory=lambda: [{}])  # of each node of the labels' prefix tree
    _kinds: list[list[int]] = field(default_factory=lambda: [[]])  # labels at a node or below it, by kind
    _ends: dict[int, int] = field(default_factory=dict)  # node to the kind that ends there
    _readings: set[_Reading] = field(default_factory=set)

    def __post_init__(self) -> None:
        counts: list[int] = []
        for label in self.grammar.labels:
            node, path = 0, [0]
            for token in label:
                node = self._children[node].setdefault(token, len(self._children))
                if node == len(self._children):
                    self._children.append({})
                    self._kinds.append([])
                path.append(node)
            if node not in self._ends:
                self._ends[node] = len(counts)
                counts.append(0)
                for place in path:
                    self._kinds[place].append(self._ends[node])
            counts[self._ends[node]] += 1
        self._readings = {_Reading(tuple(counts), 0)}

    def allowed(self) -> list[int] | None:
        """Tokens of which the next must be one, in no order; None within a trace, where all but `forbidden` may be."""
        grammar = self.grammar
        if self.written == 0:
            return [grammar.think]
        if self._in_trace:
            return [grammar.think_end] if self.written > grammar.max_trace else None
        return sorted({token for reading in self._readings for token in self._next(reading)})

    def forbidden(self) -> list[int]:
        """Tokens that a trace may not hold."""
        return [self.grammar.think, self.grammar.end]

    def push(self, token: int) -> None:
        """Take the next token.

        Raises:
            ValueError: When it is not allowed; the choices are then what they were.
        """
        allowed = self.allowed()
        if token in self.forbidden() if allowed is None else token not in allowed:
            raise ValueError(f"token {token} may not follow the {self.written} tokens before it")
        self.written += 1
        if self.written == 1:
            return
        if self._in_trace:
            self._in_trace = token != self.grammar.think_end
        elif token != self.grammar.end:
            moved = [
                _Reading(reading.left, self._children[reading.node][token])
                for reading in self._readings
                if token in self._next(reading)
            ]
            self._readings = {found for reading in moved for found in self._with_end(reading)}

    def _num_left(self, reading: _Reading) -> int:
        return self.grammar.wanted - (len(self.grammar.labels) - sum(reading.left))

    def _next(self, reading: _Reading) -> Iterator[int]:
        """Tokens that continue a label of which one is left, or begin one."""
        if reading.node == 0 and not self._num_left(reading):
            yield self.grammar.end
            return
        for token, child in self._children[reading.node].items():
            if any(reading.left[kind] for kind in self._kinds[child]):
                yield token

    def _with_end(self, reading: _Reading) -> Iterator[_Reading]:
        """The reading where a longer label continues, and that where one ends here."""
        if self._children[reading.node]:
            yield reading
        kind = self._ends.get(reading.node)
        if kind is not None and reading.left[kind]:
            left = list(reading.left)
            left[kind] -= 1
            yield _Reading(tuple(left), 0)
