"""Stage: a teacher's reasoning, sampled, judged, kept or rejected.

In: candidates/ (training rows whose list holds a relevant item), data/ and semantic_ids/ (the catalogue).
Out: accepted.parquet (row_id, trace, order: positions into candidates, best first), attempts.parquet (every draw and
why it was kept or not), row_split.parquet (row_id, used_for: sft or dapo), prompt.json (the prompt that all later
stages share), features.json.

Teachers: `vllm` (offline engine), `openai` (any OpenAI-compatible server), `evidence` (no language model). Strategies:
`rejection` hides the answer and draws until the first item is a most relevant one; `targeted` tells it and draws once.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.traces --config recipes/ml100k/5_traces.yaml
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rerank import prompts, recipe, run_dir
from rerank.catalogue import Catalogue
from rerank.prompts import PromptSettings
from rerank.traces import rows as trace_rows
from rerank.traces.attempts import AttemptStore, Teacher, collect, summarize
from rerank.traces.evidence import EVIDENCE_WORDS, EvidenceTeacher, fit_scores
from rerank.traces.teachers import OpenaiTeacher, PromptWriter, VllmTeacher, check_model_folder, check_server

__all__ = ["ARGUMENTS", "EVIDENCE_WORDS", "INPUTS", "TracesArguments", "check", "main"]

logger = logging.getLogger(__name__)

TEACHERS = ("vllm", "openai", "evidence")
STRATEGIES = ("rejection", "targeted")
INPUTS = ("data", "semantic_ids", "candidates")


@dataclass
class TracesArguments(recipe.StageArguments):
    """Options of the stage; the prompt's own stand in `PromptSettings`."""

    teacher: str = field(
        default="vllm", metadata={"help": "Who writes: vllm, openai (a server), or evidence (no language model)."}
    )
    teacher_model: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the model; for openai its name at the server."}
    )
    base_url: str = field(
        default="http://localhost:8000/v1",
        metadata={"help": "Address of the openai teacher; default: `vllm serve`'s."},
    )
    strategy: str = field(
        default="rejection",
        metadata={"help": "rejection: draw until a most relevant item comes first; targeted: tell it, draw once."},
    )
    traces_per_row: int = field(default=1, metadata={"help": "Accepted attempts wanted of a row, under rejection."})
    max_attempts: int = field(default=8, metadata={"help": "Draws a row at most, for rejection."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature; for evidence the scale of the noise on its scores."}
    )
    max_completion_tokens: int = field(default=1024, metadata={"help": "Longest completion of a language model."})
    teacher_max_length: int | None = field(
        default=None, metadata={"help": "vllm: prompt and completion in tokens; default: the model's own limit."}
    )
    teacher_dtype: str = field(default="auto", metadata={"help": "vllm: number type, such as bfloat16 or float32."})
    max_concurrency: int = field(default=16, metadata={"help": "openai: requests at a time."})
    max_retries: int = field(default=5, metadata={"help": "openai: tries after a failed request."})
    batch_size: int = field(default=512, metadata={"help": "Draws between two saves."})
    max_rows: int = field(default=0, metadata={"help": "Rows to write traces for, drawn with `seed`; 0 for all."})
    rows_for_sft: float = field(
        default=1.0,
        metadata={"help": "Share of the hit training rows, whole users, that SFT gets; DAPO gets the rest."},
    )
    seed: int = field(default=0, metadata={"help": "Of the split, the choice of rows and the draws."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("teacher", TEACHERS), ("strategy", STRATEGIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be one of {', '.join(known)}.")
        for name in ("max_attempts", "traces_per_row", "max_completion_tokens", "max_concurrency", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1.")
        for name in ("temperature", "max_rows", "max_retries", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 0.")
        if not 0 < self.rows_for_sft <= 1:
            raise ValueError(f"rows_for_sft is {self.rows_for_sft} but must be above 0 and at most 1.")
        if self.teacher != "evidence" and not self.teacher_model:
            raise ValueError(f"teacher_model is missing but teacher is {self.teacher}; name the model.")
        if self.strategy == "rejection" and self.max_attempts > 1 and self.temperature == 0:
            raise ValueError(
                f"temperature is 0, so that all {self.max_attempts} draws of a row are the same; "
                "raise it or set max_attempts to 1."
            )


ARGUMENTS = (TracesArguments, PromptSettings)


def check(args: TracesArguments, settings: PromptSettings) -> None:
    """Refuse a teacher that is not there and candidates without the evidence that is asked for."""
    if args.teacher == "vllm":
        check_model_folder(args.teacher_model)
    if run_dir.is_finished(args.run_dir, "candidates"):
        if args.teacher == "openai":  # until the stage can start, its server need not run
            check_server(args.base_url, args.teacher_model)
        folder = run_dir.stage_dir(args.run_dir, "candidates")
        trace_rows.check_features(folder / "train.parquet", _needs_features(args, settings))
        trace_rows.check_edges(folder, settings)


def main(args: TracesArguments, settings: PromptSettings, out_dir: Path) -> dict[str, Any]:
    """Split the rows, let the teacher write, keep what puts a most relevant item first."""
    candidates = run_dir.stage_dir(args.run_dir, "candidates")
    catalogue = Catalogue.load(args.run_dir)
    feature_names, edges = trace_rows.read_feature_names(candidates)
    rows = trace_rows.read_hit_rows(candidates / "train.parquet", _needs_features(args, settings))
    sft_users = trace_rows.users_for_sft([row["user"] for row in rows], args.rows_for_sft, args.seed)
    trace_rows.write_split(out_dir / "row_split.parquet", rows, sft_users)
    sft_rows = [row for row in rows if row["user"] in sft_users]
    chosen = trace_rows.choose(sft_rows, args.max_rows, args.seed)

    store = AttemptStore(out_dir)
    labels = [prompts.candidate_labels(row, catalogue, settings) for row in chosen]
    told = args.strategy == "targeted"

    open_teacher = partial(_open_teacher, args, settings, catalogue, rows, feature_names, edges)
    collect(
        chosen,
        labels,
        open_teacher,
        store,
        1 if told else args.max_attempts,
        args.batch_size,
        args.seed,
        args.traces_per_row,
    )
    metrics = {
        "teacher": args.teacher,
        "teacher_model": args.teacher_model,
        "teacher_is_language_model": args.teacher != "evidence",
        "strategy": args.strategy,
        "knowledge_priming": settings.knowledge_priming,
        "hit_rows": len(rows),
        "sft_rows": len(sft_rows),
        "dapo_rows": len(rows) - len(sft_rows),
        **summarize(store.read()),
    }
    _refuse_nothing_accepted(metrics, out_dir)
    _log(metrics)
    _write(out_dir, store, settings, candidates)
    return metrics


def _needs_features(args: TracesArguments, settings: PromptSettings) -> bool:
    return args.teacher == "evidence" or settings.evidence != "none"


def _open_teacher(
    args: TracesArguments,
    settings: PromptSettings,
    catalogue: Catalogue,
    rows: Sequence[trace_rows.Row],
    feature_names: Sequence[str],
    edges: Mapping[str, Sequence[float]],
) -> Teacher:
    """The teacher of the recipe; `rows` are all hit training rows, on which LambdaMART is fitted."""
    told = args.strategy == "targeted"
    if args.teacher == "evidence":
        logger.info("the teacher `evidence` is no language model: LambdaMART ranks and templates word its facts")
        scores = fit_scores(rows, run_dir.stage_dir(args.run_dir, "candidates") / "valid.parquet", args.seed)
        return EvidenceTeacher(scores, catalogue, settings, edges, feature_names, args.temperature, args.seed, told)
    write_prompt = PromptWriter(catalogue, settings, edges, feature_names, told)
    sampling = (write_prompt, args.temperature, args.max_completion_tokens)
    if args.teacher == "openai":
        return OpenaiTeacher(args.teacher_model, args.base_url, *sampling, args.max_concurrency, args.max_retries)
    return VllmTeacher(args.teacher_model, *sampling, args.teacher_max_length, args.teacher_dtype, args.seed)


def _refuse_nothing_accepted(metrics: Mapping[str, Any], out_dir: Path) -> None:
    if not metrics["accepted"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in metrics["reasons"].items())
        raise ValueError(
            f"none of {metrics['attempts']} attempts on {metrics['rows']} rows was accepted ({reasons}); read "
            f"{out_dir / 'attempts'}, then change the teacher or the prompt and delete {out_dir}."
        )


def _log(metrics: Mapping[str, Any]) -> None:
    by_rank = metrics["yield_by_first_stage_rank"]
    told = (
        f", {metrics['gives_answer_away_share']:.1%} give the answer away" if metrics["strategy"] == "targeted" else ""
    )
    logger.info(
        "%d traces accepted, at least one for %.1f%% of %d rows (by first-stage rank of the target %s) "
        "after %.1f attempts a row; %.1f%% of the traces are distinct%s",
        metrics["accepted"],
        100 * metrics["yield"],
        metrics["rows"],
        ", ".join(f"{rank}: {100 * part['yield']:.0f}%" for rank, part in by_rank.items()),
        metrics["mean_attempts"],
        100 * metrics["distinct_trace_share"],
        told,
    )


def _write(out_dir: Path, store: AttemptStore, settings: PromptSettings, candidates: Path) -> None:
    """The artifacts; the attempts come last, so that a crash on the way loses nothing."""
    attempts = store.read()
    accepted = attempts.filter(attempts["accepted"]).select(["row_id", "trace", "order"])
    pq.write_table(accepted, out_dir / "accepted.parquet")
    settings.save(out_dir)
    if (candidates / "features.json").is_file():
        shutil.copyfile(candidates / "features.json", out_dir / "features.json")
    store.merge()
