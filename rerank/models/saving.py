"""Beside a trained model's weights: the files that asking it later needs, its card, and the check that it fits a
catalogue."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from rerank.catalogue import Catalogue, check_vocabulary
from rerank.launch import model_card, run_dir
from rerank.launch.files import write_json
from rerank.models import names
from rerank.rows import FEATURES_FILE

if TYPE_CHECKING:
    from rerank.rows import Prompter


def save_ranker(run: str | Path, prompter: "Prompter", folder: Path, trace: bool, max_completion_tokens: int) -> None:
    """Save what ranking new rows with the model of `folder` needs: prompt settings, catalogue, evidence, lengths.

    Args:
        run: Folder of the run.
        prompter: Of the rows that it was trained on.
        folder: STAGE/model or STAGE.partial/model.
        trace: Whether its completions hold a trace.
        max_completion_tokens: Of a completion.
    """
    prompter.settings.save(folder)
    prompter.catalogue.save(folder)
    for name in (FEATURES_FILE, "evidence.npz"):
        shutil.copy2(run_dir.stage_dir(run, "candidates") / name, folder / name)
    num_candidates = run_dir.read_metrics(run, "candidates")["num_candidates"]
    generation = {"max_completion_tokens": max_completion_tokens, "trace": trace, "num_candidates": num_candidates}
    write_json(folder / "generation.json", generation)
    write_card(run, folder, folder.parent.name.removesuffix(".partial"), model_card.ranker(num_candidates, trace))


def write_card(run: str | Path, folder: Path, stage: str, what: str) -> None:
    """Write the README.md of a model that a stage trained from the run's mid-trained one.

    Args:
        run: Folder of the run.
        folder: Of the model.
        stage: The model's last training stage.
        what: A title and a paragraph.
    """
    midtrain = yaml.safe_load((run_dir.stage_dir(run, "midtrain") / "recipe.yaml").read_text())
    model_card.write(folder, run, stage, what, midtrain.get("model_name_or_path"))


def check_model(model_dir: str | Path, catalogue: Catalogue) -> None:
    """Refuse a model folder that is not there or whose tokenizer lacks a semantic id of the catalogue."""
    from transformers import AutoTokenizer

    folder = names.resolve(str(model_dir), "model")
    check_vocabulary(AutoTokenizer.from_pretrained(folder), catalogue.semantic_ids, str(model_dir))
