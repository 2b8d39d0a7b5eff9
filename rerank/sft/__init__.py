"""Stage 6: fine-tune the mid-trained model on accepted traces, or on next items.

Task `rerank`. In: midtrain, candidates and traces. Out: `model/`, and with `no_trace_control` also `model_no_trace/`,
trained for as many steps on the same rows with an empty trace: what the reasoning is worth is the difference.
Task `next_item`. In: midtrain. Out: `model/`, which writes the item that follows a history.

What is minimised is a list of named losses, by default `nll` with GR2's weights (arXiv:2606.31984 eq. 3);
`rerank losses` lists them all.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.sft --config recipes/ml100k/6_sft.yaml
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, SFTConfig, get_peft_config

from rerank import base_model, model_card, recipe, run_dir, stopping
from rerank.catalogue import Catalogue, check_vocabulary
from rerank.item_rows import ITEM_TEXTS, SETTINGS, ItemRows
from rerank.losses import Losses, load_losses
from rerank.midtrain.dropout import residual_dropout
from rerank.prompts import THINK_END
from rerank.sft.rerank_rows import RowEncoder, examples, save_ranker, training_rows

__all__ = ["RowEncoder", "check_model", "save_ranker", "training_rows"]

logger = logging.getLogger(__name__)

INPUTS = ("data", "semantic_ids", "midtrain")
TASKS = ("rerank", "next_item")
TARGETS = ("all", "last")


@dataclass
class SftArguments(recipe.StageArguments):
    """Options of the sft stage."""

    task: str = field(
        default="rerank",
        metadata={"help": "rerank: history and candidates to trace and ranking; next_item: history to next item."},
    )
    losses: list[dict[str, Any]] = field(
        default_factory=lambda: [{"name": "nll"}],
        metadata={"help": "What is minimised: one token loss and what goes with it, each {name: ..., kwargs: {...}}."},
    )
    no_trace_control: bool = field(
        default=False, metadata={"help": "rerank: also train a model without traces, for equally many steps."}
    )
    item_text: str = field(
        default="semantic_id", metadata={"help": f"next_item: how an item is written: {' or '.join(ITEM_TEXTS)}."}
    )
    targets: str = field(
        default="all",
        metadata={
            "help": "next_item: all: every item of the users' training sequences is a target; last: those of the "
            "split rerank, one a row."
        },
    )
    max_items: int = field(default=20, metadata={"help": "next_item: items of a row, its target included."})
    dropout: float = field(
        default=0.0,
        metadata={"help": "Share dropped of what the embedding and each branch of a layer give, as in midtrain."},
    )
    max_minutes: float | None = field(default=None, metadata={"help": "End each training after this many minutes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("task", TASKS), ("item_text", ITEM_TEXTS), ("targets", TARGETS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")
        if self.max_items < 2:
            raise ValueError(f"max_items is {self.max_items} but must be at least 2: a history and its next item")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout} but must be at least 0 and below 1")
        if self.no_trace_control and self.task == "next_item":
            raise ValueError("no_trace_control is for the task rerank; next_item has no traces, so take it out")
        load_losses(self.losses, self.task)


ARGUMENTS = (SftArguments, SFTConfig, ModelConfig)


def extra_inputs(args: SftArguments) -> tuple[str, ...]:
    """Stages that are read only for a task."""
    return ("candidates", "traces") if args.task == "rerank" else ()


def check(args: SftArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse packing, TRL's losses, and a model whose tokenizer lacks the catalogue's semantic ids."""
    if training_args.packing:
        raise ValueError("packing is not for the sft stage, whose rows are asked for one by one; set it to false")
    if training_args.loss_type not in ("nll", "chunked_nll") or training_args.label_smoothing_factor:
        raise ValueError("loss_type and label_smoothing_factor are TRL's; the recipe's losses: say what is minimised")
    if run_dir.is_finished(args.run_dir, "midtrain") and run_dir.is_finished(args.run_dir, "semantic_ids"):
        check_model(run_dir.stage_dir(args.run_dir, "midtrain") / "model", Catalogue.load(args.run_dir))


def check_model(model_dir: str | Path, catalogue: Catalogue) -> None:
    """Refuse a model folder that is not there or that speaks other semantic ids than the catalogue's.

    Raises:
        FileNotFoundError: When the folder is not there.
        ValueError: Naming the first id token that the tokenizer lacks.
    """
    from transformers import AutoTokenizer

    folder = base_model.find_base_model(str(model_dir))
    check_vocabulary(AutoTokenizer.from_pretrained(folder), catalogue.semantic_ids, str(model_dir))


def check_lengths(rows: list[Mapping[str, Any]], max_length: int | None) -> None:
    """Refuse rows that would be cut.

    Raises:
        ValueError: Saying how many.
    """
    too_long = sum(len(row["input_ids"]) > (max_length or 1 << 30) for row in rows)
    if too_long:
        raise ValueError(f"{too_long} of {len(rows)} rows are longer than max_length {max_length}; raise it")


