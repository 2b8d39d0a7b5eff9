"""Stage: a teacher's reasoning, sampled, judged, kept or rejected.

In: candidates/ (training rows whose list holds a relevant item), data/ and semantic_ids/ (the catalogue; prompts that
show no semantic ids do without the second).
Out: accepted.parquet (row_id, trace, order: positions into candidates, best first), attempts.parquet (every draw and
why it was kept or not), row_split.parquet (row_id, used_for: sft or dapo), prompt.json (the prompt that all later
stages share); of the teacher `evidence` also scores.parquet (its scores of each training row's candidates).

Teachers: `vllm` (offline engine), `openai` (any OpenAI-compatible server), `evidence` (no language model). Strategies:
`rejection` hides the answer and draws until a ranking is good enough; `targeted` tells it and draws once. A ranking is
good enough when a most relevant item comes first, or with `accept: ndcg` when it is better than the input order.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.traces --config recipes/ml100k/5_traces.yaml
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerank.launch import recipe, run_dir, shards
from rerank.launch.shards import ALL_ROWS, Shard
from rerank.launch.stages import Stage
from rerank.launch.values import NUMBER_FORMATS, check_choice, check_range, option
from rerank.prompts import PromptSettings
from rerank.prompts.fields import WITHOUT_IDS
from rerank.rows import Prompter, check_edges, check_features, choose_rows, read_feature_names
from rerank.rows.checks import check_fields, check_lists, check_log
from rerank.rows.stored import HitLists, hit_keys, rows_of
from rerank.rows.teacher_scores import write_scores
from rerank.traces.attempts import AttemptStore, Teacher, collect, in_order, summarize
from rerank.traces.evidence import EvidenceTeacher, fit_scores, teacher_ndcg
from rerank.traces.teachers import (
    KEYS,
    OpenaiTeacher,
    PromptWriter,
    VllmTeacher,
    check_prompts,
    check_server,
    check_teacher,
)

logger = logging.getLogger(__name__)

TEACHERS = ("vllm", "openai", "evidence")
STRATEGIES = ("rejection", "targeted")
ACCEPT = ("first", "ndcg")


@dataclass
class TracesArguments(recipe.StageArguments):
    """Options of the stage; the prompt's own stand in `PromptSettings`."""

    teacher: str = option("vllm", "vllm, openai (a server) or evidence (no language model).")
    teacher_model: str | None = option(None, "Folder or hub name; for openai as served.")
    base_url: str = option("http://localhost:8000/v1", "Address of the openai teacher.")
    strategy: str = option("rejection", "rejection: draw until a ranking is accepted; targeted: tell the best items.")
    accept: str = option("first", "first: a most relevant item leads; ndcg: NDCG above the input order's, or 1.")
    traces_per_row: int = option(1, "Accepted attempts wanted of a row, under rejection.")
    max_attempts: int = option(8, "Draws a row at most, for rejection.")
    temperature: float = option(1.0, "Of sampling; for evidence the scale of its noise.")
    grade_ratio: float = option(1.0, "evidence: size of a grade over that below it; under 1, finer at the top.")
    shown_facts: bool = option(False, "evidence: rank by what the prompt shows alone, so that grades can be learned.")
    max_completion_tokens: int = option(1024, "Longest completion of a language model.")
    teacher_max_length: int | None = option(None, "vllm: tokens of prompt and completion.")
    teacher_dtype: str = option("auto", "vllm: number type, such as bfloat16 or float32.")
    tensor_parallel_size: int = option(1, "vllm: GPUs that share the teacher.")
    leave_out: list[str] = option([], f"openai: keys that its gateway refuses, of {' and '.join(KEYS)}.")
    max_concurrency: int = option(16, "openai: requests at a time.")
    max_retries: int = option(5, "openai: tries after a failed request.")
    batch_size: int = option(512, "Draws between two saves.")
    max_rows: int = option(0, "Rows to write traces for, drawn with `seed`; 0 for all.")
    rows_for_sft: float = option(1.0, "Share of the hit training rows, by whole users, for SFT; DAPO gets the rest.")
    seed: int = option(0, "Of the split, the choice of rows and the draws.")

    @property
    def draws_per_row(self) -> int:
        """Draws of a row at most."""
        return 1 if self.strategy == "targeted" else self.max_attempts

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("teacher", self.teacher, TEACHERS)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("accept", self.accept, ACCEPT)
        check_choice("teacher_dtype", self.teacher_dtype, NUMBER_FORMATS)
        for key in self.leave_out:
            check_choice("leave_out", key, KEYS)
        for name in ("max_attempts", "traces_per_row", "max_completion_tokens", "max_concurrency", "batch_size"):
            check_range(name, getattr(self, name), least=1)
        check_range("tensor_parallel_size", self.tensor_parallel_size, least=1)
        for name in ("temperature", "max_rows", "max_retries", "seed"):
            check_range(name, getattr(self, name), least=0)
        for name in ("rows_for_sft", "grade_ratio"):
            check_range(name, getattr(self, name), above=0, most=1)
        if self.teacher != "evidence" and not self.teacher_model:
            raise ValueError(f"teacher_model is missing but teacher is {self.teacher}; name the model.")
        if self.strategy == "rejection" and self.max_attempts > 1 and self.temperature == 0:
            raise ValueError(
                f"temperature is 0, so that all {self.max_attempts} draws of a row are the same; "
                "raise it or set max_attempts to 1."
            )


