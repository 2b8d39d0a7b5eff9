"""Stage 1: raw interactions and items become tables and splits; the only code that knows raw formats.

In: two tables that the recipe names (files, a package's files, a `datasets` name). Out: `items.parquet`,
`users.parquet`, `interactions.parquet` and `rows.parquet` with integer items and users, and a summary.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.data --config recipes/ml100k/1_data.yaml
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from rerank import recipe, run_dir

INPUTS = ()
SPLITS = ("per_user", "by_time", "random", "given")
FORMATS = ("csv", "tsv", "jsonl", "parquet", "recbole", "s3rec", "datasets")

logger = logging.getLogger(__name__)


@dataclass
class DataArguments(recipe.StageArguments):
    """Options of the data stage."""

    interactions: str = field(
        metadata={
            "help": "Interactions: a file, package:NAME/FILE, or a datasets folder or name NAME[:CONFIG][@SPLIT]; "
            "${VARIABLE} is filled in from the environment."
        }
    )
    items: str | None = field(default=None, metadata={"help": "Items, named as interactions are; their text if any."})
    format: str = field(default="auto", metadata={"help": f"auto (by the suffix) or {', '.join(FORMATS)}."})
    items_format: str = field(default="auto", metadata={"help": "Format of items, as for interactions."})
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Columns of interactions, {user: ..., item: ..., time: ..., position: ..., split: ...}, where "
            "they differ from these; ready rows have items, or history and item. position orders before time."
        },
    )
    item_columns: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Columns of items, {item: ..., title: ..., category: ..., brand: ...}, likewise."},
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Item columns that make up the text for the sentence encoder; title, category by default."},
    )
    category_separator: str | None = field(
        default=None, metadata={"help": "What parts several categories in one cell; they are rewritten with ', '."}
    )
    min_user_interactions: int = field(default=0, metadata={"help": "k-core: fewest interactions of a user."})
    min_item_interactions: int = field(default=0, metadata={"help": "k-core: fewest interactions of an item."})
    split: str = field(
        default="per_user",
        metadata={
            "help": "per_user: from the end of each sequence; by_time: the latest fractions of all interactions; "
            "random: fractions of each user's, whatever their order; given: by the split column of interactions or of "
            "ready rows."
        },
    )
    num_test: int = field(default=1, metadata={"help": "per_user: test targets of a user."})
    num_valid: int = field(default=1, metadata={"help": "per_user: validation targets of a user, before those."})
    num_rerank: int | str = field(
        default=1,
        metadata={
            "help": "Last training interactions of a user that train the re-ranker and are kept out of mid-training; "
            "all: every one, and mid-training sees them too."
        },
    )
    min_history: int = field(default=2, metadata={"help": "Fewest items before a target."})
    valid_fraction: float = field(
        default=0.1,
        metadata={
            "help": "by_time, random: share of interactions; given without a valid part: share of its training part."
        },
    )
    test_fraction: float = field(
        default=0.1, metadata={"help": "by_time: latest share of all; random: share of a user's."}
    )
    seed: int = field(default=0, metadata={"help": "random: of the draw."})
    terms: str = field(
        default="", metadata={"help": "Terms of use of the data; the card of every model trained on it quotes them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("format", self.format, ("auto", *FORMATS))
        _check_choice("items_format", self.items_format, ("auto", *FORMATS))
        _check_choice("split", self.split, SPLITS)
        for name in ("num_test", "num_valid", "min_history"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("min_user_interactions", "min_item_interactions"):
            _check_at_least(name, getattr(self, name), 0)
        if self.num_rerank != "all":
            _check_at_least("num_rerank", self.num_rerank, 1, " or all")
        for name in ("valid_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must lie between 0 and 1; try 0.1")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("valid_fraction and test_fraction together leave nothing to train on; try 0.1 each")
        if self.split == "given" and (self.min_user_interactions or self.min_item_interactions):
            raise ValueError("split: given takes interactions as they are; remove min_user_ and min_item_interactions")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(choices)}")


def _check_at_least(name: str, value: int | str, least: int, otherwise: str = "") -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r} but must be a whole number of at least {least}{otherwise}")


ARGUMENTS = (DataArguments,)


def check(args: DataArguments) -> None:
    """Read and split everything, writing nothing.

    Raises:
        FileNotFoundError: When an input is not there.
        ValueError: When an input is empty, lacks a column, has a bad row, or leaves a split without rows.
    """
    from rerank.data.prepare import prepare

    prepare(args)


def main(args: DataArguments, out_dir: Path) -> dict:
    """Write the tables of the stage; returns their counts."""
    import pyarrow.parquet as pq

    from rerank.data.prepare import prepare, summary
    from rerank.data.splits import write_rows

    prepared = prepare(args)
    pq.write_table(prepared.items, out_dir / "items.parquet")
    pq.write_table(prepared.users, out_dir / "users.parquet")
    pq.write_table(prepared.interactions.drop_columns("available"), out_dir / "interactions.parquet")
    write_rows(out_dir / "rows.parquet", prepared.interactions, prepared.targets)
    metrics = summary(args, prepared)
    metrics["terms"] = args.terms
    metrics["sources"] = {
        Path(path).name: run_dir.fingerprint(path) if Path(path).exists() else None for path in prepared.sources
    }
    logger.info("%(users)d users, %(items)d items, %(interactions)d interactions; rows: %(rows)s", metrics)
    if metrics["midtrain_has_seen_rerank_targets"]:
        logger.info("num_rerank is all: mid-training has seen the targets that train the re-ranker")
    return metrics
