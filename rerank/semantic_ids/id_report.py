"""`rerank ids`: how good the ids of a run are, before a model is trained on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rerank import run_dir as runs
from rerank.semantic_ids import quality
from rerank.semantic_ids.assignment import assigned_codes
from rerank.semantic_ids.co_engagement import co_engaged_pairs
from rerank.semantic_ids.embeddings import load_id_embeddings
from rerank.semantic_ids.id_tokens import load_semantic_ids, semantic_id_text
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
        """What to say beside the titles, or nothing."""
        if not self.num_alike:
            return ""
        which = "one embedding" if self.num_alike == len(self.titles) else f"{self.num_alike} of one embedding"
        return f"{which}: no rule can part them"


@dataclass(frozen=True)
class IdsQuality:
    """What the report shows; lists have one entry per level or, for prefixes, per depth.

    Attributes:
        metrics: As of the stage, for the stored ids.
        prefixes: Items of each prefix in use, most first.
        lift: How much more often than by chance co-engaged items share a prefix.
        shared: Ids that several items got before collisions were resolved, and `num_shared` of them in all.
        stored_shared: How many ids several items share in the stored table.
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
        """What a bar is held against: the share of items with an id of their own, as assigned or as stored."""
        return min(self.metrics["uniqueness_before"], self.metrics["uniqueness_after"])


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
    data_dir = runs.stage_dir(run_dir, "data")
    return IdsQuality(
        metrics=quality.ids_metrics(tokenizer, embeddings, copies, before, stored.codes),
        prefixes=quality.items_per_prefix(stored.codes),
        code_counts=[np.sort(np.bincount(level, minlength=tokenizer.codebook_size))[::-1] for level in before.T],
        lift=quality.prefix_lift(stored.codes, co_engaged_pairs(data_dir)),
        num_shared=len(groups),
        shared=_shared_ids(groups[:SHOWN_COLLISIONS], before, copies, data_dir),
        stored_shared=len(quality.collisions(stored.codes)),
    )


def _shared_ids(groups: list[np.ndarray], codes: np.ndarray, copies: np.ndarray, data_dir: Path) -> list[SharedId]:
    items = pq.read_table(data_dir / "items.parquet", columns=["item", "item_id", "title"]).sort_by("item")
    item_ids, titles = items["item_id"].to_pylist(), items["title"].to_pylist()
    return [
        SharedId(
            semantic_id_text(codes[group[0]]),
            [titles[item] or item_ids[item] for item in group],
            int((copies[group] > 1).sum()),
        )
        for group in groups
    ]


def facts(found: IdsQuality) -> list[tuple[str, str]]:
    """Names and printed values of what concerns the ids as a whole."""
    metrics = found.metrics
    other = metrics["uniqueness_before_of_other_embeddings"]
    return [
        ("items", f"{metrics['num_items']:,}"),
        ("levels of codes", f"{metrics['levels']} of {metrics['codebook_size']}"),
        ("items with an id of their own, as assigned", _share(metrics["uniqueness_before"])),
        ("the same among items with an embedding of their own", "none" if other is None else _share(other)),
        ("items with an id of their own, as stored", _share(metrics["uniqueness_after"])),
        ("distinct ids / items, as assigned", _share(metrics["distinct_before"])),
        ("distinct ids / items, as stored", _share(metrics["distinct_after"])),
        ("items that share an embedding", f"{metrics['num_sharing_an_embedding']:,}"),
        ("items moved to part them", f"{metrics['num_moved']:,}"),
        ("reconstruction error, as assigned", f"{metrics['reconstruction_error_before']:.4g}"),
        ("reconstruction error, as stored", f"{metrics['reconstruction_error_after']:.4g}"),
        ("variance of the embeddings left unexplained", _share(metrics["unexplained_variance"])),
    ]


LEVEL_COLUMNS = ("codes used", "perplexity", "prefixes", "items a prefix, mean", "most", "co-engaged lift")


def level_rows(found: IdsQuality) -> list[list[str]]:
    """A row of LEVEL_COLUMNS for each level, after its number; prefixes reach down to it."""
    rows = []
    for level, (prefix, lift) in enumerate(zip(found.prefixes, found.lift, strict=True)):
        use, perplexity = found.metrics["code_use"][level], found.metrics["perplexity"][level]
        rows.append(
            [
                str(level + 1),
                f"{use:.1%}",
                f"{perplexity:.1f}",
                f"{len(prefix):,}",
                f"{prefix.mean():.2f}",
                f"{prefix[0]:,}",
                "–" if lift is None else f"{lift:.1f} ×",
            ]
        )
    return rows


def _share(value: float) -> str:
    return f"{value:.4f}"


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


def charts(found: IdsQuality) -> list[dict[str, Any]]:
    """What the page draws: use of codes, items per prefix, co-engagement."""
    import plotly.graph_objects as go

    from rerank.page import chart

    use, prefixes = go.Figure(), go.Figure()
    for level, counts in enumerate(found.code_counts, start=1):
        use.add_scatter(x=list(range(1, len(counts) + 1)), y=counts.tolist(), mode="lines", name=f"level {level}")
    for depth, counts in enumerate(found.prefixes, start=1):
        sizes, share = np.unique(counts, return_counts=True)[0], _share_in_prefixes_of_at_most(counts)
        prefixes.add_scatter(x=sizes.tolist(), y=share.tolist(), mode="lines+markers", name=f"{depth} codes")
    depths = [str(depth) for depth in range(1, len(found.lift) + 1)]
    lift = go.Figure(go.Bar(x=depths, y=found.lift))
    share_axis = {"tickformat": ".0%", "rangemode": "tozero"}
    return [
        chart(use, "Items of each code, most used first", xaxis=_axis("code"), yaxis={"rangemode": "tozero"}),
        chart(
            prefixes,
            "Share of items whose prefix holds at most so many items",
            xaxis={**_axis("items of a prefix"), "type": "log"},
            yaxis=share_axis,
        ),
        chart(
            lift,
            "How much more often than by chance co-engaged items share a prefix",
            xaxis={**_axis("codes"), "type": "category"},
        ),
    ]


def _axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title}}


def _share_in_prefixes_of_at_most(counts: np.ndarray) -> np.ndarray:
    """For each size of a prefix that occurs, ascending: share of items in prefixes of at most that size."""
    sizes, times = np.unique(counts, return_counts=True)
    return np.cumsum(sizes * times) / counts.sum()


def section(found: IdsQuality) -> dict[str, Any]:
    """What the section of a page needs."""
    return {
        "facts": facts(found),
        "columns": LEVEL_COLUMNS,
        "rows": level_rows(found),
        "num_shared": found.num_shared,
        "shared": found.shared,
        "charts": charts(found),
    }


def write_page(found: IdsQuality, name: str, path: str | Path) -> None:
    """One HTML page that opens from disk."""
    from rerank.page import write

    ids = section(found)
    write(path, "ids.html.j2", charts=ids["charts"], name=name, ids=ids)
