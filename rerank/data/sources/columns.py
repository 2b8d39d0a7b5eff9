"""Our names of columns to those of a source."""

import logging
from collections.abc import Mapping, Sequence

from rerank.data.sources.delimited import Delimited
from rerank.data.sources.source import Source

Names = dict[str, str]  # our names of columns to the source's
Given = Mapping[str, str | None]  # as a recipe has them; None: no column has this say

logger = logging.getLogger(__name__)


def pick_columns(
    source: Source,
    given: Given | None,
    key: str,
    known: Sequence[str],
    needed: Sequence[str],
    by_name: Sequence[str] | None = None,
) -> Names:
    """Our column names to the source's: as the recipe maps them, else by the same name where the source has it.

    Args:
        source: Where the columns are.
        given: The recipe's; null takes away the column of the same name.
        key: Of the recipe, for messages.
        known: The names there are.
        needed: Those without which nothing can be read.
        by_name: Those that need not be mapped; all of them by default.
    """
    given = given or {}
    for name in given:
        if name not in known:
            raise ValueError(f"{key} has the unknown key {name!r}; known: {', '.join(known)}")
    mapped = {name: str(column) for name, column in given.items() if column is not None}
    for name, column in mapped.items():
        require_column(source, name, column, key)
    default = {name: name for name in by_name or known if name not in given and source.has(name)}
    for name in default:
        source.refuse_twice(name)
    for name in needed:
        if name in given and given[name] is None:
            raise ValueError(f"{key} has null for {name}, which is needed; name its column")
        if name not in default | mapped:
            require_column(source, name, name, key)
    return default | mapped


def log_columns(source: Source, names: Names, *further: str) -> None:
    """Say which columns were taken as what, and which have no say."""
    taken = ", ".join(name if name == column else f"{name} from {column}" for name, column in names.items())
    unused = [column or "(no name)" for column in source.columns if column not in {*names.values(), *further}]
    logger.info("%s: columns %s%s", source.name, taken, f"; not used: {', '.join(unused)}" if unused else "")


def require_column(source: Source, name: str, column: str, key: str) -> None:
    """Refuse a source without the column, listing the columns that are there, and one that is data."""
    if not source.has(column):
        there = ", ".join(c or "(no name)" for c in source.columns)
        without = "" if not isinstance(source, Delimited) else f", or {source.name_columns()} if it has no header"
        cure = source.problem or source.asked.cure(f"correct {key}{without}", "rename its column in the file")
        raise ValueError(f"{source.name} has no column {column!r} for {name}; it has {there}; {cure}")
    source.refuse_twice(column)
    if isinstance(source, Delimited) and source.is_data(column):
        mapped = source.asked.cure(f"{key} maps {name} to {column!r}", f"{name} is read from {column!r}")
        raise ValueError(f"{source.name}: {mapped}, but {source.problem}")
