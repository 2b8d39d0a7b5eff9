"""Stage 3: teach a language model the semantic ids.

In: the data and semantic_ids folders. Out: `model/`, a Hugging Face folder whose tokenizer knows every id token.
In a run without semantic ids it teaches a small model to read and sort lists, and the words of titles.

A pretrained model goes through two phases: phase one trains only the added tokens' embedding (and head) rows, phase
two everything, or a LoRA adapter that is merged on saving. A small model made from the recipe skips phase one.
Four families of documents are mixed (GR2 sec. 2.4 by way of OneRec-Think, arXiv:2510.11639, table 5): sequences,
captions both ways, histories told in words, and general text. A fifth of our own, lists to rank, is for models that
are too small to bring along the reading and sorting of lists, and a sixth, titles, for those without semantic ids.

    accelerate launch --config_file recipes/accelerate/cpu.yaml \
        -m rerank.midtrain --config recipes/ml100k/3_midtrain.yaml
"""

import dataclasses
import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from trl import ModelConfig, SFTConfig

from rerank.catalogue import Catalogue, id_tokens
from rerank.grading import LONGEST_LIST
from rerank.launch import model_card, recipe, run_dir, stopping
from rerank.launch.files import delete_folder, write_json
from rerank.launch.stages import Stage
from rerank.launch.values import check_choice, check_range, option
from rerank.midtrain.documents import OF_IDS, TASKS, Document
from rerank.midtrain.encoding import check_packing, encoded_dataset, stored_rows
from rerank.midtrain.exercises import SORT_SHARE
from rerank.midtrain.mixture import mixed_documents, texts_of
from rerank.midtrain.new_rows import load_rows, save_rows, train_only_rows
from rerank.midtrain.words import fixed_words, warn_of_longer_lists, warn_of_split_words
from rerank.models import adapters, memory, names
from rerank.models import base as base_model
from rerank.models.checks import check_pretrained
from rerank.models.configs import check_context, context_length
from rerank.models.dropout import residual_dropout
from rerank.models.saving import save_trained
from rerank.prompts import FACTS, LAYOUTS, MAX_LETTERS, THINK, THINK_END, word_labels
from rerank.prompts.facts import NUM_BUCKETS, check_facts
from rerank.prompts.fields import SEMANTIC_ID
from rerank.prompts.message import LABEL_NAMES
from rerank.rows import by_user, training_items
from rerank.rows.checks import split_labels

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PUBLISHED_MIXTURE = {"sequence": 0.6573, "persona": 0.2430, "caption": 0.0494, "text": 0.0503}


@dataclass
class MidtrainArguments(recipe.StageArguments, base_model.SmallModelArguments):
    """Options of the midtrain stage; `model_name_or_path` (TRL's) names a pretrained base model."""

    mixture: dict[str, float] = option(
        PUBLISHED_MIXTURE, "Share of documents of each task: sequence, persona, caption, text, lists, titles."
    )
    num_documents: int = option(0, "Documents in an epoch; 0: every sequence once.")
    list_facts: list[str] = option(list(FACTS), "Facts on the lines of lists, as evidence_names later.")
    list_labels: str = option("semantic_id", "Labels of lists: semantic_id, number, letter or token.")
    list_layout: str = option("history_first", "Layout of lists, as `layout` of prompts later.")
    num_buckets: int = option(NUM_BUCKETS, "Buckets of a fact in lists, as the candidates stage has them.")
    longest_list: int = option(LONGEST_LIST, "Candidates of a list at most, as later lists have them.")
    shortest_list: int = option(1, "Candidates of a list in the second half at least, when lists have grown.")
    sort_share: float = option(SORT_SHARE, "Share of the lists that begin with the grades, only to be sorted.")
    max_items: int = option(50, "Items in one sequence document.")
    general_text: str = option("packages", "A text file, or `packages`: descriptions of installed packages.")
    token_epochs: float = option(1.0, "Epochs of phase one.")
    token_learning_rate: float = option(5.0e-4, "Learning rate of phase one.")
    dropout: float = option(0.0, "Phase two: share dropped of the outputs of the embedding and each branch.")
    max_minutes: float | None = option(None, "End each phase after this many minutes.")
    eval_recall_rows: int = option(0, "Validation rows for recall@10 every eval_steps, the best kept; 0: none.")
    patience: int = option(0, "End after N evaluations without a better recall@10; 0: no.")

    def __post_init__(self) -> None:
        recipe.StageArguments.__post_init__(self)
        base_model.SmallModelArguments.__post_init__(self)
        check_choice("list_labels", self.list_labels, tuple(LABEL_NAMES))
        check_choice("list_layout", self.list_layout, LAYOUTS)
        if not self.list_facts:
            raise ValueError(
                f"list_facts is empty; name facts of candidates/features.json, such as {', '.join(FACTS)}"
            )
        check_facts("list_facts", self.list_facts)
        least = {"longest_list": 2, "num_buckets": 2, "max_items": 2, "eval_recall_rows": 0, "patience": 0}
        for name, lowest in least.items():  # max_items: a history and its next item
            check_range(name, getattr(self, name), least=lowest)
        check_range("shortest_list", self.shortest_list, least=1, most=self.longest_list)
        check_range("sort_share", self.sort_share, least=0, most=1)
        if self.list_labels == "letter":
            check_range("longest_list with list_labels: letter", self.longest_list, most=MAX_LETTERS)
        check_range("dropout", self.dropout, least=0, below=1)
        if self.patience and not self.eval_recall_rows:
            raise ValueError(
                f"patience is {self.patience} but nothing is evaluated; set eval_recall_rows, such as 1000"
            )
        unknown = sorted(set(self.mixture) - set(TASKS))
        if unknown or not sum(self.mixture.values()) > 0 or min(self.mixture.values()) < 0:
            raise ValueError(f"mixture is {self.mixture}; give shares of {', '.join(TASKS)}, one of them above 0")
        if not self.num_documents and not self.mixture.get("sequence", 0) > 0:
            raise ValueError(
                f"num_documents is 0, every sequence once, but mixture is {self.mixture}, without sequence; set "
                "num_documents, such as 10000"
            )

    @property
    def tasks_of_ids(self) -> list[str]:
        """The options by which documents hold semantic ids."""
        tasks = [f"mixture: {task}" for task in OF_IDS if self.mixture.get(task)]
        if self.list_labels == SEMANTIC_ID and self.mixture.get("lists"):
            tasks.append("list_labels: semantic_id")
        return tasks + (["eval_recall_rows"] if self.eval_recall_rows else [])


