"""The mixture of mid-training: documents of all tasks in one order.

D documents.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rerank.catalogue import Catalogue
from rerank.midtrain.documents import (
    Document,
    Documents,
    caption_documents,
    persona_documents,
    sequence_documents,
    text_documents,
    title_documents,
)
from rerank.midtrain.exercises import list_documents, lists_on_read
from rerank.rows.on_read import seeded_sample

if TYPE_CHECKING:
    from rerank.midtrain import MidtrainArguments

KEPT_DOCUMENTS = 100_000
VOCABULARY_DOCUMENTS = 20_000  # of more than are kept, those that a vocabulary is learned from


def mixed_documents(
    histories: Sequence[np.ndarray], catalogue: Catalogue, args: "MidtrainArguments", seed: int
) -> Sequence[Document]:
    """Documents of each task by its share, `num_documents` in all, in random order but for the lists, which grow.

    Up to KEPT_DOCUMENTS are made here. More are made when they are read, each of their lists from a seed of its own.
    """
    rng = np.random.default_rng(seed)
    sequence = sequence_documents(histories if catalogue.has_ids else [], catalogue, args.max_items)
    shares = sum(args.mixture.values())
    total = args.num_documents / shares if args.num_documents else len(sequence) / args.mixture["sequence"]
    wanted = Counter({task: round(total * share) for task, share in args.mixture.items()})
    parts = [
        _draw(sequence, wanted["sequence"], rng),
        _draw(persona_documents(histories, catalogue, rng), wanted["persona"], rng),
        _draw(caption_documents(catalogue), wanted["caption"], rng),
    ]
    if wanted["text"]:
        parts.append(_draw(text_documents(args.general_text), wanted["text"], rng))
    if wanted["titles"]:
        if not len(titles := title_documents(catalogue)):
            raise ValueError("mixture has titles but no item has a title or a category; leave titles out of it")
        parts.append(_draw(titles, wanted["titles"], rng))
    num_others = sum(map(len, parts))
    places = rng.permutation(num_others + wanted["lists"])
    places[places >= num_others] = num_others + np.arange(wanted["lists"])  # in their own order
    shape: dict[str, Any] = {
        "longest": args.longest_list,
        "num_buckets": args.num_buckets,
        "layout": args.list_layout,
        "shortest": args.shortest_list,
        "sort_share": args.sort_share,
    }
    given = wanted["lists"], args.list_facts, args.list_labels, catalogue
    if len(places) > KEPT_DOCUMENTS:
        return _placed([*parts, lists_on_read(*given, seed, **shape)], places)
    lists = list(list_documents(*given, rng, **shape))
    return list(_placed([*parts, Documents(np.zeros(len(lists)), lists.__getitem__)], places))


def texts_of(documents: Sequence[Document]) -> list[str]:
    """The texts that a small model's vocabulary is learned from; of documents that are made when read, a sample's."""
    num = len(documents)
    is_sampled = isinstance(documents, Documents) and num > VOCABULARY_DOCUMENTS
    places = seeded_sample(num, VOCABULARY_DOCUMENTS) if is_sampled else range(num)
    return [f"{one.prompt}\n{one.answer}" for one in (documents[place] for place in places)]


def _placed(parts: Sequence[Documents], places: np.ndarray) -> Documents:
    """Documents of several parts, one part after the other, at these places."""
    ends = np.cumsum([len(part) for part in parts])

    def make(number: int) -> Document:
        place = int(places[number])
        part = int(np.searchsorted(ends, place, side="right"))
        return parts[part][place - int(ends[part])]  # from its end

    return Documents(np.concatenate([part.lengths for part in parts])[places], make)


def _draw(documents: Documents, num: int, rng: np.random.Generator) -> Documents:
    """`num` documents in random order, each as often as any other, give or take one."""
    if not len(documents):
        return Documents(np.zeros(0, dtype=np.int64), documents.make)
    rounds = [rng.permutation(len(documents)) for _ in range(-(-num // len(documents)))]
    chosen = np.concatenate([*rounds, np.zeros(0, dtype=np.int64)])[:num]
    return Documents(documents.lengths[chosen], lambda place: documents.make(int(chosen[place])))