def check(args: TracesArguments, settings: PromptSettings) -> None:
    """Refuse a teacher that is not there and candidates without the evidence that is asked for."""
    if args.teacher == "vllm":
        check_teacher(args)
    if args.shown_facts and (args.teacher != "evidence" or settings.evidence == "none"):
        of = f"teacher is {args.teacher} and evidence {settings.evidence}"
        raise ValueError(f"shown_facts is true but {of}; it goes with teacher evidence and facts in the prompt")
    if run_dir.is_finished(args.run_dir, "data"):
        check_fields(args.run_dir, settings)
        if not run_dir.is_finished(args.run_dir, "candidates"):
            check_log(args.run_dir, settings)
    if run_dir.is_finished(args.run_dir, "candidates"):
        if args.teacher == "openai":  # until the stage can start, its server need not run
            check_server(args.base_url, str(args.teacher_model))
        folder = run_dir.stage_dir(args.run_dir, "candidates")
        if _needs_features(args, settings):
            check_features(folder / "train.parquet")
        check_edges(folder, without_similarity(folder, settings))
        check_lists(folder, settings)


def main(args: TracesArguments, settings: PromptSettings, out_dir: Path) -> dict[str, Any]:
    """Split the rows, let the teacher write, keep the completions whose ranking is good enough."""
    given = TrainingRows.load(args, settings)
    num_rows, num_sft = len(given.row_ids), int(given.is_for_sft.sum())
    split = pa.table({"row_id": given.row_ids, "used_for": np.where(given.is_for_sft, "sft", "dapo")})
    pq.write_table(split, out_dir / "row_split.parquet")
    made = shards.merged(args.run_dir, "traces", AttemptStore.name)
    attempts = draw(args, given, ALL_ROWS, out_dir) if made is None else in_order(made)
    if made is not None and args.teacher == "evidence":
        given.write_scores(args, out_dir)
    metrics = {
        "teacher": args.teacher,
        "teacher_model": args.teacher_model,
        "teacher_is_language_model": args.teacher != "evidence",
        "strategy": args.strategy,
        "knowledge_priming": given.prompter.settings.knowledge_priming,
        "hit_rows": num_rows,
        "sft_rows": num_sft,
        "dapo_rows": num_rows - num_sft,
        **summarize(attempts),
        **teacher_ndcg(args, given.path, out_dir),
    }
    _refuse_nothing_accepted(metrics, [out_dir] if made is None else [Path(args.run_dir) / "traces.shard-*", out_dir])
    _log(metrics)
    _write(out_dir, attempts, given.prompter.settings)
    return metrics


@dataclass(frozen=True)
class TrainingRows:
    """The hit training rows, of which those that traces are written for are read alone.

    Attributes:
        path: The candidates table.
        row_ids: (R,) of all, ascending.
        is_for_sft: (R,) whether the sft stage gets the row.
        prompter: Of the run.
        needs_features: Whether teacher or prompt needs features.
    """

    path: Path
    row_ids: np.ndarray
    is_for_sft: np.ndarray
    prompter: Prompter
    needs_features: bool

    @classmethod
    def load(cls, args: TracesArguments, settings: PromptSettings) -> "TrainingRows":
        """Of a run's candidates."""
        path = run_dir.stage_dir(args.run_dir, "candidates") / "train.parquet"
        keys, needs_features = hit_keys(path, ["row_id", "user"]), _needs_features(args, settings)
        if needs_features:
            check_features(path)
        settings = without_similarity(path.parent, settings)
        of_sft = is_for_sft(keys["user"].to_pylist(), args.rows_for_sft, args.seed)
        prompter = Prompter.of_run(args.run_dir, settings=settings)
        return cls(path, keys["row_id"].to_numpy(), of_sft, prompter, needs_features)

    def write_scores(self, args: TracesArguments, out_dir: Path) -> dict[int, np.ndarray]:
        """Fit LambdaMART on all rows out of fold; write and return the scores of each row's candidates."""
        shown = self.prompter if args.shown_facts else None
        scores = fit_scores(HitLists.read(self.path), self.prompter.names, args.seed, shown)
        write_scores(out_dir, scores)
        return scores


