"""A request as a row of `rerank rank`: its documents as candidates, known or new, its query as history and context.

N documents of a request.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rerank.catalogue import Catalogue
from rerank.models.ranker import RankingModel
from rerank.models.saving import BRAND, ItemSources
from rerank.prompts.fields import SEMANTIC_ID, shown_value
from rerank.rank.encoder import RowEncoder
from rerank.rank.items import NUMBER, NewItems, make_new_items, shows_similarity
from rerank.rank.rows import shown_columns
from rerank.rank.serve.protocol import Refusal, RerankRequest

MOST_CHARACTERS = 10_000  # of a text that a prompt shows
QUERY = "query"
SOURCE = "documents"


@dataclass(frozen=True)
class RequestRow:
    """A request as a row.

    Attributes:
        record: With `history`, `candidates` and what else the prompts show.
        new: Fields of new items, by their ids.
        warnings: About what is not used.
    """

    record: dict[str, Any]
    new: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_row(request: RerankRequest, encoder: RowEncoder, sources: ItemSources | None, most: int) -> RequestRow:
    """The row of a request.

    Args:
        request: As it came.
        encoder: Of the model that will rank it.
        sources: How the model came to know its items; None where it can take no new ones.
        most: Documents at most.

    Raises:
        Refusal: For what cannot be ranked.
    """
    if len(request.documents) > most:
        raise Refusal(413, f"documents has {len(request.documents)} entries, but at most {most} can be ranked")
    if len(request.documents) < 2:
        number = "one entry" if request.documents else "no entry"
        raise Refusal(422, f"documents has {number}; there is nothing to rank, give at least two")
    ids, new = _read_documents(request.documents, encoder, sources)
    _check_known(ids, new, encoder)
    row = RequestRow({"candidates": ids}, new)
    history, context = _read_query(request, encoder)
    row.record["history"] = history
    shown = shown_columns(encoder.model)
    for name in set(context) - set(shown):
        row.warnings.append(f"context has {name!r}, which the model's prompts do not show")
    row.record.update({name: context[name] for name in context if name in shown})
    if request.scores is not None:
        row.record["scores"] = request.scores
    for name, option in shown.items():
        if name not in row.record:
            where = "the request" if name in ("scores", QUERY) else "context"
            raise Refusal(422, f"{where} has no {name!r}, which the model's prompts show ({option}); add it")
        _check_length(row.record[name], name)
    return row


def _check_known(ids: Sequence[str], new: Mapping[str, object], encoder: RowEncoder) -> None:
    """Refuse documents that the model does not know, as far as it is told to."""
    strangers = [item_id for item_id in ids if item_id not in encoder.items and item_id not in new]
    if strangers and encoder.unknown == "refuse":
        place, cure = ids.index(strangers[0]), "leave it out, or give it with its text"
        raise Refusal(422, f"documents[{place}] is {strangers[0][:80]!r}, which the model does not know; {cure}")
    if encoder.unknown == "drop" and len(ids) - len(strangers) < 2:
        number = "one entry" if len(ids) > len(strangers) else "no entry"
        raise Refusal(422, f"documents has {number} that the model knows; give the others with their texts")


def _check_length(value: object, name: str) -> None:
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        raise Refusal(413, f"{name} has {len(value)} characters, but at most {MOST_CHARACTERS} are read; shorten it")


def _read_query(request: RerankRequest, encoder: RowEncoder) -> tuple[list[Any], dict[str, Any]]:
    """The history and the context of a request."""
    history, context = request.history, dict(request.context or {})
    if any(QUERY in names for names in encoder.model.prompter.settings.row_fields.values()):
        return history or [], {QUERY: request.query, **context}
    query = _as_object(request.query)
    if query is not None:
        if not isinstance(query.get("context") or {}, dict):
            raise Refusal(422, "context of the query must be an object; correct it")
        context = {**(query.get("context") or {}), **context}
        return (history if history is not None else query.get("history") or []), context
    lines = [line.strip() for line in str(request.query).splitlines() if line.strip()]
    if history is not None:
        return history, context
    if lines and not any(line in encoder.items for line in lines):
        raise Refusal(
            422,
            f"query is {lines[0][:80]!r}, of which the model knows no item, and its prompts show no query; give item "
            'ids, one a line, or {"history": [...], "context": {...}}',
        )
    return list(lines), context


def _as_object(query: str | dict[str, Any]) -> dict[str, Any] | None:
    """A query that is an object of JSON, or a text that holds one."""
    if isinstance(query, dict):
        return query
    if not query.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(query)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read_documents(
    documents: Sequence[Any], encoder: RowEncoder, sources: ItemSources | None
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """(N,) ids, and the fields of new items by id."""
    first: dict[str, int] = {}
    new: dict[str, dict[str, str]] = {}
    takes_new = sources is not None and (sources.encoder is not None or not _needs_vectors(encoder.model))
    for place, document in enumerate(documents):
        item_id, fields = _read_document(document, f"documents[{place}]")
        if first.setdefault(item_id, place) != place:
            raise Refusal(
                422, f"documents[{first[item_id]}] and documents[{place}] are both {item_id[:80]!r}; give each once"
            )
        if takes_new and item_id not in encoder.items:
            assert sources is not None
            found = _fields(fields, encoder, sources, f"documents[{place}]")
            shown = encoder.model.prompter.settings.item_fields
            if not shown or any(found.get(name) for name in shown):
                new[item_id] = found
    return list(first), new


def _read_document(document: Any, name: str) -> tuple[str, Mapping[str, Any]]:
    """The id of a document, and its fields; a text is its own id, and a title."""
    if isinstance(document, str):
        return document, {"title": document}
    if not isinstance(document, dict):
        raise Refusal(422, f"{name} is {type(document).__name__}, neither a text nor an object; correct it")
    item_id, text = document.get("id"), document.get("text")
    fields = {name: value for name, value in document.items() if value not in (None, "")}
    fields = {"title": text, **fields} if isinstance(text, str) else fields
    item_id = text if item_id is None else item_id
    if not isinstance(item_id, str | int | float) or isinstance(item_id, bool):
        raise Refusal(422, f"{name} has neither an id nor a text; add one")
    return str(item_id), fields


def _needs_vectors(model: RankingModel) -> bool:
    settings = model.prompter.settings
    return settings.shows_ids or shows_similarity(settings)


def _fields(given: Mapping[str, Any], encoder: RowEncoder, sources: ItemSources, name: str) -> dict[str, str]:
    """The fields of a new item, as the data stage would read them: by our names, or by those of the run's file."""
    settings, counts = encoder.model.prompter.settings, encoder.counts
    of_text = sources.reading.get("text_columns") or ()
    wanted = dict.fromkeys(("title", "category", BRAND, *settings.item_fields, *of_text))
    wanted |= dict.fromkeys(feature.removeprefix(NUMBER) for feature in (counts.facts.numbers if counts else ()))
    columns = sources.reading.get("item_columns") or {}
    found = {}
    for key in wanted:
        value = given.get(key, given.get(columns.get(key) or key))
        text = " ".join(shown_value(value).split())
        _check_length(text, f"{key} of {name}")
        if text and key != SEMANTIC_ID:
            found[key] = text
    if separator := sources.reading.get("category_separator"):
        found["category"] = found.get("category", "").replace(separator, ", ")
    return found


