"""Stage 6: fine-tune the mid-trained model, or a pretrained one, on accepted traces, or on next items.

Task `rerank`. In: midtrain, candidates and traces. Out: `model/`, and with `no_trace_control` also `model_no_trace/`,
trained for the same number of steps on the same rows with an empty trace: the difference is the worth of reasoning.
Both are the best of their checks on validation rows (`rerank.launch.validation`).
Task `next_item`. In: midtrain. Out: `model/`, which writes the item that follows a history.
A recipe without a midtrain stage names a pretrained model in `model_name_or_path`.

A list of named losses is minimised, by default `nll` with GR2's weights (arXiv:2606.31984 eq. 3); `rerank losses`
lists them all. After `soft_targets` a model ranks by the probabilities of the first label (`rerank.models.one_token`).

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.sft --config recipes/ml100k/6_sft.yaml
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from trl import ModelConfig, SFTConfig

from rerank.catalogue import Catalogue
from rerank.launch import model_card, run_dir, stopping, validation
from rerank.launch.files import delete_folder, write_json
from rerank.launch.stages import Stage
from rerank.launch.values import check_choice, check_range, option
from rerank.losses import FOLDER as LOSSES
from rerank.losses import Losses, Row, load_losses
from rerank.models import adapters, one_token
from rerank.models.configs import context_length, load_config
from rerank.models.dropout import residual_dropout
from rerank.models.ranker import complete_greedily
from rerank.models.saving import save_item_sources, save_ranker, save_trained, write_card
from rerank.next_item.encoder import ITEM_TEXTS, NextItemEncoder
from rerank.prompts import THINK_END
from rerank.rows import PromptedRow, Prompter, RankingRow
from rerank.rows.checks import check_context, longest_field, prompt_lengths, shorter
from rerank.rows.on_read import MadeOnRead, joined
from rerank.rows.teacher_scores import read_scores
from rerank.sft.rows import check_and_keep, check_of, examples
from rerank.sft.start import check_sizes, check_start, load_start, load_start_tokenizer, start_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rerank.sft.trainer import LossTrainer

logger = logging.getLogger(__name__)

TASKS = ("rerank", "next_item")
TARGETS = ("all", "last")


@dataclass
class SftArguments(validation.ValidatedArguments):
    """Options of the sft stage."""

    task: str = option("rerank", "rerank: candidates to trace and ranking; next_item: history to next item.")
    losses: list[dict[str, Any]] = option(
        [{"name": "nll"}], "One token loss and auxiliary losses beside it, each {name: ..., kwargs: {...}}."
    )
    with_trace: bool = option(True, "rerank: train on traces; false: on rankings alone.")
    as_accepted: bool = option(
        False, "rerank: teach the ranking that an accepted trace leads to; false: the gold one, by relevance first."
    )
    no_trace_control: bool = option(False, "rerank: also train a model without traces, for the same number of steps.")
    item_text: str = option("semantic_id", f"next_item: {' or '.join(ITEM_TEXTS)}.")
    targets: str = option("all", "next_item: all items of training sequences, or last: the split rerank's.")
    max_items: int = option(20, "next_item: items of a row, its target included.")
    dropout: float = option(0.0, "Share dropped of the outputs of the embedding and of each branch of a layer.")
    max_minutes: float | None = option(None, "End each training after this many minutes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task", self.task, TASKS)
        check_choice("item_text", self.item_text, ITEM_TEXTS)
        check_choice("targets", self.targets, TARGETS)
        check_range("max_items", self.max_items, least=2)  # a history and its next item
        check_range("dropout", self.dropout, least=0, below=1)
        if self.no_trace_control and self.task == "next_item":
            raise ValueError("no_trace_control is for the task rerank; next_item has no traces, so take it out")
        if not self.with_trace and (self.no_trace_control or self.task == "next_item"):
            other = "no_trace_control is true" if self.no_trace_control else "task is next_item, which has no traces"
            raise ValueError(f"with_trace is false but {other}; take one of the two out")
        name = load_losses(self.losses, self.task).one_token
        if name and self.with_trace:
            raise ValueError(f"loss {name} trains on rankings' first labels, without traces; set with_trace: false")


def check(args: SftArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse packing, TRL's losses, and a model whose tokenizer lacks the catalogue's semantic ids."""
    if training_args.packing:
        raise ValueError("packing is not for the sft stage, whose rows are asked for one by one; set it to false")
    if training_args.loss_type not in ("nll", "chunked_nll") or training_args.label_smoothing_factor:
        raise ValueError("loss_type and label_smoothing_factor are TRL's; the recipe's losses: say what is minimised")
    if args.task == "rerank" and run_dir.is_finished(args.run_dir, "candidates"):
        validation.validation_rows(args.run_dir, args.eval_rows)
    if args.task == "rerank" and run_dir.is_finished(args.run_dir, "traces"):
        load_losses(args.losses, args.task, has_scores=bool(read_scores(args.run_dir)))
    if args.task == "next_item" and run_dir.is_finished(args.run_dir, "data"):
        check_sizes(args, training_args, model_args)
    check_start(args, model_args)


