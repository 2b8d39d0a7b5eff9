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

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from trl import ModelConfig, SFTConfig, get_peft_config

from rerank import base_model, model_card, recipe, run_dir, semantic_ids, stopping
from rerank.catalogue import Catalogue
from rerank.midtrain.documents import NEXT_ITEMS, PROMPT_WORDS, Document, encode, in_batches, mixed_documents
from rerank.prompts import FACTS, THINK, THINK_END, render
from rerank.traces.evidence import EVIDENCE_WORDS

logger = logging.getLogger(__name__)

INPUTS = ("data", "semantic_ids")
TASKS = ("sequence", "persona", "caption", "text", "lists")
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
    max_minutes: float | None = field(default=None, metadata={"help": "End each phase after this many minutes."})

    def __post_init__(self) -> None:
        recipe.StageArguments.__post_init__(self)
        base_model.SmallModelArguments.__post_init__(self)
        if self.list_labels not in ("semantic_id", "number"):
            raise ValueError(f"list_labels is {self.list_labels!r}; choose semantic_id or number")
        if not self.list_facts or set(self.list_facts) - set(FACTS):
            raise ValueError(f"list_facts is {self.list_facts}; name some of {', '.join(FACTS)}")
        unknown = sorted(set(self.mixture) - set(TASKS))
        if unknown or not self.mixture.get("sequence", 0) > 0 or min(self.mixture.values()) < 0:
            raise ValueError(f"mixture is {self.mixture}; give shares of {', '.join(TASKS)}, that of sequence above 0")


ARGUMENTS = (MidtrainArguments, SFTConfig, ModelConfig)


def check(args: MidtrainArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse a base model folder or a text file that is not there, and quantized weights."""
    base_model.refuse_quantized(model_args)
    if model_args.model_name_or_path is not None:
        base_model.find_base_model(model_args.model_name_or_path)
    if args.general_text != "packages" and not Path(args.general_text).is_file():
        raise FileNotFoundError(f"general_text {args.general_text} is not there; give a text file, or `packages`")


def next_item_prompt(history: Sequence[int], catalogue: Catalogue, max_history: int, tokenizer: Any) -> str:
    """The text after which a mid-trained model writes the semantic id of the next item."""
    shown = history[-max_history:]
    return render(tokenizer, NEXT_ITEMS) + "".join(catalogue.semantic_ids[item] for item in shown)


def sequences(data_dir: Path) -> list[np.ndarray]:
    """Each user's training items, oldest first; what the re-ranker trains on is in them only with num_rerank `all`."""
    table = pq.read_table(data_dir / "interactions.parquet").to_pandas()
    seen = (
        {"train", "rerank"}
        if run_dir.read_metrics(data_dir.parent, "data")["midtrain_has_seen_rerank_targets"]
        else {"train"}
    )
    table = table[table["split"].isin(seen)].sort_values(["user", "position"])
    return [group.to_numpy() for _, group in table.groupby("user")["item"]]


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


@contextlib.contextmanager
def only_rows_train(model: Any, ids: Sequence[int]) -> Iterator[None]:
    """Inside, gradients reach these rows of the embedding, and of the head where it is not tied, and nothing else.

    By a hook on the gradient: peft's trainable tokens wrap the head, whose weight TRL's fused loss reads directly.
    """
    model.requires_grad_(False)
    tables = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    hooks = []
    for table in {id(table): table for table in tables}.values():
        chosen = torch.zeros(len(table), 1, dtype=torch.bool)
        chosen[list(ids)] = True
        table.requires_grad_(True)
        hooks.append(table.register_hook(lambda grad, chosen=chosen: grad * chosen.to(grad.device)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(True)


def train_new_rows(
    model: Any, tokenizer: Any, ids: Sequence[int], dataset: Any, args: MidtrainArguments, config: SFTConfig
) -> Any:
    """Phase one: train the rows of the new tokens and nothing else; returns the model."""
    from trl import SFTTrainer

    config = dataclasses.replace(
        config,
        output_dir=f"{config.output_dir}_new_rows",
        num_train_epochs=args.token_epochs,
        learning_rate=args.token_learning_rate,
        max_steps=-1,
        weight_decay=0.0,  # it would shrink the rows that get no gradient
    )
    with only_rows_train(model, ids):
        trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
        stopping.train(trainer, args.max_minutes)
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def main(args: MidtrainArguments, training_args: SFTConfig, model_args: ModelConfig, out_dir: Path) -> dict:
    """Build or load the model, add the id tokens, train in two phases, save; returns counts and losses."""
    from datasets import Dataset
    from trl import SFTTrainer

    data_dir = run_dir.stage_dir(args.run_dir, "data")
    catalogue = Catalogue.load(args.run_dir)
    documents = mixed_documents(sequences(data_dir), catalogue, args, training_args.seed)
    model, tokenizer = build_model(args, model_args, documents, training_args.seed)
    shape = run_dir.read_metrics(args.run_dir, "semantic_ids")
    tokens = [*semantic_ids.tokens(shape["levels"], shape["codebook_size"]), THINK, THINK_END]
    ids = base_model.add_tokens(model, tokenizer, tokens, training_args.seed)

    encoded = [encode(document, tokenizer, training_args.max_length) for document in documents]
    lengths = [len(row["input_ids"]) for row in encoded]
    order = in_batches(lengths, training_args.per_device_train_batch_size, np.random.default_rng(training_args.seed))
    dataset = Dataset.from_list([encoded[i] for i in order])
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    token_counts = Counter()
    for document, row in zip(documents, encoded, strict=True):
        token_counts[document.task] += sum(label != -100 for label in row["labels"])
    logger.info("%d documents, tokens under loss: %s", len(documents), dict(token_counts))

    if model_args.model_name_or_path is not None and args.token_epochs > 0:
        model = train_new_rows(model, tokenizer, ids, dataset, args, training_args)
    peft_config = get_peft_config(model_args)
    base_dir = out_dir / "base"
    if peft_config is not None:
        model.save_pretrained(base_dir)  # what the adapter is merged into at the end
    trainer = SFTTrainer(
        model, training_args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    stopping.train(trainer, args.max_minutes)
    base_model.save_trained(trainer, tokenizer, base_dir, out_dir / "model")
    if trainer.accelerator.is_main_process:
        what = model_card.LANGUAGE_MODEL
        model_card.write(out_dir / "model", args.run_dir, "midtrain", what, model_args.model_name_or_path)
        run_dir.write_json(out_dir / "log_history.json", trainer.state.log_history)
    return {
        "documents": len(documents),
        "tokens_under_loss": dict(token_counts),
        "parameters": sum(p.numel() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()),
        "steps": trainer.state.global_step,
        "train_loss": trainer.state.log_history[-1].get("train_loss"),
    }
