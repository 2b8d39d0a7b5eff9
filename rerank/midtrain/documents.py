"""Documents of mid-training: the four families of GR2 and OneRec-Think, lists to rank, and titles."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rerank.catalogue import Catalogue
from rerank.grading import GRADES, LONGEST_LIST, Facts, by_grade, word_grades, word_short
from rerank.next_item.encoder import NEXT_ITEMS
from rerank.prompts import THINK, completion, opening, render, word_labels
from rerank.prompts.facts import NUM_BUCKETS, coded
from rerank.prompts.fields import SEMANTIC_ID, clean
from rerank.prompts.message import LAYOUTS, arranged
from rerank.rows import windows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from rerank.midtrain import MidtrainArguments

logger = logging.getLogger(__name__)

TASKS = ("sequence", "persona", "caption", "text", "lists", "titles")
OF_IDS = ("sequence", "persona", "caption")  # tasks that write items by their semantic ids
# Fixed words of the documents and of short prompts; a small tokenizer makes each one token.
PROMPT_WORDS = ("Rank:", "History:", "Candidates:", "Next", "items:", "Describe:", "Which", "item:", "User:", "likes")
GRADED_SHARE = 0.4  # of the lists begin with the grades
NORMAL_EDGES = (-1.07, -0.57, -0.18, 0.18, 0.57, 1.07)  # cut a normal distribution into sevenths
WINDOW = 16  # batches within which documents are put in order of length


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


def sequence_documents(histories: Sequence[np.ndarray], catalogue: Catalogue, max_items: int) -> Iterator[Document]:
    """Windows of a user's sequence, each overlapping the one before by half, so that every item has a past."""
    for history in histories:
        for window in windows(history, max_items):
            yield Document("sequence", NEXT_ITEMS, _ids(catalogue, window), ends=False)


def caption_documents(catalogue: Catalogue) -> Iterator[Document]:
    """Item id to words and words to item id."""
    texts = zip(catalogue.semantic_ids, catalogue.titles, catalogue.categories, strict=True)
    for semantic_id, title, category in texts:
        words = " | ".join(text for text in (title, category) if text)
        if words:
            yield Document("caption", "Describe:" + semantic_id, words)
            yield Document("caption", "Which item: " + words, semantic_id)


def title_documents(catalogue: Catalogue) -> Iterator[Document]:
    """Title and category of each item, whose words prompts show."""
    for title, category in zip(catalogue.titles, catalogue.categories, strict=True):
        if words := " | ".join(text for text in map(clean, (title, category)) if text):
            yield Document("titles", "", words, ends=False)


def persona_documents(
    histories: Sequence[np.ndarray], catalogue: Catalogue, rng: np.random.Generator
) -> Iterator[Document]:
    """A stretch of a history in words and ids: its categories by frequency with their items, and the latest title."""
    for history in histories:
        start = int(rng.integers(0, max(1, len(history) - 8)))
        items = history[start : start + 8]
        groups: dict[str, list[int]] = {}
        for item in items:
            groups.setdefault(catalogue.categories[item].split(", ")[0] or "Other", []).append(item)
        largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
        told = "; ".join(f"{name} {_ids(catalogue, group)}" for name, group in largest_first)
        latest = catalogue.titles[items[-1]] + catalogue.semantic_ids[items[-1]]
        yield Document("persona", "User:" + _ids(catalogue, items), f"likes {told}; lately {latest}")


def list_labels(ranking: str, size: int, catalogue: Catalogue, rng: np.random.Generator) -> list[str]:
    """The labels of a made-up list: numbers or letters, or the ids of random items."""
    if ranking == SEMANTIC_ID:
        return [catalogue.semantic_ids[item] for item in rng.permutation(len(catalogue))[:size]]
    return word_labels(ranking, size)


def list_documents(
    num: int,
    facts: Sequence[str],
    ranking: str,
    catalogue: Catalogue,
    rng: np.random.Generator,
    longest: int = LONGEST_LIST,
    num_buckets: int = NUM_BUCKETS,
    layout: str = LAYOUTS[0],
) -> Iterator[Document]:
    """Exercises for re-ranking on made-up lists: find a candidate's facts, grade them, sort by grade.

    Lists grow from at most two to at most `longest` candidates in the first half: read in this order, short ones
    teach to read long ones. Most lists show facts in random buckets, and the grade is that of their mean; the others
    begin with the grades and are only to be sorted.

    Args:
        num: Exercises.
        facts: Names of facts, as in `prompts.facts`.
        ranking: `number` or `letter`; or `semantic_id`: lines then begin with ids of random items.
        catalogue: Of these ids.
        rng: Draws it all.
        longest: Candidates of a list at most.
        num_buckets: Of a fact.
        layout: Of the prompts, as `PromptSettings` has it.
    """
    most = min(longest, len(catalogue)) if ranking == SEMANTIC_ID else longest
    for place in range(num):
        size = min(most, int(rng.integers(1, 3 + int(min(1, 2 * place / num) * (longest - 2)))))
        labels = list_labels(ranking, size, catalogue, rng)
        if rng.random() < GRADED_SHARE:
            grades = rng.integers(0, len(GRADES), size)
            order = by_grade(grades)
            trace = word_grades(labels, grades)
            _, given, answer = completion(trace, order, labels).partition(trace)
            yield Document("lists", "Rank:", answer, given=THINK + given)
            continue
        chosen = rng.permutation(len(facts))  # one fact in half of the lists, else any number of them
        num_shown = 1 if rng.random() < 0.5 else int(rng.integers(1, len(facts) + 1))
        shown = [facts[fact] for fact in sorted(chosen[:num_shown])]
        buckets = rng.integers(0, num_buckets, (size, len(shown)))
        texts = [[coded(name, bucket) for name, bucket in zip(shown, line, strict=True)] for line in buckets.tolist()]
        # the mean of n uniform buckets in units of its standard deviation: each grade about equally frequent
        above = (buckets.mean(axis=1) - (num_buckets - 1) / 2) * np.sqrt(len(shown) / ((num_buckets**2 - 1) / 12))
        grades = np.searchsorted(NORMAL_EDGES, above)
        lines = [" " + " ".join(line) for line in texts]
        trace = word_short(labels, grades, Facts(texts, buckets.astype(float), lines))
        items = labels if ranking == SEMANTIC_ID else [""] * size
        prompt = arranged(layout, "Rank:", ["History:"], labels, items, lines)
        yield Document("lists", prompt, completion(trace, by_grade(grades), labels))


