"""Documents of mid-training: the four families of GR2 and OneRec-Think, and titles.

D documents.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from rerank.catalogue import Catalogue
from rerank.next_item.encoder import NEXT_ITEMS
from rerank.prompts.fields import clean, described
from rerank.rows.histories import window_places
from rerank.rows.on_read import MadeOnRead

TASKS = ("sequence", "persona", "caption", "text", "lists", "titles")
OF_IDS = ("sequence", "persona", "caption")  # tasks that write items by their semantic ids
# Fixed words of the documents and of short prompts; a small tokenizer makes each one token.
PROMPT_WORDS = ("Rank:", "History:", "Candidates:", "Next", "items:", "Describe:", "Which", "item:", "User:", "likes")
CHARACTERS = 4  # of a text to a token, about


@dataclass(frozen=True)
class Document:
    """A text to learn: `prompt` (a user message, or empty) without loss, `answer` with loss."""

    task: str
    prompt: str
    answer: str
    ends: bool = True  # whether the answer is followed by the end token
    given: str = ""  # how the answer begins, without loss


def _ids(catalogue: Catalogue, items: Iterable[int]) -> str:
    return "".join(catalogue.semantic_ids[item] for item in items)


class Documents(MadeOnRead[Document]):
    """Documents that are made when they are read.

    Args:
        lengths: (D,) rough number of tokens of each, known without making it.
        make: From a place to the document there.
    """

    def __init__(self, lengths: np.ndarray, make: Callable[[int], Document]) -> None:
        super().__init__(len(lengths), make)
        self.lengths = lengths


def sequence_documents(histories: Sequence[np.ndarray], catalogue: Catalogue, max_items: int) -> Documents:
    """Windows of a user's sequence, each overlapping the one before by half, so that every item has a past."""
    items = np.concatenate([*histories, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    starts, ends = window_places(users, max_items, least=1)

    def make(place: int) -> Document:
        return Document("sequence", NEXT_ITEMS, _ids(catalogue, items[starts[place] : ends[place]]), ends=False)

    return Documents((ends - starts) * _id_tokens(catalogue), make)


def _id_tokens(catalogue: Catalogue) -> int:
    return max(1, catalogue.semantic_ids[0].count("<")) if catalogue.semantic_ids else 1


def _worded(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The places of texts that are not empty, and about how many tokens each is."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64)
    told = np.flatnonzero(lengths)
    return told, lengths[told] // CHARACTERS + 1


def caption_documents(catalogue: Catalogue) -> Documents:
    """Item id to words and words to item id."""
    told, lengths = _worded(described(catalogue, item) for item in range(len(catalogue)))

    def make(place: int) -> Document:
        item = told[place // 2]
        if place % 2:
            return Document("caption", "Which item: " + described(catalogue, item), catalogue.semantic_ids[item])
        return Document("caption", "Describe:" + catalogue.semantic_ids[item], described(catalogue, item))

    return Documents(np.repeat(lengths, 2) + _id_tokens(catalogue), make)


def title_documents(catalogue: Catalogue) -> Documents:
    """Title and category of each item, whose words prompts show."""
    told, lengths = _worded(described(catalogue, item) for item in range(len(catalogue)))
    return Documents(lengths, lambda place: Document("titles", "", described(catalogue, told[place]), ends=False))


def persona_documents(histories: Sequence[np.ndarray], catalogue: Catalogue, rng: np.random.Generator) -> Documents:
    """A stretch of a history in words and ids: its categories by frequency with their items, and the latest title."""
    starts = np.array([rng.integers(0, max(1, len(history) - 8)) for history in histories], dtype=np.int64)
    shown = np.array([min(8, len(history)) for history in histories], dtype=np.int64)

    def make(place: int) -> Document:
        items = histories[place][starts[place] : starts[place] + 8]
        groups: dict[str, list[int]] = {}
        for item in items:
            groups.setdefault(clean(catalogue.categories[item].split(", ")[0]) or "Other", []).append(item)
        largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
        told = "; ".join(f"{name} {_ids(catalogue, group)}" for name, group in largest_first)
        latest = clean(catalogue.titles[items[-1]]) + catalogue.semantic_ids[items[-1]]
        return Document("persona", "User:" + _ids(catalogue, items), f"likes {told}; lately {latest}")

    return Documents(2 * shown * _id_tokens(catalogue), make)


def text_documents(source: str, length: int = 400) -> Documents:
    """Passages of general text: of a file, or, offline, of the descriptions of the packages the project stands on."""
    if source == "packages":
        names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "scipy", "scikit-learn")
        texts = [_description(name) for name in names]
    else:
        texts = [Path(source).read_text(encoding="utf-8")]
    words = [text.replace("<", "‹").replace(">", "›") for text in texts]
    passages = [text[start : start + length] for text in words for start in range(0, len(text), length)]
    return Documents(np.full(len(passages), length // CHARACTERS), lambda place: Document("text", "", passages[place]))


def _description(package: str) -> str:
    """Where the package importlib_metadata has been imported too, it stands under a key, not behind all keys."""
    found = metadata.metadata(package)
    return str(found.get_payload() or found.get("Description") or found.get("Summary", ""))
