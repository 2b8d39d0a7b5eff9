"""Slices of the evaluation of next items, and the items that a model cannot tell apart.

R rows.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from rerank.catalogue import Catalogue, shared
from rerank.launch import run_dir as runs
from rerank.next_item.encoder import SETTINGS, written_items
from rerank.results.slices import Slices, measure
from rerank.results.tables import Results, by_slice_table, counted, slice_table

METRIC = "R@10"


def slice_results(
    values: Mapping[str, Mapping[str, np.ndarray]],
    reference: str,
    slices: Slices,
    users: np.ndarray,
    num_samples: int,
    metric: str = METRIC,
) -> Results:
    """A metric of each ranker on the slices, for results.json.

    Args:
        values: Ranker to its metrics, (R,) each.
        reference: The ranker that differences are to.
        slices: Of the rows.
        users: (R,).
        num_samples: Bootstrap samples of an interval.
        metric: Its name.
    """
    chosen = {name: of[metric] for name, of in values.items()}
    found = measure(chosen, chosen[reference], slices.members, users, num_samples)
    return {"metric": metric, "reference": reference, "of": slices.counts(), "rankers": found}


def slice_lines(slices: Results) -> list[str]:
    """The tables of `slice_results`."""
    rankers: dict[tuple[str, ...], Results] = {(name,): of for name, of in slices["rankers"].items()}
    n = {name: of["rows"] for name, of in slices["of"].items()}
    found = slice_table(slices["of"]), by_slice_table(rankers, n, slices["metric"], slices["reference"])
    return [line for table in found for line in table.lines()]


def shared_texts(run: Path, targets: np.ndarray, rankers: Collection[str]) -> dict[str, dict[str, int]]:
    """By kind of text by which models of a run write items: the items that share theirs with another one.

    Args:
        run: Folder of the run.
        targets: (R,) items.
        rankers: Of the evaluation; the sft stage is read where its model is one.

    Returns:
        `semantic_id`, and `title` where the sft stage's model writes it, to the number of such `items`, and of `rows`
        whose target is one.
    """
    catalogue, settings = Catalogue.load(run), runs.stage_dir(run, "sft") / "model" / SETTINGS
    texts = ["semantic_id", *([json.loads(settings.read_text())["item_text"]] if "sft" in rankers else [])]
    found = {}
    for text in dict.fromkeys(texts):
        is_shared = np.array(shared(written_items(catalogue, text)))
        found[text] = {"items": int(is_shared.sum()), "rows": int(is_shared[targets].sum())}
    return found


def shared_texts_sentence(found: Mapping[str, Mapping[str, int]]) -> str:
    """How hits are counted where items share a text."""
    counts = [
        f"sharing a {text.replace('_', ' ')}: {counted(of['items'], 'item')}, the targets of {of['rows']} rows"
        for text, of in found.items()
    ]
    places = "items of one text are found together, each at a place of its own"
    return f"Hits are counted by item; {places} ({'; '.join(counts)})."
