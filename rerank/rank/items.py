"""Items that a trained model has not seen: texts, facts without a count, and ids from the saved tokenizer.

K new items, D embedding columns.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from rerank.baselines import EMBEDDING_FEATURES, Counts
from rerank.catalogue import Catalogue, semantic_id_text
from rerank.launch import named_files
from rerank.models import text_embeddings
from rerank.models.ranker import RankingModel
from rerank.models.saving import BRAND, ID_TOKENIZER, ItemSources
from rerank.prompts import PromptSettings
from rerank.prompts.fields import SEMANTIC_ID

logger = logging.getLogger(__name__)

NUMBER = "item_"  # before the name of an item's number among features


@dataclass(frozen=True)
class NewItems:
    """Items to add to a catalogue.

    Attributes:
        catalogue: Of these items alone.
        embeddings: (K, D) of their texts; None where the model does not know them.
    """

    catalogue: Catalogue
    embeddings: np.ndarray | None


def with_new_items(
    model: RankingModel, counts: Counts | None, items_path: str | Path, embeddings_path: str | Path | None
) -> tuple[RankingModel, Counts | None]:
    """The model and its counts with the items of a file behind its own.

    Args:
        model: Of a model folder.
        counts: Of that folder; None where none are wanted.
        items_path: File of items that the model does not know.
        embeddings_path: Their embeddings, where the model's were given, too.
    """
    settings, known = model.prompter.settings, model.prompter.catalogue
    needs = settings.shows_ids or shows_similarity(settings)
    new = read_new_items(model.folder, known, items_path, embeddings_path, settings.shows_ids, needs)
    check_fields(settings, known, new.catalogue, items_path)
    return extended(model, counts, new, items_path)


def extended(
    model: RankingModel, counts: Counts | None, new: NewItems, source: str | Path
) -> tuple[RankingModel, Counts | None]:
    """The model and its counts with new items behind its own.

    Args:
        source: Where the items come from, for messages.
    """
    catalogue = model.prompter.catalogue.extended(new.catalogue)
    bigger = replace(model, prompter=replace(model.prompter, catalogue=catalogue))
    if counts is None:
        return bigger, None
    brands = catalogue.fields.get(BRAND)
    numbers = _numbers(new.catalogue, list(counts.facts.numbers), source)
    facts = counts.facts.extended(catalogue.categories, catalogue.titles, brands, new.embeddings, numbers)
    return bigger, counts.with_items(facts)


def shows_similarity(settings: PromptSettings) -> bool:
    """Whether prompts show facts that rest on embeddings."""
    return settings.evidence != "none" and bool(set(EMBEDDING_FEATURES) & set(settings.evidence_names))


def check_fields(settings: PromptSettings, known: Catalogue, new: Catalogue, path: str | Path) -> None:
    """Refuse new items without any text of a field that prompts show of the known ones."""
    for name in settings.item_fields:
        if name != SEMANTIC_ID and any(known.texts(name)):
            if name not in new.columns or not any(new.texts(name)):
                raise ValueError(
                    f"{path}: no item has a {name}, which the model's prompts show; add the column {name}"
                )


def read_new_items(
    folder: Path,
    known: Catalogue,
    items_path: str | Path,
    embeddings_path: str | Path | None,
    needs_ids: bool,
    needs_embeddings: bool,
) -> NewItems:
    """The items of a file, as a model folder takes them.

    Args:
        folder: Of the model.
        known: Its catalogue.
        items_path: Of the file.
        embeddings_path: Of a file of their embeddings.
        needs_ids: Whether the model writes or reads semantic ids.
        needs_embeddings: Whether it reads ids or similarities.

    Raises:
        FileNotFoundError, ValueError: For a file that cannot be read or holds items that the model knows, an encoder
            that is another one or not there, and embeddings that are missing or do not fit.
    """
    from rerank.rank.tables import read_items

    sources = ItemSources.load(folder)
    table = read_items(items_path, sources.reading, needs_embeddings and embeddings_path is None)
    item_ids, there = table["item_id"].to_pylist(), set(known.item_ids)
    twice = next((item_id for item_id in item_ids if item_id in there), None)
    if twice is not None:
        raise ValueError(f"{items_path}: item {twice!r} is in the catalogue of {folder} already; remove the row")
    return make_new_items(folder, known, table, sources, items_path, embeddings_path, needs_ids, needs_embeddings)


def make_new_items(
    folder: Path,
    known: Catalogue,
    table: pa.Table,
    sources: ItemSources,
    source: str | Path,
    embeddings_path: str | Path | None,
    needs_ids: bool,
    needs_embeddings: bool,
) -> NewItems:
    """The items of a table with item_id, title, category, text and further columns.

    Args:
        folder, known, embeddings_path, needs_ids, needs_embeddings: As of `read_new_items`.
        sources: Of the folder.
        source: Where the items come from, for messages.
    """
    embeddings, semantic_ids = None, [""] * len(table)
    if needs_embeddings:
        embeddings = embed(table, sources, folder, source, embeddings_path)
    if needs_ids:
        assert embeddings is not None
        semantic_ids = new_ids(folder, known, sources.num_items, embeddings)
    return NewItems(_catalogue(table, semantic_ids), embeddings)


def embed(
    table: pa.Table, sources: ItemSources, folder: Path, source: str | Path, embeddings_path: str | Path | None
) -> np.ndarray:
    """(K, D) embeddings of the items' texts, from their file or by the encoder that made those of the known items."""
    item_ids = table["item_id"].to_pylist()
    if embeddings_path is not None:
        from rerank.semantic_ids.embeddings import read_embeddings

        found = read_embeddings(str(embeddings_path), item_ids)
        text_embeddings.check_embeddings(found, item_ids, str(embeddings_path))
        return np.asarray(found)
    if sources.encoder is None:
        raise ValueError(
            f"the items of {folder} have given embeddings; give those of {source} by --embeddings FILE, a "
            ".parquet with item_id and embedding, or a .npy with a row per item"
        )
    text_embeddings.find_encoder(sources.encoder.name)
    changed = named_files.changed([sources.encoder]) if sources.encoder.sha256 else None
    if changed:
        raise ValueError(f"the ids of {folder} were made with another content of {changed}; put that encoder back")
    found = text_embeddings.encode(table["text"].to_pylist(), sources.encoder.name)
    text_embeddings.check_embeddings(found, item_ids, f"encoder {sources.encoder.name}")
    return found