def optional_inputs(args: SftArguments, training_args: SFTConfig, model_args: ModelConfig) -> list[str]:
    """A pretrained model takes the place of the mid-trained one."""
    needed = [] if model_args.model_name_or_path is not None else ["midtrain"]
    return [*needed, *(("candidates", "traces") if args.task == "rerank" else ("semantic_ids",))]


def num_labels(rows: Sequence[Row]) -> list[int]:
    """Tokens under loss of each row."""
    return [sum(label != -100 for label in row["labels"]) for row in rows]


def make_trainer(
    config: SFTConfig,
    model_args: ModelConfig,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Mapping[str, Sequence[Row]],
    losses: Losses,
    **options: Any,
) -> "LossTrainer":
    """The trainer of rows of several tasks, in random order; a row gets the number of its task and its own."""
    from transformers import set_seed

    from rerank.rows.dataset import RowDataset
    from rerank.sft.trainer import LossTrainer

    set_seed(config.seed)  # an adapter starts at random before the trainer sets its seed
    every, ends = joined(list(rows.values())), np.cumsum([len(of_task) for of_task in rows.values()])

    def numbered(number: int) -> Row:
        return every[number] | {"task": int(np.searchsorted(ends, number, side="right")), "number": number}

    return LossTrainer(
        model,
        config,
        losses,
        tuple(rows),
        train_dataset=RowDataset.of(MadeOnRead(len(every), numbered)),
        processing_class=tokenizer,
        peft_config=adapters.lora_config(model_args, model),
        **options,
    )


def train_and_save(
    args: SftArguments,
    trainer: "LossTrainer",
    tokenizer: "PreTrainedTokenizerBase",
    base_dir: str,
    folder: Path,
    save: Callable[[], object],
    checks: validation.Validation | None = None,
) -> dict[str, Any]:
    """Train from the last checkpoint on and write the model folder and the log; returns the metrics.

    Args:
        args: Of the stage.
        trainer: Made by `make_trainer`; its memory is released at the end.
        tokenizer: Of the model.
        base_dir: Of the model that it started from.
        folder: Of the model.
        save: Called by the main process, writes what asking the model needs into `folder`.
        checks: Choose the state that is saved; without them it is the last.
    """
    from rerank.sft.trainer import PARAMETERS_FILE

    with residual_dropout(trainer.model, args.dropout):
        stopping.train(trainer, args.max_minutes)
    kept = None if checks is None else checks.finish()
    save_trained(trainer, tokenizer, base_dir, folder, kept)
    if kept is not None:
        trainer.load_loss_parameters(kept)
    (folder / PARAMETERS_FILE).unlink(missing_ok=True)  # for checkpoints; a loss saves what is to stay
    if trainer.accelerator.is_main_process:
        name = f"log_history{folder.name.removeprefix('model')}.json"
        write_json(folder.parent / name, trainer.state.log_history)
        for loss in trainer.losses.auxiliary.values():
            loss.save(folder)
        save()
    stopping.release(trainer)
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    chosen = {} if checks is None else checks.summary()
    return {"steps": trainer.state.global_step, "train_loss": losses[-1] if losses else None, **chosen}


def _longest(prompter: Prompter, rows: Sequence[RankingRow], limit: str, places: Sequence[int], longest: int) -> str:
    """The cure for a row beyond a limit, the longest of those at some places."""
    return f"{shorter(limit)} ({longest_field(prompter, rows[places[longest]])})"