def text_documents(source: str, length: int = 400) -> Iterator[Document]:
    """Passages of general text: of a file, or, offline, of the descriptions of the packages the project stands on."""
    if source == "packages":
        names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "scipy", "scikit-learn")
        texts = [_description(name) for name in names]
    else:
        texts = [Path(source).read_text(encoding="utf-8")]
    for text in texts:
        words = text.replace("<", "‹").replace(">", "›")
        for start in range(0, len(words), length):
            yield Document("text", "", words[start : start + length])


def _description(package: str) -> str:
    """Where the package importlib_metadata has been imported too, it stands under a key, not behind all keys."""
    found = metadata.metadata(package)
    return str(found.get_payload() or found.get("Description") or found.get("Summary", ""))


def mixed_documents(
    histories: Sequence[np.ndarray], catalogue: Catalogue, args: "MidtrainArguments", seed: int
) -> list[Document]:
    """Documents of each task by its share, `num_documents` in all, in random order but for the lists, which grow."""
    rng = np.random.default_rng(seed)
    sequence = list(sequence_documents(histories, catalogue, args.max_items)) if catalogue.has_ids else []
    shares = sum(args.mixture.values())
    total = args.num_documents / shares if args.num_documents else len(sequence) / args.mixture["sequence"]
    wanted = Counter({task: round(total * share) for task, share in args.mixture.items()})
    mixed = [
        *_draw(sequence, wanted["sequence"], rng),
        *_draw(list(persona_documents(histories, catalogue, rng)), wanted["persona"], rng),
        *_draw(list(caption_documents(catalogue)), wanted["caption"], rng),
    ]
    if wanted["text"]:
        mixed += _draw(list(text_documents(args.general_text)), wanted["text"], rng)
    if wanted["titles"]:
        if not (titles := list(title_documents(catalogue))):
            raise ValueError("mixture has titles but no item has a title or a category; leave titles out of it")
        mixed += _draw(titles, wanted["titles"], rng)
    shape = args.list_labels, catalogue, rng, args.longest_list, args.num_buckets, args.list_layout
    lists = list_documents(wanted["lists"], args.list_facts, *shape)
    places = rng.permutation(len(mixed) + wanted["lists"])
    return [mixed[place] if place < len(mixed) else next(lists) for place in places]


def _draw(documents: Sequence[Document], num: int, rng: np.random.Generator) -> list[Document]:
    """`num` documents in random order, each as often as any other, give or take one."""
    if not documents:
        return []
    rounds = [rng.permutation(len(documents)) for _ in range(-(-num // len(documents)))]
    return [documents[i] for order in rounds for i in order][:num]


def encode(document: Document, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """Token ids and labels; -100 where there is no loss. Every document begins as a prompt does."""
    texts = [render(tokenizer, document.prompt) if document.prompt else "", document.given, document.answer]
    prompt, given, answer = (tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in texts)
    prompt, answer = opening(tokenizer) + prompt + given, answer + ([tokenizer.eos_token_id] if document.ends else [])
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return {"input_ids": ids, "labels": labels}


def in_batches(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> list[int]:
    """An order of the documents in which those of a batch are of like length, for less padding.

    Documents move by at most WINDOW batches, so that lists still grow.
    """
    order: list[int] = []
    for start in range(0, len(lengths), WINDOW * batch_size):
        window = sorted(range(start, min(start + WINDOW * batch_size, len(lengths))), key=lambda i: lengths[i])
        num_whole = len(window) // batch_size
        for batch in [*rng.permutation(num_whole), num_whole]:  # the rest of the last window stays last
            order += window[batch * batch_size : (batch + 1) * batch_size]
    return order


def encoded_dataset(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", config: "SFTConfig"
) -> "tuple[Dataset, dict[str, int]]":
    """The documents as token ids, labels and numbers of tasks, packed if the recipe says so; tokens under loss per
    task."""
    from datasets import Dataset
    from trl import pack_dataset

    rows, token_counts, num_cut = [], Counter[str](), 0
    for document in documents:
        whole, task = encode(document, tokenizer), TASKS.index(document.task)
        row = {name: values[: config.max_length] for name, values in whole.items()}
        num_cut += document.task == "lists" and len(row["labels"]) < len(whole["labels"])
        token_counts[document.task] += sum(label != -100 for label in row["labels"][1:])
        rows.append({**row, "task": [task] * (len(row["labels"]) if config.packing else 1)})
    if num_cut:
        logger.warning(
            "%d lists are longer than max_length %d, so that the end of their ranking is cut off; raise it, or lower "
            "longest_list", num_cut, config.max_length,
        )  # fmt: skip
    lengths = [len(row["input_ids"]) for row in rows]
    order = in_batches(lengths, config.per_device_train_batch_size, np.random.default_rng(config.seed))
    dataset = Dataset.from_list([rows[i] for i in order])
    if config.packing:
        dataset = pack_dataset(dataset, config.max_length, config.packing_strategy)
    return dataset, dict(token_counts)
