"""Documents of mid-training as rows of tokens, in the order of training, packed if the recipe says so."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from rerank.midtrain.documents import TASKS, Document, Documents
from rerank.prompts import opening, render
from rerank.rows.on_read import CHUNK, MadeOnRead, places_to_check, store

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig, SFTConfig

    from rerank.midtrain import MidtrainArguments

logger = logging.getLogger(__name__)

WINDOW = 16  # batches within which documents are put in order of length
Row = dict[str, list[int]]
SCHEMA = pa.schema([(name, pa.list_(pa.int64())) for name in ("input_ids", "labels", "task")])


def check_packing(args: "MidtrainArguments", training_args: "SFTConfig", model_args: "ModelConfig") -> None:
    """Refuse packing that would cut documents, mix them in attention, or put lists out of their order."""
    if not training_args.packing:
        return
    if args.mixture.get("lists", 0) > 0:
        raise ValueError("packing puts documents out of order but lists must grow; leave lists or packing out")
    if training_args.packing_strategy != "bfd":
        raise ValueError(f"packing_strategy {training_args.packing_strategy} cuts documents; use bfd")
    if training_args.max_length is None:
        raise ValueError("packing needs max_length, the length of a packed row; set it, such as 1024")
    attention = model_args.attn_implementation or "sdpa"
    if attention not in ("sdpa", "eager") and "flash" not in attention:
        raise ValueError(
            f"attn_implementation {attention} may not keep packed documents apart; use sdpa, eager or a flash one"
        )


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
    task.

    Documents that are made when they are read are tokenized when they are read too: their order goes by their rough
    lengths, and the counts are those of a sample, scaled. Where they are packed, all are tokenized beforehand, into a
    memory-mapped file, since what fits into a row follows from their lengths.
    """
    from datasets import Dataset
    from trl import pack_dataset

    from rerank.rows.dataset import RowDataset

    is_kept, num = not isinstance(documents, Documents), len(documents)
    places = range(num) if is_kept else places_to_check(num)
    looked_at = [documents[place] for place in places]
    whole = [encode(document, tokenizer) for document in looked_at]
    made = [_row(*of_document, config) for of_document in zip(looked_at, whole, strict=True)]
    counts = _token_counts(looked_at, whole, made, num / max(len(places), 1), config)
    rows: Sequence[Row]
    if isinstance(documents, Documents):
        rows = MadeOnRead(num, lambda place: _row(documents[place], encode(documents[place], tokenizer), config))
        lengths = documents.lengths.tolist()
    else:
        rows, lengths = made, [len(row["input_ids"]) for row in made]
    order = in_batches(lengths, config.per_device_train_batch_size, np.random.default_rng(config.seed))
    in_order = MadeOnRead(num, lambda number: rows[order[number]])
    if is_kept:
        dataset = Dataset.from_list(list(in_order))
    elif config.packing:
        dataset = store(stored_rows(config) / "documents.arrow", SCHEMA, _parts(in_order))
    else:
        dataset = RowDataset.of(in_order, np.asarray(lengths)[order])
    if config.packing:
        dataset = pack_dataset(dataset, config.max_length, config.packing_strategy)
    return dataset, counts


def stored_rows(config: "SFTConfig") -> Path:
    """The folder of files that rows are read from while the stage runs."""
    return Path(str(config.output_dir)) / "rows"


def _row(document: Document, whole: Row, config: "SFTConfig") -> Row:
    """A row of at most `max_length` tokens with the number of its task, of each token where it is packed."""
    row = {name: values[: config.max_length] for name, values in whole.items()}
    task = TASKS.index(document.task)
    return {**row, "task": [task] * (len(row["labels"]) if config.packing else 1)}


def _parts(rows: Sequence[Row]) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), CHUNK):
        yield pa.RecordBatch.from_pylist(list(rows[start : start + CHUNK]), schema=SCHEMA)


def _token_counts(
    documents: Sequence[Document], whole: Sequence[Row], rows: Sequence[Row], scale: float, config: "SFTConfig"
) -> dict[str, int]:
    """Tokens under loss by task, those of a sample scaled; warns of lists whose end is cut off."""
    counts, num_cut = Counter[str](), 0
    for document, full, row in zip(documents, whole, rows, strict=True):
        num_cut += document.task == "lists" and len(row["labels"]) < len(full["labels"])
        counts[document.task] += sum(label != -100 for label in row["labels"][1:])
    if num_cut:
        logger.warning(
            "%d lists are longer than max_length %d, so that the end of their ranking is cut off; raise it, or lower "
            "longest_list", round(num_cut * scale), config.max_length,
        )  # fmt: skip
    return {task: round(count * scale) for task, count in counts.items()}
