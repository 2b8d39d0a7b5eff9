"""The tokens that may come next where a completion is to be a ranking.

A completion is `<think>`, a trace, `</think>`, then labels of the row's candidates, each once, then the end token. The
trace is free but for its length and special tokens. Labels may be several tokens, and the tokens of one may begin
those of another (" 1", " 10"): every reading of what is written is followed until one is left. Where the prompt ends
in the tags of an empty trace, the labels are all that is written.

Letters of shapes: N candidates.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rerank.prompts import THINK, THINK_END, completion, spaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RankingGrammar:
    """The rules of one row's completions; a mapping of plain values, so that it travels to an engine.

    Attributes:
        labels: Tokens of each label as it stands behind another one, (N,) of any lengths; equal ones may repeat.
        first: Tokens of each as it stands behind `</think>`, which some tokenizers write otherwise.
        wanted: Labels to write.
        max_trace: Tokens of a trace at most.
        think: The opening tag.
        think_end: The closing tag.
        end: The token that ends a completion.
        not_in_trace: Tokens that a trace may not hold.
        begun: Whether the prompt ends in the tags of an empty trace.
    """

    labels: list[list[int]]
    first: list[list[int]]
    wanted: int
    max_trace: int
    think: int
    think_end: int
    end: int
    not_in_trace: list[int]
    begun: bool = False

    @classmethod
    def of_labels(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        labels: Sequence[str],
        top_k: int,
        max_tokens: int,
        ends: Collection[int] = (),
        begun: bool = False,
    ) -> "RankingGrammar":
        """Of a row.

        Args:
            tokenizer: Of the model.
            labels: As of `prompts.candidate_labels`.
            top_k: Labels to write; 0 for all.
            max_tokens: Of a completion. What the longest ranking leaves of it is for the trace.
            ends: Further tokens at which the engine ends a completion.
            begun: Whether the prompt ends in the tags of an empty trace.

        Raises:
            ValueError: Where a tag is not one token, the labels of a ranking are not written one after the other, or
                `max_tokens` is too few for a ranking without a trace.
        """
        think, think_end = (_tag(tokenizer, tag) for tag in (THINK, THINK_END))
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, so that no completion would end; name one in its folder")
        first, later = _tokens(tokenizer, labels)
        wanted = min(top_k or len(labels), len(labels))
        lengths = [max(map(len, both)) for both in zip(first, later, strict=True)]
        tags = 0 if begun else 2
        needed = tags + sum(sorted(lengths)[-wanted:]) + 1  # the tags, the longest labels, the end
        if needed > max_tokens:
            raise ValueError(
                f"a ranking of {wanted} of {len(labels)} candidates takes up to {needed} tokens but a completion has "
                f"{max_tokens}; give a shorter list, or train a model with a smaller top_k or longer completions"
            )
        special = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
        end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]  # of one token, a number
        never = sorted({think, end, *special, *ends} - {think_end})
        return cls(later, first, wanted, max_tokens - needed, think, think_end, end, never, begun)

    def as_options(self) -> dict[str, Any]:
        """Plain values, from which `RankingGrammar(**values)` makes it again."""
        return dict(vars(self))


def _tag(tokenizer: "PreTrainedTokenizerBase", tag: str) -> int:
    ids: list[int] = tokenizer(tag, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{tag} is {len(ids)} tokens to the model, so that it cannot be constrained")
    return ids[0]


def _tokens(tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of each label behind `</think>`, and behind another label."""
    texts = [THINK_END + spaced(label) for label in labels]
    begun = THINK_END + spaced(labels[0])
    behind_tag, behind_label = (
        tokenizer(some, add_special_tokens=False).input_ids
        for some in (texts, [begun + spaced(label) for label in labels])
    )
    first = [ids[1:] for ids in behind_tag]
    later = [ids[len(behind_tag[0]) :] for ids in behind_label]
    for order in (range(len(labels)), range(len(labels))[::-1]):
        whole = tokenizer(completion(None, order, labels), add_special_tokens=False).input_ids[2:]
        if whole != [*first[order[0]], *(token for place in order[1:] for token in later[place])]:
            raise ValueError(
                f"the labels {spaced(labels[0])!r}, {spaced(labels[1])!r} are written with other tokens within a "
                "ranking than alone, so that it cannot be constrained; train with ranking: letter"
            )
    return first, later


