"""`rerank ids`: quality of a run's semantic ids, before a model is trained on them. L levels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rerank.catalogue import Catalogue, semantic_id_text
from rerank.launch import run_dir as runs
from rerank.report import page
from rerank.report.page import FROM_ZERO, Chart, chart
from rerank.results.tables import NO_VALUE, number
from rerank.semantic_ids import quality
from rerank.semantic_ids.assignment import assigned_codes, load_semantic_ids
from rerank.semantic_ids.co_engagement import co_engaged_pairs
from rerank.semantic_ids.embeddings import load_id_embeddings
from rerank.semantic_ids.tokenizer import Tokenizer

SHOWN_COLLISIONS = 20


@dataclass(frozen=True)
class SharedId:
    """An id that several items got."""

    semantic_id: str
    titles: list[str]
    num_alike: int  # of them have the embedding of another one: no deterministic rule can part those

    @property
    def note(self) -> str:
        """A remark beside the titles, or nothing."""
        if not self.num_alike:
            return ""
        which = "one embedding" if self.num_alike == len(self.titles) else f"{self.num_alike} of one embedding"
        return f"{which}: no rule can part them"


@dataclass(frozen=True)
class IdsQuality:
    """Figures of a run's ids; lists have one entry for each level or, for prefixes, each depth.

    Attributes:
        metrics: As of the stage, for the stored ids.
        prefixes: Items of each prefix in use, most first.
        lift: How much more often than by chance co-engaged items share a prefix.
        num_shared: Number of ids that several items got before collisions were resolved.
        shared: The first of them.
        stored_shared: Number of ids that several items share in the stored table.
    """

    metrics: dict[str, Any]
    prefixes: list[np.ndarray]
    code_counts: list[np.ndarray]
    lift: list[float | None]
    num_shared: int
    shared: list[SharedId]
    stored_shared: int

    @property
    def uniqueness(self) -> float:
        """The share of items with an id of their own, as assigned or as stored, whichever is lower."""
        return float(min(self.metrics["uniqueness_before"], self.metrics["uniqueness_after"]))


def read_quality(run_dir: str | Path) -> IdsQuality:
    """The quality of a run's ids, from its data and semantic_ids folders.

    Raises:
        FileNotFoundError: When the stage semantic_ids is not finished.
        ValueError: When the parts of its folder do not belong together.
    """
    folder = runs.stage_dir(run_dir, "semantic_ids")
    if not runs.is_finished(run_dir, "semantic_ids"):
        raise FileNotFoundError(f"{folder} is not there or not finished; run the semantic_ids stage first")
    stored, tokenizer = load_semantic_ids(folder), Tokenizer.load(folder)
    embeddings = load_id_embeddings(folder)
    shape, expected = (len(embeddings), tokenizer.levels), stored.codes.shape
    if shape != expected:
        raise ValueError(
            f"{folder} holds ids of {expected[0]} items and {expected[1]} levels, but embeddings of {shape[0]} items "
            f"and a tokenizer of {shape[1]} levels; run the semantic_ids stage again"
        )
    before, copies = assigned_codes(folder, tokenizer, embeddings), quality.embedding_copies(embeddings)
    groups = quality.collisions(before)
    return IdsQuality(
        metrics=quality.ids_metrics(tokenizer, embeddings, copies, before, stored.codes),
        prefixes=quality.items_per_prefix(stored.codes),
        code_counts=[np.sort(np.bincount(level, minlength=tokenizer.codebook_size))[::-1] for level in before.T],
        lift=quality.prefix_lift(stored.codes, co_engaged_pairs(runs.stage_dir(run_dir, "data"))),
        num_shared=len(groups),
        shared=_shared_ids(groups[:SHOWN_COLLISIONS], before, copies, Catalogue.load(run_dir)),
        stored_shared=len(quality.collisions(stored.codes)),
    )


def _shared_ids(
    groups: Sequence[np.ndarray], codes: np.ndarray, copies: np.ndarray, catalogue: Catalogue
) -> list[SharedId]:
    names = [title or item_id for title, item_id in zip(catalogue.titles, catalogue.item_ids, strict=True)]
    return [
        SharedId(semantic_id_text(codes[group[0]]), [names[item] for item in group], int((copies[group] > 1).sum()))
        for group in groups
    ]


def facts(found: IdsQuality) -> list[tuple[str, str]]:
    """Names and printed values of the figures of all levels together."""
    metrics = found.metrics
    other = metrics["uniqueness_before_of_other_embeddings"]
    return [
        ("items", f"{metrics['num_items']:,}"),
        ("levels of codes", f"{metrics['levels']} of {metrics['codebook_size']}"),
        ("items with an id of their own, as assigned", number(metrics["uniqueness_before"])),
        ("the same among items with an embedding of their own", "none" if other is None else number(other)),
        ("items with an id of their own, as stored", number(metrics["uniqueness_after"])),
        ("distinct ids / items, as assigned", number(metrics["distinct_before"])),
        ("distinct ids / items, as stored", number(metrics["distinct_after"])),
        ("items that share an embedding", f"{metrics['num_sharing_an_embedding']:,}"),
        ("items moved to part them", f"{metrics['num_moved']:,}"),
        ("reconstruction error, as assigned", f"{metrics['reconstruction_error_before']:.4g}"),
        ("reconstruction error, as stored", f"{metrics['reconstruction_error_after']:.4g}"),
        ("variance of the embeddings left unexplained", number(metrics["unexplained_variance"])),
    ]


LEVEL_COLUMNS = ("codes used", "perplexity", "prefixes", "items a prefix, mean", "most", "co-engaged lift")


def level_rows(found: IdsQuality) -> list[list[str]]:
    """A row of LEVEL_COLUMNS for each level, after its number; prefixes reach down to it."""
    levels = zip(found.metrics["code_use"], found.metrics["perplexity"], found.prefixes, found.lift, strict=True)
    return [
        [
            *(str(level), f"{use:.1%}", f"{perplexity:.1f}", f"{len(prefix):,}", f"{prefix.mean():.2f}"),
            *(f"{prefix[0]:,}", NO_VALUE if lift is None else f"{lift:.1f} ×"),
        ]
        for level, (use, perplexity, prefix, lift) in enumerate(levels, start=1)
    ]


def lines(found: IdsQuality) -> list[str]:
    """The report for a terminal."""
    width = max(len(name) for name, _ in facts(found))
    table = [["level", *LEVEL_COLUMNS], *level_rows(found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = [f"{name:{width}}  {value}" for name, value in facts(found)]
    text += ["", *("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in table), ""]
    text += [f"{found.num_shared:,} ids were assigned to several items{', such as' if found.shared else ''}"]
    for shared in found.shared:
        note = f" ({shared.note})" if shared.note else ""
        text.append(f"{shared.semantic_id}{note}: {' | '.join(shared.titles)}")
    if found.stored_shared:
        text.append(f"{found.stored_shared:,} ids are shared in the stored table; run the semantic_ids stage again")
    return text


def charts(found: IdsQuality) -> list[Chart]:
    """Use of codes, items of prefixes, co-engagement."""
    use, prefixes = go.Figure(), go.Figure()
    for level, counts in enumerate(found.code_counts, start=1):
        use.add_scatter(x=list(range(1, len(counts) + 1)), y=counts.tolist(), mode="lines", name=f"level {level}")
    for depth, counts in enumerate(found.prefixes, start=1):
        sizes, times = np.unique(counts, return_counts=True)
        share = np.cumsum(sizes * times) / counts.sum()  # of items in prefixes of at most that size
        prefixes.add_scatter(x=sizes.tolist(), y=share.tolist(), mode="lines+markers", name=f"{depth} codes")
    lift = go.Figure(go.Bar(x=[str(depth + 1) for depth in range(len(found.lift))], y=found.lift))
    kinds = {"code": {}, "items of a prefix": {"type": "log"}, "codes": {"type": "category"}}
    code, size, depth_axis = ({"title": {"text": text}, **kind} for text, kind in kinds.items())
    shares = {"tickformat": ".0%", **FROM_ZERO}
    return [
        chart(use, "Items of each code, most used first", xaxis=code, yaxis=FROM_ZERO),
        chart(prefixes, "Share of items by the size of their prefix, cumulative", xaxis=size, yaxis=shares),
        chart(lift, "How much more often than by chance co-engaged items share a prefix", xaxis=depth_axis),
    ]


def section(found: IdsQuality) -> dict[str, Any]:
    """The values of the section of a page."""
    shared = {"num_shared": found.num_shared, "shared": found.shared}
    levels = {"columns": LEVEL_COLUMNS, "rows": level_rows(found)}
    return {"facts": facts(found), "charts": charts(found), **levels, **shared}


def write_page(found: IdsQuality, name: str, path: str | Path) -> None:
    """One HTML page that opens from disk."""
    ids = section(found)
    page.write(path, "ids.html.j2", charts=ids["charts"], name=name, ids=ids)
