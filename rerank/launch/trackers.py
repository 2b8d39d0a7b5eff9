"""Experiment trackers of `report_to`: a run's name there, and the refusal of one that is not installed."""

from collections.abc import Sequence
from pathlib import Path

PROJECT = "rerank"  # where the recipe sets no `project`, and the environment no WANDB_PROJECT


def default_run_name(run_dir: str, stage: str) -> str:
    """The name of a stage's training in a tracker: RUN/STAGE."""
    return f"{Path(run_dir).resolve().name}/{stage}"


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """Refuse a tracker that transformers does not know or that is not installed.

    transformers itself asks for it when it makes the trainer, after the model is loaded.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()  # asks for its package
        except (ImportError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"report_to names {name}: {reason}; or set report_to: none") from None
