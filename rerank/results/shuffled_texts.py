"""A control: every item bears the text of another one, so that what a ranker knows from texts is lost.

Titles, categories and other columns on item lines, and the facts computed from texts, are those of the other item.
Semantic ids and all counts stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rerank.baselines import TEXT_FEATURES, Counts, text_features
from rerank.catalogue import Catalogue
from rerank.prompts import PromptSettings
from rerank.prompts.fields import SEMANTIC_ID
from rerank.rows import RankingRow, read_feature_names

SEED = 0  # the same texts for every ranker and run


@dataclass(frozen=True, eq=False)
class ShuffledTexts:
    """Rows whose items bear other items' texts.

    Attributes:
        rows: With the facts that follow from these texts.
        sources: (items,) the item whose text each item bears.
    """

    rows: list[RankingRow]
    sources: np.ndarray

    @classmethod
    def of(cls, candidates_dir: Path, rows: Sequence[RankingRow]) -> "ShuffledTexts":
        """Of rows of a candidates stage's folder."""
        counts = Counts.load(candidates_dir / "evidence.npz")
        sources = other_items(counts.num_items)
        facts = counts.facts.with_texts_of(sources)
        names = read_feature_names(candidates_dir)[0]
        shown = [number for number, name in enumerate(TEXT_FEATURES) if name in names]  # without embeddings fewer
        columns = [names.index(TEXT_FEATURES[number]) for number in shown]
        shuffled = list(rows)
        for length in {len(row.candidates) for row in rows if row.features is not None}:
            chosen = [k for k, row in enumerate(rows) if row.features is not None and len(row.candidates) == length]
            histories = [np.array(rows[k].history) for k in chosen]
            values = text_features(facts, histories, np.array([rows[k].candidates for k in chosen]))
            for k, of_row in zip(chosen, values, strict=True):
                features = np.array(rows[k].features)
                features[:, columns] = of_row[:, shown]
                shuffled[k] = replace(rows[k], features=features)
        return cls(shuffled, sources)

    def catalogue(self, catalogue: Catalogue) -> Catalogue:
        """A model's catalogue with these texts."""
        return catalogue.with_texts_of(self.sources.tolist())


def other_items(num_items: int) -> np.ndarray:
    """(items,) another item for each item: the next one of a random circle."""
    circle = np.random.default_rng(SEED).permutation(num_items)
    others = np.empty(num_items, dtype=np.int64)
    others[circle] = np.roll(circle, -1)
    return others


def shows_texts(settings: PromptSettings) -> bool:
    """Whether prompts show titles, categories, other texts of items or facts from texts."""
    facts = [] if settings.evidence == "none" else settings.evidence_names
    return bool(set(settings.item_fields) - {SEMANTIC_ID} or set(TEXT_FEATURES) & set(facts))
