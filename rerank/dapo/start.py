"""The model that the dapo stage starts from."""

import contextlib
import json
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerank.catalogue import Catalogue
from rerank.launch import run_dir
from rerank.models import names
from rerank.models.ranker import RankingModel
from rerank.prompts import PromptSettings
from rerank.rows import read_feature_names

if TYPE_CHECKING:
    from rerank.dapo import DapoArguments, DapoConfig


_TO_BE_MADE: ContextVar[Collection[Path]] = ContextVar("to be made", default=())


@contextlib.contextmanager
def to_be_made(folders: Collection[Path]) -> Iterator[None]:
    """Within it a `start_model` may be one of these folders, which an earlier run of the same command makes."""
    token = _TO_BE_MADE.set([folder.absolute() for folder in folders])
    try:
        yield
    finally:
        _TO_BE_MADE.reset(token)


def is_to_be_made(folder: Path) -> bool:
    """Whether a model folder that is not there is one of `to_be_made`."""
    return not folder.exists() and folder.absolute() in _TO_BE_MADE.get()


def start_dir(args: "DapoArguments") -> Path:
    """The model to start from: of the sft stage, or the one that the recipe names."""
    if args.start_model:
        return Path(names.locate(args.start_model, "start_model"))
    return run_dir.stage_dir(args.run_dir, "sft") / ("model_no_trace" if args.without_trace else "model")


def check_start(folder: Path, run: str) -> None:
    """Refuse a `start_model` that is none, or was trained on other prompts or items than those of the run."""
    RankingModel.load(folder)
    traces = run_dir.stage_dir(run, "traces")
    if not run_dir.is_finished(run, "traces"):
        return
    prompts = PromptSettings.load(folder) == PromptSettings.load(traces)
    features = read_feature_names(folder) == read_feature_names(run_dir.stage_dir(run, "candidates"))
    if not prompts or not features or Catalogue.load(folder) != Catalogue.load(run):
        raise ValueError(
            f"start_model {folder} was trained on other prompts or items than those of {run}; give a model of the "
            "same data, semantic_ids, candidates and traces recipes"
        )


def token_limit(config: "DapoConfig", base_dir: Path) -> int:
    """The token limit of a completion: the recipe's, or what the sft stage found enough."""
    if config.max_completion_length is not None:
        return config.max_completion_length
    return generation_of(base_dir)["max_completion_tokens"]


def generation_of(folder: Path) -> dict[str, Any]:
    """The limits of the completions of a model, which the sft stage wrote beside it."""
    return json.loads((folder / "generation.json").read_text())


def refuse_one_token(folder: Path) -> None:
    """Refuse a model that writes no ranking, since it was trained on first labels alone."""
    if generation_of(folder).get("one_token"):
        raise ValueError(
            f"{folder} was trained on rankings' first labels alone, so that it writes no ranking to reward; leave "
            "dapo out, or train sft with the losses nll and ranknet"
        )