FIRST, LATER = 0, 1  # roots of the trees of the first label and of those behind it


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
    _children: list[dict[int, int]] = field(default_factory=lambda: [{}, {}])  # of each node of two prefix trees
    _kinds: list[set[int]] = field(default_factory=lambda: [set(), set()])  # labels at a node or below it, by kind
    _ends: dict[int, int] = field(default_factory=dict)  # node to the kind that ends there
    _readings: set[_Reading] = field(default_factory=set)

    def __post_init__(self) -> None:
        kinds: dict[tuple[int, ...], int] = {}
        numbers = [kinds.setdefault(tuple(label), len(kinds)) for label in self.grammar.labels]
        counts = [numbers.count(kind) for kind in kinds.values()]
        for label, kind in zip(self.grammar.first, numbers, strict=True):
            self._grow(FIRST, label, kind)
        for label, kind in zip(self.grammar.labels, numbers, strict=True):
            self._grow(LATER, label, kind)
        self._readings = {_Reading(tuple(counts), FIRST)}
        self._in_trace = not self.grammar.begun

    def _grow(self, root: int, label: Sequence[int], kind: int) -> None:
        """Add a label's tokens to the tree below `root`."""
        node = root
        for token in label:
            node = self._children[node].setdefault(token, len(self._children))
            if node == len(self._children):
                self._children.append({})
                self._kinds.append(set())
            self._kinds[node].add(kind)
        self._ends[node] = kind

    def allowed(self) -> list[int] | None:
        """Tokens of which the next must be one, in no order; None within a trace, where all but `forbidden` may be."""
        grammar = self.grammar
        if self._is_at_start:
            return [grammar.think]
        if self._in_trace:
            return [grammar.think_end] if self.written > grammar.max_trace else None
        if len(self._readings) == 1:
            return list(self._next(*self._readings))
        return list({token for reading in self._readings for token in self._next(reading)})

    def forbidden(self) -> list[int]:
        """Tokens that a trace may not hold."""
        return self.grammar.not_in_trace

    def push(self, token: int) -> None:
        """Take the next token.

        Raises:
            ValueError: When it is not allowed; the choices are then what they were.
        """
        if not self._takes(token):
            raise ValueError(f"token {token} may not follow the {self.written} tokens before it")
        was_at_start, self.written = self._is_at_start, self.written + 1
        if was_at_start:
            return
        if self._in_trace:
            self._in_trace = token != self.grammar.think_end
        elif token != self.grammar.end:
            moved = [
                _Reading(reading.left, self._children[reading.node][token])
                for reading in self._readings
                if self._continues(reading, token)
            ]
            self._readings = {found for reading in moved for found in self._with_end(reading)}

    def _takes(self, token: int) -> bool:
        """Whether `allowed` and `forbidden` allow a token, without listing them."""
        if self._is_at_start:
            return token == self.grammar.think
        if self._in_trace:
            ends = token == self.grammar.think_end
            return ends or (self.written <= self.grammar.max_trace and token not in self.grammar.not_in_trace)
        return any(self._continues(reading, token) for reading in self._readings)

    @property
    def _is_at_start(self) -> bool:
        """Whether the opening tag comes next."""
        return self.written == 0 and not self.grammar.begun

    def _continues(self, reading: _Reading, token: int) -> bool:
        if self._is_whole(reading):
            return token == self.grammar.end
        child = self._children[reading.node].get(token)
        return child is not None and any(reading.left[kind] for kind in self._kinds[child])

    def _is_whole(self, reading: _Reading) -> bool:
        """Whether all labels are written."""
        return reading.node == LATER and not self._num_left(reading)

    def _num_left(self, reading: _Reading) -> int:
        return self.grammar.wanted - (len(self.grammar.labels) - sum(reading.left))

    def _next(self, reading: _Reading) -> Iterator[int]:
        """Tokens that continue a label of which one is left, or begin one."""
        if self._is_whole(reading):
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
            yield _Reading(tuple(left), LATER)