def fit(
    args: SftArguments, config: SFTConfig, model_args: ModelConfig, folder: Path, with_trace: bool
) -> dict[str, Any]:
    """Train one re-ranker into `folder`; returns its metrics."""
    tokenizer, start = load_start_tokenizer(args, model_args), start_model(args, model_args)
    prompter = Prompter.of_run(args.run_dir, tokenizer)
    losses = load_losses(args.losses, args.task)
    stored = Path(str(config.output_dir)) / "rows"
    chosen, rows = examples(prompter, args.run_dir, with_trace, losses, stored, args.as_accepted)
    context = context_length(load_config(start, model_args.model_revision))
    limits = {"max_length": config.max_length, f"the context of {start},": context}
    encoded, made = check_and_keep(rows, check_of(limits, partial(_longest, prompter, chosen)))
    lengths = num_labels(made)
    limit = max(lengths) + max(lengths) // 4  # room for traces somewhat longer than any seen
    if losses.one_token:
        limit = one_token.ANSWER_TOKENS
    validating = validation.validation_rows(args.run_dir, args.eval_rows, prompter.needs_features)
    held_out = [prompter.ask(row, limit) for row in validating]
    check_context(prompter, held_out, prompt_lengths(tokenizer, held_out), f"the context of {start}", context, limit)
    model, base_dir = load_start(args, model_args, config.seed, folder.parent)
    trace_end = tokenizer.convert_tokens_to_ids(THINK_END) if with_trace else None
    trainer = make_trainer(config, model_args, model, tokenizer, {"rerank": encoded}, losses, trace_end=trace_end)

    def complete(asked: Sequence[PromptedRow]) -> list[str]:
        if losses.one_token:
            return one_token.complete(trainer, asked)
        return complete_greedily(trainer, [row.prompt for row in asked], limit)

    checks = validation.Validation(args, held_out, complete, trainer)
    saved = (with_trace, limit, model_args.model_name_or_path, bool(losses.one_token))
    save = partial(save_ranker, args.run_dir, prompter, folder, *saved)
    metrics = train_and_save(args, trainer, tokenizer, base_dir, folder, save, checks)
    if trainer.accelerator.is_main_process:
        delete_folder(stored)
    tokens = {"mean_completion_tokens": sum(lengths) / len(lengths), "max_completion_tokens": max(lengths)}
    return {"rows": len(encoded), **metrics, **tokens}


def fit_next_item(args: SftArguments, config: SFTConfig, model_args: ModelConfig, folder: Path) -> dict[str, Any]:
    """Train a model of next items into `folder`; returns its metrics."""
    losses = load_losses(args.losses, "next_item")
    tokenizer = load_start_tokenizer(args, model_args)
    model, base_dir = load_start(args, model_args, config.seed, folder.parent)
    source = (args.run_dir, config.seed, config.max_length)
    shape = (args.item_text, args.max_items, losses.constrained)
    encoder = NextItemEncoder(Catalogue.load(args.run_dir), tokenizer, *shape, *source)
    rows: dict[str, Sequence[Row]] = {"next_item": encoder.next_item_rows(args.targets)}
    for loss in losses.auxiliary.values():
        for task, added in loss.rows(encoder).items():
            rows[task] = joined([rows[task], added]) if task in rows else added
    numbers = {task: len(of_task) for task, of_task in rows.items()}
    tokens, context = {}, f"the context of {start_model(args, model_args)},"
    limits = {"max_length": config.max_length, context: context_length(model.config)}
    cures = {"max_length": "raise it", context: "lower max_items, or take a model of a longer one"}
    for task, of_task in rows.items():
        rows[task], made = check_and_keep(of_task, check_of(limits, lambda name, *_: cures[name]))
        tokens[task] = round(sum(num_labels(made)) * len(of_task) / max(len(made), 1))  # a sample stands for all
    logger.info("rows: %s, tokens under loss: %s", numbers, tokens)
    trainer = make_trainer(config, model_args, model, tokenizer, rows, losses, encoder=encoder)

    def save() -> None:
        encoder.save(folder)
        save_item_sources(args.run_dir, folder, len(encoder.catalogue))
        write_card(args.run_dir, folder, "sft", model_card.NEXT_ITEM, model_args.model_name_or_path)

    trained = train_and_save(args, trainer, tokenizer, base_dir, folder, save)
    return {"rows": numbers, "tokens_under_loss": tokens, **trained}


def main(args: SftArguments, training_args: SFTConfig, model_args: ModelConfig, out_dir: Path) -> dict[str, Any]:
    """Train the model of the task; with traces, then the control without; returns the metrics."""
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    if args.task == "next_item":
        return fit_next_item(args, training_args, model_args, out_dir / "model")
    control = copy.deepcopy(training_args)
    metrics = fit(args, training_args, model_args, out_dir / "model", args.with_trace)
    if args.no_trace_control:
        control.output_dir, control.run_name = f"{control.output_dir}_no_trace", f"{control.run_name}_no_trace"
        control.max_steps = metrics["steps"]
        metrics["no_trace"] = fit(args, control, model_args, out_dir / "model_no_trace", with_trace=False)
    return metrics


STAGE = Stage(
    name="sft",
    arguments=(SftArguments, SFTConfig, ModelConfig),
    main=main,
    check=check,
    inputs=("data",),
    optional_inputs=optional_inputs,
    inputs_if_made=("semantic_ids",),
    do_without={"midtrain": "name a pretrained model in model_name_or_path of the sft recipe"},
    files=("model_name_or_path",),
    plugins={"losses": LOSSES},
    trains=True,
)