def make_trainer(
    config: SFTConfig,
    model_args: ModelConfig,
    model: Any,
    tokenizer: Any,
    rows: dict[str, list[dict[str, Any]]],
    losses: Losses,
    **options: Any,
) -> Any:
    """The trainer of rows of several tasks, in random order; a row gets the number of its task and its own."""
    from datasets import Dataset
    from transformers import set_seed

    from rerank.sft.trainer import LossTrainer

    set_seed(config.seed)  # an adapter starts at random before the trainer sets its seed
    numbered = [row | {"task": task} for task, of_task in enumerate(rows.values()) for row in of_task]
    check_lengths(numbered, config.max_length)
    return LossTrainer(
        model,
        config,
        losses,
        tuple(rows),
        train_dataset=Dataset.from_list([row | {"number": number} for number, row in enumerate(numbered)]),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        **options,
    )


def train_and_save(args: SftArguments, trainer: Any, tokenizer: Any, base_dir: Path, folder: Path) -> dict:
    """Train from the last checkpoint on, write the model folder and the log, and let go; returns the metrics."""
    from rerank.sft.trainer import PARAMETERS_FILE

    with residual_dropout(trainer.model, args.dropout):
        stopping.train(trainer, args.max_minutes)
    base_model.save_trained(trainer, tokenizer, base_dir, folder)
    (folder / PARAMETERS_FILE).unlink(missing_ok=True)  # for checkpoints; what a loss leaves, it saves itself
    if trainer.accelerator.is_main_process:
        name = f"log_history{folder.name.removeprefix('model')}.json"
        run_dir.write_json(folder.parent / name, trainer.state.log_history)
        for extra in trainer.losses.extras.values():
            extra.save(folder)
    stopping.release(trainer)
    return {"steps": trainer.state.global_step, "train_loss": trainer.state.log_history[-1].get("train_loss")}


def fit(args: SftArguments, config: SFTConfig, model_args: ModelConfig, folder: Path, with_trace: bool) -> dict:
    """Train one re-ranker into `folder`; returns its metrics."""
    base_dir = run_dir.stage_dir(args.run_dir, "midtrain") / "model"
    model, tokenizer = base_model.load_pretrained(str(base_dir), model_args)
    encoder = RowEncoder(args.run_dir, tokenizer)
    encoded = examples(encoder, args.run_dir, with_trace)
    lengths = [sum(label != -100 for label in row["labels"]) for row in encoded]
    trace_end = tokenizer.convert_tokens_to_ids(THINK_END) if with_trace else None
    losses = load_losses(args.losses, args.task)
    trainer = make_trainer(config, model_args, model, tokenizer, {"rerank": encoded}, losses, trace_end=trace_end)
    is_main = trainer.accelerator.is_main_process
    metrics = train_and_save(args, trainer, tokenizer, base_dir, folder)
    if is_main:
        # room for traces somewhat longer than any seen
        save_ranker(args.run_dir, encoder, folder, with_trace, max(lengths) + max(lengths) // 4)
    return {
        "rows": len(encoded),
        **metrics,
        "mean_completion_tokens": sum(lengths) / len(lengths),
        "max_completion_tokens": max(lengths),
    }


def fit_next_item(args: SftArguments, config: SFTConfig, model_args: ModelConfig, folder: Path) -> dict:
    """Train a model of next items into `folder`; returns its metrics."""
    losses = load_losses(args.losses, "next_item")
    base_dir = run_dir.stage_dir(args.run_dir, "midtrain") / "model"
    model, tokenizer = base_model.load_pretrained(str(base_dir), model_args)
    maker = ItemRows(
        Catalogue.load(args.run_dir),
        tokenizer,
        args.item_text,
        args.max_items,
        drops_forced=losses.masks_first,
        run=args.run_dir,
        seed=config.seed,
        max_length=config.max_length,
    )
    rows = {"next_item": maker.next_item_rows(args.targets)}
    for extra in losses.extras.values():
        for task, added in extra.rows(maker).items():
            rows[task] = rows.get(task, []) + added
    tokens = {task: sum(label != -100 for row in of_task for label in row["labels"]) for task, of_task in rows.items()}
    logger.info("rows: %s, tokens under loss: %s", {task: len(added) for task, added in rows.items()}, tokens)
    trainer = make_trainer(config, model_args, model, tokenizer, rows, losses, maker=maker)
    is_main = trainer.accelerator.is_main_process
    metrics = train_and_save(args, trainer, tokenizer, base_dir, folder)
    if is_main:
        maker.catalogue.save(folder)
        run_dir.write_json(folder / SETTINGS, maker.settings(losses.masks_first))
        midtrain = yaml.safe_load((run_dir.stage_dir(args.run_dir, "midtrain") / "recipe.yaml").read_text())
        model_card.write(folder, args.run_dir, "sft", model_card.NEXT_ITEM, midtrain.get("model_name_or_path"))
    return {"rows": {task: len(added) for task, added in rows.items()}, "tokens_under_loss": tokens, **metrics}


def main(args: SftArguments, training_args: SFTConfig, model_args: ModelConfig, out_dir: Path) -> dict:
    """Train the model of the task; with traces, then the control without; returns the metrics."""
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    if args.task == "next_item":
        return fit_next_item(args, training_args, model_args, out_dir / "model")
    control = copy.deepcopy(training_args)
    metrics = fit(args, training_args, model_args, out_dir / "model", with_trace=True)
    if args.no_trace_control:
        control.output_dir = f"{control.output_dir}_no_trace"
        control.max_steps = metrics["steps"]
        metrics["no_trace"] = fit(args, control, model_args, out_dir / "model_no_trace", with_trace=False)
    return metrics
