"""Stage: tables and splits from requests or raw interactions, and items; the only code that knows raw formats.

In: requests (lists that were shown, with graded feedback), interactions, or both, and items (files, a package's files,
a `datasets` name). Out: `items.parquet`, `users.parquet`, `interactions.parquet` and `rows.parquet` with integer items
and users, of interactions alone each user's sequence in `sequences.npy`, and a summary.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.data --config recipes/ml100k/1_data.yaml
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rerank.data.asked import ALLOWED, FORMATS, Asked, checked_csv
from rerank.launch import recipe
from rerank.launch.disk import told_of_full_disk
from rerank.launch.stages import Stage
from rerank.launch.values import BACKENDS, check_choice, check_range, option

SPLITS = ("per_user", "by_time", "by_user", "random", "given")
REQUESTS_FORMATS = ("wide", "long", "mind", "metarank")
ITEMS_FORMATS = (*FORMATS, "mind", "metarank")
OF_REQUESTS = (
    "requests_csv",
    "request_columns",
    "request_fields",
    "candidate_fields",
    "grades",
    "history_gap",
    "test_users",
)
OF_INTERACTIONS = {  # option that requests do not have -> its default
    "min_user_interactions": 0, "min_item_interactions": 0, "num_rerank": 1, "min_history": 2, "rebuild": False,
    "dedupe": None, "without_metadata": "refuse",
}  # fmt: skip
CSV_KEYS = ("csv", "items_csv", "requests_csv")  # and the sources that they are for

logger = logging.getLogger(__name__)


@dataclass
class DataArguments(recipe.StageArguments):
    """Options of the data stage."""

    requests: str | None = option(
        None, "Lists that were shown, with graded feedback: a file or a datasets folder; ${VARIABLE} works."
    )
    interactions: str | None = option(
        None,
        "A file, package:NAME/FILE, or a datasets folder or name NAME[:CONFIG][@SPLIT]; ${VARIABLE} works. Beside "
        "requests: what users took elsewhere.",
    )
    items: str | None = option(None, "Items, named as interactions are; their text if any.")
    requests_format: str = option(
        "auto",
        "wide: one line a request, lists in cells; long: one line a candidate; mind: behaviors.tsv; metarank: "
        "events in one JSONL file; auto: by the columns, the file's name or its first event.",
    )
    format: str = option("auto", f"auto (by the suffix) or {', '.join(FORMATS)}.")
    items_format: str = option("auto", "Format of items, as for interactions; mind: news.tsv; metarank: item events.")
    csv: dict[str, str | list[str]] | None = option(
        None,
        'How interactions are written: {separator: "::", header: [user, item, time], encoding: latin-1}; header names '
        "the columns of a file without one.",
    )
    items_csv: dict[str, str | list[str]] | None = option(None, "How items are written, as csv.")
    requests_csv: dict[str, str | list[str]] | None = option(None, "How requests are written, as csv.")
    request_columns: dict[str, str | None] | None = option(
        None,
        "Columns of requests, {request: ..., user: ..., time: ..., history: ..., candidates: ..., relevance: ..., "
        "scores: ..., split: ...}; of the long form item, score and position instead of lists.",
    )
    request_fields: list[str] | None = option(None, "Columns of a request or its user to keep, such as query, device.")
    candidate_fields: list[str] | None = option(None, "Numeric columns of the candidates to keep.")
    grades: dict[str, float] | None = option(
        None, "metarank: grade of each type of interaction; by default {click: 1}."
    )
    history_gap: float = option(
        0.0, "Seconds before a request whose interactions are not yet in its history, as they are of the same session."
    )
    columns: dict[str, str | None] | None = option(
        None,
        "Columns of interactions, {user: ..., item: ..., time: ..., position: ..., split: ...}, where "
        "they differ from these; ready rows have items, or history and item. position, which orders before time, has "
        "a say only where it is named here, and null takes a column's say away. A time is a number or a date, of UTC "
        "unless it has an offset such as +02:00.",
    )
    item_columns: dict[str, str | None] | None = option(
        None, "Columns of items, {item: ..., title: ..., category: ..., brand: ...} and any others to keep."
    )
    text_columns: list[str] | None = option(
        None, "Item columns of the sentence encoder's text; by default title, category."
    )
    category_separator: str | None = option(
        None, "Separator of several categories in one cell; they are rewritten with ', '."
    )
    where: str | None = option(
        None, f"Condition on the columns of interactions, such as: rating >= 4. It may hold {ALLOWED}."
    )
    on_bad_rows: str = option(
        "refuse", "refuse: end at the first row of interactions or items that cannot be used; drop: leave them out."
    )
    dedupe: str | None = option(
        None, "first, last: keep one interaction of a user and an item; consecutive: of repetitions without another."
    )
    without_metadata: str = option(
        "refuse", "Items of interactions that items lacks: refuse, keep (with empty text), or drop (interactions too)."
    )
    min_user_interactions: int = option(0, "k-core: fewest interactions of a user.")
    min_item_interactions: int = option(0, "k-core: fewest interactions of an item.")
    split: str = option(
        "per_user",
        "per_user: from the end of each sequence; by_time: the latest fractions of all interactions or requests; "
        "by_user: fractions of the users of requests; random: fractions of each user's interactions, whatever their "
        "order; given: by the split column. What is held out at random or as given is in no training history.",
    )
    num_test: int = option(1, "per_user: test targets (requests) of a user.")
    num_valid: int = option(1, "per_user: validation targets of a user, before those.")
    num_rerank: int | str = option(
        1,
        "Last training interactions of a user that train the re-ranker and are kept out of mid-training; "
        "all: every one, and mid-training sees them too.",
    )
    min_history: int = option(2, "Fewest items before a target; requests need none.")
    valid_fraction: float = option(
        0.1, "by_time, random: share of interactions; by_user: of users; given without a valid part: of train."
    )
    test_fraction: float = option(0.1, "by_time: latest share of all; random: of a user's; by_user: of users.")
    test_users: str | None = option(
        None, "by_user: a file of the test users, one id a line; validation users are drawn from the others."
    )
    rebuild: bool = option(
        False, "Put ready rows (a history and its target, already split) back into one sequence a user."
    )
    backend: str = option(
        "duckdb",
        "Engine of interactions: duckdb, in this process, or pyspark, on the master of spark-defaults.conf or "
        "PYSPARK_SUBMIT_ARGS; on a cluster TMPDIR and run_dir are folders that all machines see.",
    )
    seed: int = option(0, "Seed of split: random and by_user.")
    terms: str = option("", "Terms of use of the data; the card of every model quotes them.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices()
        self._check_ranges()
        self._check_sources()
        if self.split == "given" and (self.min_user_interactions or self.min_item_interactions):
            raise ValueError("split: given takes interactions as they are; remove min_user_ and min_item_interactions")
        if self.rebuild and self.split != "given":
            raise ValueError(f"rebuild is true but split is {self.split}; ready rows have a split: given")
        for name in ("where", "dedupe") if self.rebuild else ():
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)} but rebuild is true; it is for single interactions")
        for name in ("requests", "rebuild"):
            if self.backend == "pyspark" and getattr(self, name):
                raise ValueError(
                    f"backend is pyspark but {name} is {getattr(self, name)}, of which the tables are made in this "
                    "process; set backend: duckdb"
                )
        if self.test_users and self.split != "by_user":
            raise ValueError(f"test_users is set but split is {self.split}; set split: by_user")
        for kind, grade in (self.grades or {}).items():
            check_grade(kind, grade)

    def asked(self, key: str) -> Asked:
        """The table that the recipe names under requests, interactions or items."""
        prefix = "" if key == "interactions" else f"{key}_"
        form = "auto" if key == "requests" else getattr(self, f"{prefix}format")
        drops = self.on_bad_rows == "drop" and key != "requests"
        mapped = {"interactions": self.columns, "items": self.item_columns}.get(key) or {}
        ids = ("user", "item", *(str(mapped[name]) for name in ("user", "item") if mapped.get(name)))
        return Asked(key, getattr(self, key), form, getattr(self, f"{prefix}csv") or {}, drops, ids)

    def _check_choices(self) -> None:
        for name, choices in (
            ("format", FORMATS),
            ("items_format", ITEMS_FORMATS),
            ("requests_format", REQUESTS_FORMATS),
        ):
            check_choice(name, getattr(self, name), ("auto", *choices))
        check_choice("split", self.split, SPLITS)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("on_bad_rows", self.on_bad_rows, ("refuse", "drop"))
        check_choice("without_metadata", self.without_metadata, ("refuse", "keep", "drop"))
        if self.dedupe is not None:
            check_choice("dedupe", self.dedupe, ("first", "last", "consecutive"))
        for key in CSV_KEYS:
            setattr(self, key, checked_csv(key, getattr(self, key)))

    def _check_ranges(self) -> None:
        for name in ("num_test", "num_valid", "min_history"):
            check_range(name, getattr(self, name), least=1)
        for name in ("min_user_interactions", "min_item_interactions", "history_gap"):
            check_range(name, getattr(self, name), least=0)
        if self.num_rerank != "all" and not (isinstance(self.num_rerank, int) and self.num_rerank >= 1):
            raise ValueError(f"num_rerank is {self.num_rerank!r} but must be a whole number of at least 1, or all")
        for name in ("valid_fraction", "test_fraction"):
            check_range(name, getattr(self, name), above=0, below=1)
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("valid_fraction and test_fraction together leave nothing to train on; try 0.1 each")

    def _check_sources(self) -> None:
        """Refuse a recipe without data, and options of a source that it does not name."""
        if not (self.requests or self.interactions):
            raise ValueError("neither requests nor interactions is set; name the file of one")
        for name in () if self.items else ("item_columns", "text_columns", "category_separator"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)} but items is not set; name the table of items")
        for name in () if self.items else ("items_csv",):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)} but items is not set; name the table of items")
        for name in () if self.interactions else ("csv", "where"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)} but interactions is not set; name them or remove it"
                )
        if self.columns and not self.interactions:
            problem = f"columns is {self.columns} but interactions is not set"
            raise ValueError(f"{problem}; name columns of requests in request_columns")
        for name, default in OF_INTERACTIONS.items() if self.requests else ():
            if getattr(self, name) != default:
                raise ValueError(f"{name} is {getattr(self, name)} but is for interactions only; remove it")
        if self.requests and self.split == "random":
            raise ValueError("split is random but requests are split by_time, by_user, per_user or given; take one")
        for name in () if self.requests else OF_REQUESTS:
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)} but requests is not set; name the log or remove it")
        if self.split == "by_user" and not self.requests:
            raise ValueError("split is by_user but requests is not set; interactions are split per_user or by_time")


def check_grade(kind: str, grade: object) -> None:
    """Refuse a grade of a type of interaction that no ranker of the evaluation knows a gain of."""
    from rerank.baselines.lambdamart import MOST_GRADE

    if isinstance(grade, int | float):
        check_range(f"the grade of {kind}", grade, least=0, most=MOST_GRADE)
    if not isinstance(grade, int | float) or grade != round(grade):
        raise ValueError(f"grades has {grade!r} for {kind}; give a whole number from 0 to {MOST_GRADE}")


def check(args: DataArguments) -> None:
    """Read and split everything, writing nothing.

    Raises:
        FileNotFoundError: When an input is not there.
        ValueError: When an input is empty, lacks a column, has a bad row, or leaves a split without rows; when the
            backend is not installed, or the disk is full.
    """
    from rerank.data.prepare import prepared

    with told_of_full_disk(Path(tempfile.gettempdir())), prepared(args):
        pass


def check_names(args: DataArguments) -> None:
    """Refuse a backend, a file or a column that is not there; `main` refuses the rest before it writes."""
    from rerank.data import prepare

    prepare.check_names(args)


def main(args: DataArguments, out_dir: Path) -> dict[str, object]:
    """Write the tables of the stage; returns their counts."""
    from rerank.data.prepare import prepared

    with told_of_full_disk(Path(tempfile.gettempdir())), prepared(args) as found:
        with told_of_full_disk(out_dir, found.num_bytes()):
            found.write(out_dir)
        metrics = found.summary(args)
        logger.info("%(users)d users, %(items)d items, %(interactions)d interactions; rows: %(rows)s", metrics)
        for line in found.notes(metrics):
            logger.info(line)
    return metrics


STAGE = Stage(
    name="data",
    arguments=(DataArguments,),
    main=main,
    check=check,
    quick_check=check_names,
    files=("requests", "interactions", "items", "test_users"),
)
