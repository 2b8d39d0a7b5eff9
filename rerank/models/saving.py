"""A trained model's folder: weights, the files that asking it later needs, its card, and the check that it fits a
catalogue."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rerank.catalogue import Catalogue, check_vocabulary
from rerank.launch import model_card, run_dir
from rerank.launch.files import write_json
from rerank.launch.named_files import FileRecord
from rerank.models.base import load_tokenizer
from rerank.models.ranker import EVIDENCE_FILE
from rerank.rows import FEATURES_FILE
from rerank.rows.checks import list_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from rerank.rows import Prompter

BRAND = "brand"  # of items, on which a fact rests
SOURCES_FILE, ID_TOKENIZER = "items.json", "id_tokenizer.npz"
OF_ITEMS = ("item_columns", "text_columns", "category_separator", "items_format", "items_csv")  # keys of a recipe
OF_INTERACTIONS = ("columns", "format", "csv", "where", "dedupe", "split", "min_user_interactions")


@dataclass(frozen=True)
class ItemSources:
    """How a trained model came to know its items, so that new ones can follow: `items.json` of its folder.

    Attributes:
        reading: Keys of the data stage by which items and interactions are read; folders of earlier versions have
            fewer.
        encoder: The sentence encoder of their texts; None where embeddings were given, or there are none.
        num_items: Of the catalogue that it was trained on.
    """

    reading: dict[str, Any]
    encoder: FileRecord | None
    num_items: int

    @classmethod
    def of_run(cls, run: str | Path, num_items: int) -> "ItemSources":
        """Those of a run's data and semantic_ids stages."""
        keys, encoder = run_dir.read_record(run, "data").given, encoder_of(run)
        reading = {name: keys.get(name) for name in (*OF_ITEMS, *OF_INTERACTIONS, "on_bad_rows")}
        return cls(reading, encoder, num_items)

    @classmethod
    def load(cls, folder: Path) -> "ItemSources":
        """Those of a model folder."""
        path = folder / SOURCES_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, so the model cannot take new items: the folder is of an earlier version, or was "
                "copied in part; copy the whole folder, or train it again"
            )
        found = json.loads(path.read_text())
        encoder = None if found["encoder"] is None else FileRecord(**found["encoder"])
        return cls(found["reading"], encoder, found["num_items"])


def encoder_of(run: str | Path) -> FileRecord | None:
    """The sentence encoder of a run's items, with its content where it was a file; None without one."""
    stages = [stage for stage in ("semantic_ids", "candidates") if run_dir.is_finished(run, stage)]
    if not stages:
        return None
    record = run_dir.read_record(run, stages[0])
    name = record.given.get("encoder")
    files = (file for file in record.files if file.key == "encoder")
    return None if name is None else next(files, FileRecord("encoder", str(name)))


def save_item_sources(run: str | Path, folder: Path, num_items: int) -> None:
    """Save what new items need to become known to the model of `folder`.

    Args:
        run: Folder of the run.
        folder: Of the model.
        num_items: Of its catalogue.
    """
    write_json(folder / SOURCES_FILE, dataclasses.asdict(ItemSources.of_run(run, num_items)))
    if run_dir.is_finished(run, "semantic_ids"):
        shutil.copy2(run_dir.stage_dir(run, "semantic_ids") / "tokenizer.npz", folder / ID_TOKENIZER)


@contextlib.contextmanager
def _by_one_process(trainer: "Trainer") -> Iterator[None]:
    """Within it one process loads a whole model; transformers' ZeRO-3 would shard it and wait for the others."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.hf_ds_config)


def save_trained(
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerBase",
    base_dir: str | Path,
    folder: Path,
    kept: Path | None = None,
) -> None:
    """Save a trainer's model as a plain model folder, a LoRA adapter merged into the model of `base_dir`.

    Every process must call it, since a sharded model is gathered.

    Args:
        kept: Where `trainer.save_model` has saved the weights to take in place of the present ones.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    is_adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    saved = folder.with_name(f"{folder.name}_adapter") if is_adapter else folder
    if kept is None:
        trainer.save_model(str(saved))
    if not trainer.accelerator.is_main_process:
        return
    if kept is not None:
        shutil.copytree(kept, saved, dirs_exist_ok=True)
    if is_adapter:
        with _by_one_process(trainer):
            base = AutoModelForCausalLM.from_pretrained(base_dir, dtype="float32")  # its folder may have no tokenizer
            PeftModel.from_pretrained(base, str(saved)).merge_and_unload().save_pretrained(folder)
    (folder / "training_args.bin").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def save_ranker(
    run: str | Path,
    prompter: "Prompter",
    folder: Path,
    trace: bool,
    max_completion_tokens: int,
    base: str | None = None,
    one_token: bool = False,
) -> None:
    """Save what ranking new rows with the model of `folder` needs: prompt settings, catalogue, evidence, lengths.

    Args:
        run: Folder of the run.
        prompter: Of the rows that it was trained on.
        folder: STAGE/model or STAGE.partial/model.
        trace: Whether its completions hold a trace.
        max_completion_tokens: Of a completion.
        base: The pretrained model that this stage starts from, where no earlier stage of the run has made its model.
        one_token: Whether it ranks by the probabilities of the first label alone.
    """
    prompter.settings.save(folder)
    prompter.catalogue.save(folder, [*prompter.settings.item_fields, BRAND])
    save_item_sources(run, folder, len(prompter.catalogue))
    candidates_dir = run_dir.stage_dir(run, "candidates")
    for name in (FEATURES_FILE, EVIDENCE_FILE):
        shutil.copy2(candidates_dir / name, folder / name)
    shortest, longest = list_lengths(candidates_dir / "train.parquet")
    generation = {"max_completion_tokens": max_completion_tokens, "trace": trace, "num_candidates": longest}
    ways = {"one_token": one_token, "bypass_reasoning": prompter.bypass_reasoning}
    write_json(folder / "generation.json", {**generation, **ways})
    what = model_card.ranker(shortest, longest, trace, one_token)
    write_card(run, folder, folder.parent.name.removesuffix(".partial"), what, base)


def write_card(run: str | Path, folder: Path, stage: str, what: str, base: str | None = None) -> None:
    """Write the README.md of a model that a stage of the run trained.

    Args:
        run: Folder of the run.
        folder: Of the model.
        stage: The model's last training stage.
        what: A title and a paragraph.
        base: The pretrained model that this stage starts from, where no earlier stage of the run has made its model.
    """
    model_card.write(folder, run, stage, what, base or _base_model(run))


def _base_model(run: str | Path) -> str | None:
    """The pretrained model that the first training stage of a run started from; None for a small one made by it."""
    paths = [run_dir.stage_dir(run, stage) / "recipe.yaml" for stage in ("midtrain", "sft")]
    first = next((path for path in paths if path.is_file()), None)
    return None if first is None else yaml.safe_load(first.read_text()).get("model_name_or_path")


def check_model(model_dir: str | Path, catalogue: Catalogue) -> None:
    """Refuse a model folder that is not there or whose tokenizer lacks a semantic id of the catalogue."""
    check_vocabulary(load_tokenizer(str(model_dir)), catalogue.semantic_ids, str(model_dir))
