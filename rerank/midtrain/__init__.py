"""Stage 3: teach a language model the semantic ids.

In: the data and semantic_ids folders. Out: `model/`, a Hugging Face folder whose tokenizer knows every id token.

A pretrained model goes through two phases: first only the rows of the new tokens are trained, then everything, or a
LoRA adapter that is merged on saving. A small model made from the recipe has nothing to protect and skips phase one.
Four families of documents are mixed (GR2 sec. 2.4 by way of OneRec-Think, arXiv:2510.11639, table 5): sequences,
captions both ways, histories told in words, and general text. A fifth of our own, lists to rank, is for models that
are too small to bring along the reading and sorting of lists.

    accelerate launch --config_file recipes/accelerate/cpu.yaml \
        -m rerank.midtrain --config recipes/ml100k/3_midtrain.yaml
"""

import dataclasses
import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from trl import ModelConfig, SFTConfig, get_peft_config

from rerank import base_model, model_card, recipe, run_dir, semantic_ids, stopping
from rerank.catalogue import Catalogue
from rerank.midtrain.documents import (
    NEXT_ITEMS,
    PROMPT_WORDS,
    TASKS,
    Document,
    encoded_dataset,
    mixed_documents,
)
from rerank.midtrain.dropout import residual_dropout
from rerank.midtrain.new_rows import load_rows, save_rows, train_only_rows
from rerank.prompts import FACTS, THINK, THINK_END, render
from rerank.sequences import by_user, training_items
from rerank.traces.evidence import EVIDENCE_WORDS

logger = logging.getLogger(__name__)

INPUTS = ("data", "semantic_ids")
PUBLISHED_MIXTURE = {"sequence": 0.6573, "persona": 0.2430, "caption": 0.0494, "text": 0.0503}


@dataclass
class MidtrainArguments(recipe.StageArguments, base_model.SmallModelArguments):
    """Options of the midtrain stage; `model_name_or_path` (TRL's) names a pretrained base model."""

    mixture: dict[str, float] = field(
        default_factory=lambda: dict(PUBLISHED_MIXTURE),
        metadata={"help": "Share of documents of each task: sequence, persona, caption, text, lists."},
    )
    num_documents: int = field(
        default=0, metadata={"help": "Documents in an epoch; 0: every sequence once and the others in proportion."}
    )
    list_facts: list[str] = field(
        default_factory=lambda: list(FACTS), metadata={"help": "Facts on the lines of lists, as evidence_names later."}
    )
    list_labels: str = field(
        default="semantic_id", metadata={"help": "Labels of lists, as `ranking` later: semantic_id or number."}
    )
    max_items: int = field(default=50, metadata={"help": "Items in one sequence document."})
    general_text: str = field(
        default="packages",
        metadata={
            "help": "Source of general text: a text file, or `packages`: the descriptions of installed packages."
        },
    )
    token_epochs: float = field(default=1.0, metadata={"help": "Phase one: epochs that train only the new rows."})
    token_learning_rate: float = field(default=5.0e-4, metadata={"help": "Learning rate of phase one."})
    dropout: float = field(
        default=0.0,
        metadata={"help": "Phase two: share dropped of what the embedding and each branch of a layer give; 0: none."},
    )
    max_minutes: float | None = field(default=None, metadata={"help": "End each phase after this many minutes."})
    eval_recall_rows: int = field(
        default=0,
        metadata={
            "help": "Every eval_steps of phase two, search the next item of so many validation rows and keep the "
            "checkpoint of the best recall@10; 0: never."
        },
    )
    patience: int = field(
        default=0, metadata={"help": "End after so many evaluations without a better recall@10; 0: do not."}
    )

    def __post_init__(self) -> None:
        recipe.StageArguments.__post_init__(self)
        base_model.SmallModelArguments.__post_init__(self)
        if self.list_labels not in ("semantic_id", "number"):
            raise ValueError(f"list_labels is {self.list_labels!r}; choose semantic_id or number")
        if not self.list_facts or set(self.list_facts) - set(FACTS):
            raise ValueError(f"list_facts is {self.list_facts}; name some of {', '.join(FACTS)}")
        for name in ("eval_recall_rows", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)} but must not be negative")
        if self.max_items < 2:
            raise ValueError(f"max_items is {self.max_items} but must be at least 2: a history and its next item")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout} but must be at least 0 and below 1")
        if self.patience and not self.eval_recall_rows:
            raise ValueError(
                f"patience is {self.patience} but nothing is evaluated; set eval_recall_rows, such as 1000"
            )
        unknown = sorted(set(self.mixture) - set(TASKS))
        if unknown or not self.mixture.get("sequence", 0) > 0 or min(self.mixture.values()) < 0:
            raise ValueError(f"mixture is {self.mixture}; give shares of {', '.join(TASKS)}, that of sequence above 0")