def check(args: MidtrainArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse a base model folder or a text file that is not there, and quantized weights."""
    base_model.refuse_quantized(model_args)
    if model_args.use_peft and (model_args.model_name_or_path is None or args.token_epochs == 0):
        raise ValueError(
            "use_peft trains an adapter in phase two and the new tokens' rows in phase one, which this recipe leaves "
            "out; set model_name_or_path and token_epochs above 0, or use_peft false"
        )
    if model_args.model_name_or_path is not None:
        start = names.resolve(model_args.model_name_or_path, "model_name_or_path")
        check_pretrained(start, model_args)
        if args.list_labels in ("number", "letter") and args.mixture.get("lists") and Path(start).is_dir():
            labels = word_labels(args.list_labels, args.longest_list)
            split_labels(base_model.load_tokenizer(start, model_args), labels)
    check_packing(args, training_args, model_args)
    if args.mixture.get("lists") and run_dir.is_finished(args.run_dir, "data"):
        warn_of_longer_lists(args)
    config = memory.start_config("midtrain", args, model_args, {})
    if config is not None:
        whose = model_args.model_name_or_path or "the small model"
        check_context(config, whose, "max_length", training_args.max_length)
    if args.eval_recall_rows and not training_args.eval_steps:
        raise ValueError(f"eval_recall_rows is {args.eval_recall_rows} but eval_steps is not set; set it, such as 500")
    if args.general_text != "packages" and not Path(args.general_text).is_file():
        raise FileNotFoundError(f"general_text {args.general_text} is not there; give a text file, or `packages`")


def sequences(data_dir: Path) -> list[np.ndarray]:
    """Each user's training items, oldest first; the re-ranker's targets are in them only with num_rerank `all`."""
    return by_user(*training_items(data_dir, run_dir.midtrain_splits(data_dir.parent)))


def fresh_model(
    args: MidtrainArguments, settings: ModelConfig, documents: Sequence[Document], seed: int, num_items: int = 0
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]":
    """The base model with rows for the id tokens, its tokenizer, and the ids of these tokens: the same each time."""
    if settings.model_name_or_path is not None:
        model, tokenizer = base_model.load_pretrained(settings.model_name_or_path, settings)
    else:
        tokenizer = base_model.train_tokenizer(texts_of(documents), args.vocab_size, fixed_words(args, num_items))
        warn_of_split_words(tokenizer, args)
        model = base_model.make_small_model(args, tokenizer, seed)
        model.set_attn_implementation(settings.attn_implementation or "sdpa")
    tokens = [THINK, THINK_END]
    if args.list_labels == "token" and args.mixture.get("lists"):
        tokens += word_labels("token", args.longest_list)
    if run_dir.is_finished(args.run_dir, "semantic_ids"):
        shape = run_dir.read_metrics(args.run_dir, "semantic_ids")
        tokens = [*id_tokens(shape["levels"], shape["codebook_size"]), *tokens]
    return model, tokenizer, base_model.add_tokens(model, tokenizer, tokens, seed)


def num_steps(num_documents: int, epochs: float, config: SFTConfig) -> int:
    """Optimizer steps of phase one: its epochs, and no more than the recipe's `max_steps` where it has them."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = math.ceil(epochs * num_documents / batch)
    return min(steps, config.max_steps) if config.max_steps > 0 else steps


def train_new_rows(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    dataset: "Dataset",
    args: MidtrainArguments,
    config: SFTConfig,
    path: Path,
) -> None:
    """Phase one: train only the added tokens' rows, and write them to `path`; the model is used up."""
    from rerank.midtrain.trainer import MidtrainTrainer

    config = dataclasses.replace(
        config,
        output_dir=f"{config.output_dir}_new_rows",
        run_name=f"{config.run_name}_new_rows",
        max_steps=num_steps(len(dataset), args.token_epochs, config),
        learning_rate=args.token_learning_rate,
    )
    train_only_rows(model, ids)
    trainer = MidtrainTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    stopping.train(trainer, args.max_minutes)
    save_rows(trainer, path)
    stopping.release(trainer)


def recall_options(config: SFTConfig) -> dict[str, Any]:
    """The settings of phase two by which the checkpoint of the best recall is kept."""
    return {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_steps": config.eval_steps,
        "metric_for_best_model": "R@10",
        "greater_is_better": True,
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,  # patience continues where it was
    }


def main(args: MidtrainArguments, training_args: SFTConfig, model_args: ModelConfig, out_dir: Path) -> dict[str, Any]:
    """Build or load the model, add the id tokens, train in two phases, save; returns counts and losses."""
    from transformers import EarlyStoppingCallback

    from rerank.midtrain.trainer import MidtrainTrainer
    from rerank.next_item.recall import ValidationRecall

    catalogue, histories = Catalogue.load(args.run_dir), sequences(run_dir.stage_dir(args.run_dir, "data"))
    documents = mixed_documents(histories, catalogue, args, training_args.seed)
    model, tokenizer, ids = fresh_model(args, model_args, documents, training_args.seed, len(catalogue))
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    check_context(model.config, "the model", "max_length", training_args.max_length)
    training_args.max_length = training_args.max_length or context_length(model.config)
    dataset, token_counts = encoded_dataset(documents, tokenizer, training_args)
    logger.info("%d documents, tokens under loss: %s", len(documents), token_counts)

    if model_args.model_name_or_path is not None and args.token_epochs > 0:
        if not (rows_path := out_dir / "new_rows.safetensors").is_file():
            train_new_rows(model, tokenizer, ids, dataset, args, training_args, rows_path)
            del model
            gc.collect()  # before the second copy, of a model that may be large
            model, _, _ = fresh_model(args, model_args, documents, training_args.seed, len(catalogue))
        load_rows(model, ids, rows_path)
    peft_config, base_dir = adapters.lora_config(model_args, model), out_dir / "base"
    if peft_config is not None:
        with base_model.gathered_parameters(*model.parameters()):  # what the adapter is merged into at the end
            if training_args.process_index == 0:
                model.save_pretrained(base_dir)
    recall = None
    if args.eval_recall_rows:
        recall = ValidationRecall.load(Path(args.run_dir), tokenizer, args.eval_recall_rows, args.max_items)
        training_args = dataclasses.replace(training_args, **recall_options(training_args))
    trainer = MidtrainTrainer(
        model,
        training_args,
        recall,
        train_dataset=dataset,
        eval_dataset=None if recall is None else dataset,  # transformers wants one; `evaluate` does without
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[EarlyStoppingCallback(args.patience)] if args.patience else None,
    )
    with residual_dropout(trainer.model, args.dropout):
        stopping.train(trainer, args.max_minutes)
    save_trained(trainer, tokenizer, base_dir, out_dir / "model")
    if trainer.accelerator.is_main_process:
        what = model_card.LANGUAGE_MODEL if catalogue.has_ids else model_card.WITHOUT_IDS
        model_card.write(out_dir / "model", args.run_dir, "midtrain", what, model_args.model_name_or_path)
        write_json(out_dir / "log_history.json", trainer.state.log_history)
        delete_folder(stored_rows(training_args))
    metrics = {
        "documents": len(documents),
        "tokens_under_loss": token_counts,
        "parameters": sum(p.numel() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()),
        "steps": trainer.state.global_step,
        "train_loss": trainer.state.log_history[-1].get("train_loss"),
    }
    if recall is not None:
        metrics |= {"best_validation_R@10": trainer.state.best_metric, "best_step": trainer.state.best_global_step}
    return metrics


STAGE = Stage(
    name="midtrain",
    arguments=(MidtrainArguments, SFTConfig, ModelConfig),
    main=main,
    check=check,
    inputs=("data",),
    optional_inputs=lambda args, *others: ("semantic_ids",) if args.tasks_of_ids else (),
    inputs_if_made=("semantic_ids",),
    do_without={
        "semantic_ids": "leave sequence, persona, caption and eval_recall_rows out of the midtrain recipe (mixture: "
        "{lists: 0.9, titles: 0.1}) and set list_labels to number, letter or token"
    },
    files=("model_name_or_path", "general_text"),
    trains=True,
)