def draw(args: TracesArguments, given: TrainingRows, shard: Shard, out_dir: Path) -> pa.Table:
    """The attempts of a shard of the rows to write traces for, those that `out_dir` has already and new ones."""
    row_ids = shard.of(choose_rows(given.row_ids[given.is_for_sft].tolist(), args.max_rows, args.seed))
    chosen = rows_of(given.path, row_ids, given.needs_features)
    if args.teacher == "vllm":
        check_prompts(args, PromptWriter(given.prompter, args.strategy == "targeted"), chosen)
    store, labels = AttemptStore(out_dir), [given.prompter.labels(row) for row in chosen]
    open_teacher = partial(_open_teacher, args, given, out_dir)
    collect(chosen, labels, open_teacher, store, args, given.prompter.settings.top_k)
    return store.read()


def make_shard(args: TracesArguments, settings: PromptSettings, shard: Shard, folder: Path) -> None:
    """Write the traces of a shard of the rows."""
    given = TrainingRows.load(args, settings)
    shards.make(folder, AttemptStore.name, lambda: draw(args, given, shard, folder))


def without_similarity(candidates_dir: Path, settings: PromptSettings) -> PromptSettings:
    """The settings; without facts of similarity, and a word of it, in a run whose texts have no embeddings."""
    from rerank.baselines.features import EMBEDDING_FEATURES

    names, _ = read_feature_names(candidates_dir)
    absent = [name for name in settings.evidence_names if name in EMBEDDING_FEATURES and name not in names]
    if settings.evidence == "none" or not absent:
        return settings
    logger.warning("prompts leave out %s: texts have no embeddings without candidates.encoder", ", ".join(absent))
    return replace(settings, evidence_names=[name for name in settings.evidence_names if name not in absent])


def is_for_sft(users: Sequence[int | None], share: float, seed: int) -> np.ndarray:
    """(R,) whether the sft stage gets a row: those of users in a seeded order until they make up a share of all rows,
    at least of one user.

    Args:
        users: The user of each row.
        share: In (0, 1].
    """
    _, numbers, counts = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(counts))
    rows_before = np.cumsum(counts[order]) - counts[order]
    found: np.ndarray = np.isin(numbers, order[rows_before < share * len(users)])
    return found


def _needs_features(args: TracesArguments, settings: PromptSettings) -> bool:
    return args.teacher == "evidence" or settings.evidence != "none"


def _open_teacher(args: TracesArguments, given: TrainingRows, out_dir: Path) -> Teacher:
    """The teacher of the recipe."""
    told, prompter = args.strategy == "targeted", given.prompter
    if args.teacher == "evidence":
        logger.info("the teacher `evidence` is no language model: LambdaMART ranks and templates word its facts")
        scores = given.write_scores(args, out_dir)
        return EvidenceTeacher(scores, prompter, args.temperature, args.seed, told, args.grade_ratio)
    teacher = OpenaiTeacher if args.teacher == "openai" else VllmTeacher
    return teacher(args, PromptWriter(prompter, told))


def _refuse_nothing_accepted(metrics: Mapping[str, Any], folders: Sequence[Path]) -> None:
    if not metrics["accepted"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in metrics["reasons"].items())
        raise ValueError(
            f"none of {metrics['attempts']} attempts on {metrics['rows']} rows was accepted ({reasons}); read "
            f"{folders[0] / 'attempts'}*, then change the teacher or the prompt and delete "
            f"{' and '.join(map(str, folders))}."
        )


def _log(metrics: Mapping[str, Any]) -> None:
    by_rank = [f"{rank}: {part['yield']:.0%}" for rank, part in metrics["yield_by_first_stage_rank"].items()]
    text = (
        "{accepted} traces accepted, at least one for {yield:.1%} of {rows} rows (by first-stage rank of the target "
        "{by_rank}) after {mean_attempts:.1f} attempts a row; {distinct_trace_share:.1%} of the traces are distinct"
    )
    if metrics["strategy"] == "targeted":
        text += ", {gives_answer_away_share:.1%} give the answer away"
    logger.info("%s", text.format(**metrics, by_rank=", ".join(by_rank)))


def _write(out_dir: Path, attempts: pa.Table, settings: PromptSettings) -> None:
    """The artifacts; the attempts come last, so that a crash on the way loses nothing."""
    accepted = attempts.filter(attempts["accepted"]).select(["row_id", "trace", "order"])
    pq.write_table(accepted, out_dir / "accepted.parquet")
    settings.save(out_dir)
    AttemptStore(out_dir).merge(attempts)


STAGE = Stage(
    name="traces",
    arguments=(TracesArguments, PromptSettings),
    main=main,
    check=check,
    main_of_shard=make_shard,
    inputs=("data", "candidates"),
    optional_inputs=lambda args, settings: ("semantic_ids",) if settings.shows_ids else (),
    inputs_if_made=("semantic_ids",),
    do_without={"semantic_ids": WITHOUT_IDS},
    files=("teacher_model",),
)