ARGUMENTS = (MidtrainArguments, SFTConfig, ModelConfig)


def check(args: MidtrainArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse a base model folder or a text file that is not there, and quantized weights."""
    base_model.refuse_quantized(model_args)
    if model_args.use_peft and (model_args.model_name_or_path is None or args.token_epochs == 0):
        raise ValueError(
            "use_peft trains an adapter in phase two and the new tokens' rows in phase one, which this recipe leaves "
            "out; set model_name_or_path and token_epochs above 0, or use_peft false"
        )
    if model_args.model_name_or_path is not None:
        base_model.find_base_model(model_args.model_name_or_path)
    check_packing(args, training_args, model_args)
    if args.eval_recall_rows and not training_args.eval_steps:
        raise ValueError(f"eval_recall_rows is {args.eval_recall_rows} but eval_steps is not set; set it, such as 500")
    if args.general_text != "packages" and not Path(args.general_text).is_file():
        raise FileNotFoundError(f"general_text {args.general_text} is not there; give a text file, or `packages`")


def check_packing(args: MidtrainArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse packing that would cut documents, mix them in attention, or put lists out of their order."""
    from rerank.midtrain.trainer import attends_by_mask

    if not training_args.packing:
        return
    if args.mixture.get("lists", 0) > 0:
        raise ValueError("packing puts documents out of order but lists must grow; leave lists or packing out")
    if training_args.packing_strategy != "bfd":
        raise ValueError(f"packing_strategy {training_args.packing_strategy} cuts documents; use bfd")
    if training_args.max_length is None:
        raise ValueError("packing needs max_length, the length of a packed row; set it, such as 1024")
    attention = model_args.attn_implementation or "sdpa"
    if not attends_by_mask(attention) and "flash" not in attention:
        raise ValueError(
            f"attn_implementation {attention} may not keep packed documents apart; use sdpa, eager or a flash one"
        )


def next_item_prompt(history: Sequence[int], catalogue: Catalogue, max_history: int, tokenizer: Any) -> str:
    """The text after which a mid-trained model writes the semantic id of the next item."""
    shown = history[-max_history:]
    return render(tokenizer, NEXT_ITEMS) + "".join(catalogue.semantic_ids[item] for item in shown)


def sequences(data_dir: Path) -> list[np.ndarray]:
    """Each user's training items, oldest first; what the re-ranker trains on is in them only with num_rerank `all`."""
    return by_user(*training_items(data_dir, run_dir.midtrain_splits(data_dir.parent)))


def build_model(
    args: MidtrainArguments, settings: ModelConfig, documents: Sequence[Document], seed: int
) -> tuple[Any, Any]:
    """The base model and its tokenizer, before the id tokens are added."""
    if settings.model_name_or_path is not None:
        return base_model.load_pretrained(settings.model_name_or_path, settings)
    texts = [f"{document.prompt}\n{document.answer}" for document in documents]
    words = [f"{code}:{bucket}" for code, _ in FACTS.values() for bucket in range(10)]
    tokenizer = base_model.train_tokenizer(texts, args.vocab_size, [*words, *EVIDENCE_WORDS, *PROMPT_WORDS])
    model = base_model.make_small_model(args, tokenizer, seed)
    model.set_attn_implementation(settings.attn_implementation or "sdpa")
    return model, tokenizer


def num_steps(num_documents: int, epochs: float, config: SFTConfig) -> int:
    """Optimizer steps of phase one: its epochs, and no more than the recipe's `max_steps` where it has them."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = math.ceil(epochs * num_documents / batch)
    return min(steps, config.max_steps) if config.max_steps > 0 else steps


def train_new_rows(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    dataset: Any,
    args: MidtrainArguments,
    config: SFTConfig,
    path: Path,
) -> None:
    """Phase one: train the rows of the new tokens and nothing else, and write them to `path`; the model is used up."""
    from rerank.midtrain.trainer import MidtrainTrainer

    config = dataclasses.replace(
        config,
        output_dir=f"{config.output_dir}_new_rows",
        max_steps=num_steps(len(dataset), args.token_epochs, config),
        learning_rate=args.token_learning_rate,
    )
    train_only_rows(model, ids)
    trainer = MidtrainTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    stopping.train(trainer, args.max_minutes)
    save_rows(trainer, path)
    stopping.release(trainer)


def recall_options(config: SFTConfig) -> dict[str, Any]:
    """What phase two's configuration must say for the checkpoint of the best recall to be kept."""
    return {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_steps": config.eval_steps,
        "metric_for_best_model": "R@10",
        "greater_is_better": True,
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,  # patience goes on where it was
    }


def fresh_model(args: MidtrainArguments, settings: ModelConfig, documents: Sequence[Document], seed: int) -> tuple:
    """The base model with rows for the id tokens, its tokenizer, and the ids of these tokens: the same each time."""
    model, tokenizer = build_model(args, settings, documents, seed)
    shape = run_dir.read_metrics(args.run_dir, "semantic_ids")
    tokens = [*semantic_ids.tokens(shape["levels"], shape["codebook_size"]), THINK, THINK_END]
    return model, tokenizer, base_model.add_tokens(model, tokenizer, tokens, seed)


def main(args: MidtrainArguments, training_args: SFTConfig, model_args: ModelConfig, out_dir: Path) -> dict:
    """Build or load the model, add the id tokens, train in two phases, save; returns counts and losses."""
    from transformers import EarlyStoppingCallback

    from rerank.evaluate.full_catalogue import ValidationRecall
    from rerank.midtrain.trainer import MidtrainTrainer

    data_dir = run_dir.stage_dir(args.run_dir, "data")
    catalogue = Catalogue.load(args.run_dir)
    documents = mixed_documents(sequences(data_dir), catalogue, args, training_args.seed)
    model, tokenizer, ids = fresh_model(args, model_args, documents, training_args.seed)
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    dataset, token_counts = encoded_dataset(documents, tokenizer, training_args)
    logger.info("%d documents, tokens under loss: %s", len(documents), token_counts)

    if model_args.model_name_or_path is not None and args.token_epochs > 0:
        rows_path = out_dir / "new_rows.safetensors"
        if not rows_path.is_file():
            train_new_rows(model, tokenizer, ids, dataset, args, training_args, rows_path)
            del model
            gc.collect()  # before the second copy, of a model that may be large
            model, _, _ = fresh_model(args, model_args, documents, training_args.seed)
        load_rows(model, ids, rows_path)
    peft_config = get_peft_config(model_args)
    base_dir = out_dir / "base"
    if peft_config is not None:
        with base_model.whole(*model.parameters()):  # what the adapter is merged into at the end
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
        eval_dataset=None if recall is None else recall.dataset(),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[EarlyStoppingCallback(args.patience)] if args.patience else None,
    )
    with residual_dropout(trainer.model, args.dropout):
        stopping.train(trainer, args.max_minutes)
    base_model.save_trained(trainer, tokenizer, base_dir, out_dir / "model")
    if trainer.accelerator.is_main_process:
        what = model_card.LANGUAGE_MODEL
        model_card.write(out_dir / "model", args.run_dir, "midtrain", what, model_args.model_name_or_path)
        run_dir.write_json(out_dir / "log_history.json", trainer.state.log_history)
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