def _text_columns(sources: ItemSources, known: Catalogue) -> list[str]:
    """Columns of the text that the sentence encoder reads."""
    given = sources.reading.get("text_columns")
    return given if given is not None else [name for name in ("title", "category") if any(known.texts(name))]


def _encoder_text(fields: Mapping[str, str], columns: Sequence[str]) -> str:
    """That text as the data stage writes it: `TITLE. NAME: VALUE`, the first column without its name."""
    parts = [(place, name, fields.get(name, "")) for place, name in enumerate(columns)]
    return ". ".join(text if place == 0 else f"{name}: {text}" for place, name, text in parts if text)


def read_new_items(new: Mapping[str, Mapping[str, str]], encoder: RowEncoder, sources: ItemSources) -> NewItems:
    """New items of a request, as a model folder takes them.

    Args:
        new: Fields by id.
        encoder: Of the model.
        sources: Of its folder.
    """
    known = encoder.model.prompter.catalogue
    columns = dict.fromkeys(["title", "category", *(name for fields in new.values() for name in fields)])
    texts = [_encoder_text(fields, _text_columns(sources, known)) for fields in new.values()]
    values = {name: [fields.get(name, "") for fields in new.values()] for name in columns}
    table = pa.table({"item_id": list(new), "text": texts, **values})
    settings = encoder.model.prompter.settings
    folder, needs = encoder.model.folder, _needs_vectors(encoder.model)
    return make_new_items(folder, known, table, sources, SOURCE, None, settings.shows_ids, needs)
