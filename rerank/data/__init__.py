"""Stage: tables and splits from raw interactions and items; the only code that knows raw formats.

In: two tables that the recipe names (files, a package's files, a `datasets` name). Out: `items.parquet`,
`users.parquet`, `interactions.parquet` and `rows.parquet` with integer items and users, and a summary.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.data --config recipes/ml100k/1_data.yaml
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from rerank.launch import recipe
from rerank.launch.stages import Stage
from rerank.launch.values import check_choice, check_range, option

SPLITS = ("per_user", "by_time", "random", "given")
FORMATS = ("csv", "tsv", "jsonl", "parquet", "recbole", "s3rec", "datasets")

logger = logging.getLogger(__name__)


@dataclass
class DataArguments(recipe.StageArguments):
    """Options of the data stage."""

    interactions: str = field(
        metadata={
            "help": "A file, package:NAME/FILE, or a datasets folder or name NAME[:CONFIG][@SPLIT]; ${VARIABLE} works."
        }
    )
    items: str | None = option(None, "Items, named as interactions are; their text if any.")
    format: str = option("auto", f"auto (by the suffix) or {', '.join(FORMATS)}.")
    items_format: str = option("auto", "Format of items, as for interactions.")
    columns: dict[str, str] | None = option(
        None,
        "Columns of interactions, {user: ..., item: ..., time: ..., position: ..., split: ...}, where "
        "they differ from these; ready rows have items, or history and item. position orders before time.",
    )
    item_columns: dict[str, str] | None = option(
        None, "Columns of items, {item: ..., title: ..., category: ..., brand: ...}."
    )
    text_columns: list[str] | None = option(
        None, "Item columns of the sentence encoder's text; by default title, category."
    )
    category_separator: str | None = option(
        None, "Separator of several categories in one cell; they are rewritten with ', '."
    )
    min_user_interactions: int = option(0, "k-core: fewest interactions of a user.")
    min_item_interactions: int = option(0, "k-core: fewest interactions of an item.")
    split: str = option(
        "per_user",
        "per_user: from the end of each sequence; by_time: the latest fractions of all interactions; "
        "random: fractions of each user's, whatever their order; given: by the split column.",
    )
    num_test: int = option(1, "per_user: test targets of a user.")
    num_valid: int = option(1, "per_user: validation targets of a user, before those.")
    num_rerank: int | str = option(
        1,
        "Last training interactions of a user that train the re-ranker and are kept out of mid-training; "
        "all: every one, and mid-training sees them too.",
    )
    min_history: int = option(2, "Fewest items before a target.")
    valid_fraction: float = option(
        0.1, "by_time, random: share of interactions; given without a valid part: of train."
    )
    test_fraction: float = option(0.1, "by_time: latest share of all; random: of a user's.")
    seed: int = option(0, "Seed of split: random.")
    terms: str = option("", "Terms of use of the data; the card of every model quotes them.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("format", "items_format"):
            check_choice(name, getattr(self, name), ("auto", *FORMATS))
        check_choice("split", self.split, SPLITS)
        for name in ("num_test", "num_valid", "min_history"):
            check_range(name, getattr(self, name), least=1)
        for name in ("min_user_interactions", "min_item_interactions"):
            check_range(name, getattr(self, name), least=0)
        if self.num_rerank != "all" and not (isinstance(self.num_rerank, int) and self.num_rerank >= 1):
            raise ValueError(f"num_rerank is {self.num_rerank!r} but must be a whole number of at least 1, or all")
        for name in ("valid_fraction", "test_fraction"):
            check_range(name, getattr(self, name), above=0, below=1)
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("valid_fraction and test_fraction together leave nothing to train on; try 0.1 each")
        if self.split == "given" and (self.min_user_interactions or self.min_item_interactions):
            raise ValueError("split: given takes interactions as they are; remove min_user_ and min_item_interactions")
        for name in () if self.items else ("item_columns", "text_columns", "category_separator"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)} but items is not set; name the table of items")


def check(args: DataArguments) -> None:
    """Read and split everything, writing nothing.

    Raises:
        FileNotFoundError: When an input is not there.
        ValueError: When an input is empty, lacks a column, has a bad row, or leaves a split without rows.
    """
    from rerank.data.prepare import prepare

    prepare(args)


def main(args: DataArguments, out_dir: Path) -> dict[str, object]:
    """Write the tables of the stage; returns their counts."""
    from rerank.data.prepare import prepare, summary

    prepared = prepare(args)
    prepared.write(out_dir)
    metrics = summary(args, prepared)
    logger.info("%(users)d users, %(items)d items, %(interactions)d interactions; rows: %(rows)s", metrics)
    if metrics["midtrain_has_seen_rerank_targets"]:
        logger.info("num_rerank is all: mid-training has seen the targets that train the re-ranker")
    return metrics


STAGE = Stage(
    name="data",
    arguments=(DataArguments,),
    main=main,
    check=check,
    files=("interactions", "items"),
)