def new_ids(folder: Path, known: Catalogue, num_trained: int, embeddings: np.ndarray) -> list[str]:
    """Ids of new items that no other item has; says which share of them has parts that no training item has."""
    from rerank.semantic_ids import Tokenizer, assign
    from rerank.semantic_ids.extension import unseen_words

    taken = known.codes
    codes = assign(Tokenizer.load(folder / ID_TOKENIZER), embeddings, taken)
    logger.warning("%s", unseen_words(codes, taken[:num_trained]))
    return [semantic_id_text(of_item) for of_item in codes.tolist()]


def _catalogue(table: pa.Table, semantic_ids: Sequence[str]) -> Catalogue:
    columns = {name: table[name].to_pylist() for name in table.column_names if name not in ("source_row", "text")}
    item_ids, titles, categories = (columns.pop(name) for name in ("item_id", "title", "category"))
    return Catalogue(item_ids, list(semantic_ids), titles, categories, columns)


def _numbers(new: Catalogue, features: Sequence[str], path: str | Path) -> dict[str, np.ndarray]:
    """(K,) numbers of the items by feature, nan where the file lacks them."""
    found = {}
    for feature in features:
        name = feature.removeprefix(NUMBER)
        found[feature] = np.full(len(new), np.nan)
        for place, text in enumerate(new.fields.get(name, [])):
            try:
                found[feature][place] = float(text) if text else np.nan
            except ValueError:
                problem = f"{name} of item {new.item_ids[place]!r} is {text!r}, no number"
                raise ValueError(f"{path}: {problem}; correct it, or leave it empty") from None
    return found
