"""Stage 3: teach a language model the semantic ids.

In: the data and semantic_ids folders. Out: `model/`, a Hugging Face folder whose tokenizer knows every id token.

A pretrained model goes through two phases: first only the rows of the new tokens are trained, then everything, or a
LoRA adapter that is merged on saving. A small model made from the recipe has nothing to protect and skips phase one.
Four families of documents are mixed (GR2 sec. 2.4 by way of OneRec-Think, arXiv:2510.11639, table 5): sequences,
captions both ways, histories told in words, and general text.

    accelerate launch --config_file recipes/accelerate/cpu.yaml \
        -m rerank.midtrain --config recipes/ml100k/3_midtrain.yaml
"""

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from trl import ModelConfig, SFTConfig, get_peft_config

from rerank import base_model, baselines, recipe, run_dir, semantic_ids, stopping
from rerank.catalogue import Catalogue
from rerank.prompts import FACTS, THINK, THINK_END, completion, render
from rerank.traces.evidence import EVIDENCE_WORDS

logger = logging.getLogger(__name__)

INPUTS = ("data", "semantic_ids")
TASKS = ("sequence", "persona", "caption", "text")
PUBLISHED_MIXTURE = {"sequence": 0.6573, "persona": 0.2430, "caption": 0.0494, "text": 0.0503}
NEXT_ITEMS = "Next items:"
PROMPT_WORDS = (
    "Rank:",
    "History:",
    "Candidates:",
    "Next",
    "items:",
    "Describe:",
    "Which",
    "item:",
    "User:",
    "likes",
    "Sort:",
)


@dataclass
class MidtrainArguments(recipe.StageArguments, base_model.SmallModelArguments):
    """Options of the midtrain stage; `model_name_or_path` (TRL's) names a pretrained base model."""

    mixture: dict[str, float] = field(
        default_factory=lambda: dict(PUBLISHED_MIXTURE),
        metadata={"help": "Share of documents of each task: sequence, persona, caption, text."},
    )
    num_documents: int = field(
        default=0, metadata={"help": "Documents in an epoch; 0: every sequence once and the others in proportion."}
    )
    sorting_share: float = field(
        default=0.0, metadata={"help": "Share of the persona documents that are lists to sort by a stated fact."}
    )
    sorting_labels: str = field(
        default="semantic_id", metadata={"help": "How sorted lists are written: semantic_id or number."}
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
        if self.sorting_labels not in ("semantic_id", "number"):
            raise ValueError(f"sorting_labels is {self.sorting_labels!r}; choose semantic_id or number")
        unknown = sorted(set(self.mixture) - set(TASKS))
        if unknown or not self.mixture.get("sequence", 0) > 0 or min(self.mixture.values()) < 0:
            raise ValueError(f"mixture is {self.mixture}; give shares of {', '.join(TASKS)}, that of sequence above 0")


ARGUMENTS = (MidtrainArguments, SFTConfig, ModelConfig)


def check(args: MidtrainArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse a base model folder or a text file that is not there."""
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


@dataclass(frozen=True)
class Document:
    """A text to learn: `prompt` (a user message, or empty) without loss, `answer` with loss."""

    task: str
    prompt: str
    answer: str
    ends: bool = True  # whether the answer is followed by the end token


def sequence_documents(histories: Sequence[np.ndarray], catalogue: Catalogue, max_items: int) -> Iterator[Document]:
    """Windows of a user's sequence, each overlapping the one before by half, so that every item has a past."""
    for history in histories:
        for start in range(0, max(1, len(history) - max_items // 2), max(1, max_items // 2)):
            ids = "".join(catalogue.semantic_ids[item] for item in history[start : start + max_items])
            yield Document("sequence", NEXT_ITEMS, ids, ends=False)


def caption_documents(catalogue: Catalogue) -> Iterator[Document]:
    """Item id to words and words to item id."""
    for semantic_id, title, category in zip(
        catalogue.semantic_ids, catalogue.titles, catalogue.categories, strict=True
    ):
        words = " | ".join(text for text in (title, category) if text)
        if words:
            yield Document("caption", "Describe:" + semantic_id, words)
            yield Document("caption", "Which item: " + words, semantic_id)


def persona_documents(
    histories: Sequence[np.ndarray], catalogue: Catalogue, rng: np.random.Generator
) -> Iterator[Document]:
    """A stretch of a history told in words and ids: what it leans to, which items show it, and the latest by title."""
    for history in histories:
        start = int(rng.integers(0, max(1, len(history) - 8)))
        items = history[start : start + 8]
        groups: dict[str, list[int]] = {}
        for item in items:
            groups.setdefault(catalogue.categories[item].split(", ")[0] or "Other", []).append(item)
        largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
        told = "; ".join(
            f"{name} " + "".join(catalogue.semantic_ids[i] for i in group) for name, group in largest_first
        )
        latest = catalogue.titles[items[-1]]
        shown = "".join(catalogue.semantic_ids[item] for item in items)
        yield Document("persona", "User:" + shown, f"likes {told}; lately {latest}{catalogue.semantic_ids[items[-1]]}")


def sorting_documents(
    histories: Sequence[np.ndarray],
    catalogue: Catalogue,
    embeddings: np.ndarray,
    num: int,
    rng: np.random.Generator,
    labels: str = "semantic_id",
) -> Iterator[Document]:
    """Lists of items with a true fact each, to be written again in its order, as ids or as numbers.

    What a re-ranker must be able to do with any list, learned here on facts that hold for every user: how often an
    item was chosen, or how close its text is to another item. Lists of 6 to 10 items.
    """
    counts = np.bincount(np.concatenate(histories), minlength=len(catalogue)).astype(float)
    known = np.flatnonzero(counts)
    cosines = (embeddings[known] @ embeddings[rng.choice(known, 200)].T).ravel()
    edges = {"popularity": baselines.fit_edges(counts[known]), "cosine_last": baselines.fit_edges(cosines)}
    for _ in range(num):
        items = rng.choice(known, min(len(known), int(rng.integers(6, 11))), replace=False)
        fact, last, values = "popularity", "", counts[items]
        if rng.random() < 0.5:
            anchor = rng.choice(known)
            fact, last, values = "cosine_last", catalogue.semantic_ids[anchor], embeddings[items] @ embeddings[anchor]
        buckets = [baselines.bucket(value, edges[fact]) for value in values]
        ids = [catalogue.semantic_ids[item] for item in items]
        numbers = [str(number) for number in range(1, len(ids) + 1)]
        heads = [f"{number}.{text}" for number, text in zip(numbers, ids, strict=True)] if labels == "number" else ids
        lines = [f"{head} {FACTS[fact][0]}:{bucket}" for head, bucket in zip(heads, buckets, strict=True)]
        order = np.argsort([-bucket for bucket in buckets], kind="stable")
        prompt = "\n".join(["Sort:", "History:" + last, "Candidates:", *lines])
        written = numbers if labels == "number" else ids
        yield Document("persona", prompt, completion(None, order, written).removeprefix(THINK + THINK_END))


def text_documents(source: str, length: int = 400) -> Iterator[Document]:
    """Passages of general text: of a file, or, offline, of the descriptions of the packages the project stands on."""
    if source == "packages":
        names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "scipy", "scikit-learn")
        texts = [metadata.metadata(name).get_payload() or metadata.metadata(name).get("Summary", "") for name in names]
    else:
        texts = [Path(source).read_text(encoding="utf-8")]
    for text in texts:
        words = text.replace("<", "‹").replace(">", "›")
        for start in range(0, len(words), length):
            yield Document("text", "", words[start : start + length])


def mixed_documents(
    histories: Sequence[np.ndarray],
    catalogue: Catalogue,
    embeddings: np.ndarray,
    args: MidtrainArguments,
    seed: int,
) -> list[Document]:
    """Documents of each task by its share, `num_documents` in all, each source's as often as any other of it.

    Of the persona documents, `sorting_share` are lists to sort.
    """
    rng = np.random.default_rng(seed)
    sequence = list(sequence_documents(histories, catalogue, args.max_items))
    shares = sum(args.mixture.values())
    total = args.num_documents / shares if args.num_documents else len(sequence) / args.mixture["sequence"]
    wanted = {task: round(total * share) for task, share in args.mixture.items()}
    num_sorting = round(wanted.get("persona", 0) * args.sorting_share)
    mixed = [
        *_draw(sequence, wanted["sequence"], rng),
        *sorting_documents(histories, catalogue, embeddings, num_sorting, rng, args.sorting_labels),
        *_draw(list(persona_documents(histories, catalogue, rng)), wanted.get("persona", 0) - num_sorting, rng),
        *_draw(list(caption_documents(catalogue)), wanted.get("caption", 0), rng),
    ]
    if wanted.get("text"):
        mixed += _draw(list(text_documents(args.general_text)), wanted["text"], rng)
    return [mixed[i] for i in rng.permutation(len(mixed))]


def _draw(documents: Sequence[Document], num: int, rng: np.random.Generator) -> list[Document]:
    """`num` documents in random order, each as often as any other, give or take one."""
    if not documents:
        return []
    rounds = [rng.permutation(len(documents)) for _ in range(-(-num // len(documents)))]
    return [documents[i] for order in rounds for i in order][:num]


def encode(document: Document, tokenizer: Any, max_length: int | None) -> dict[str, list[int]]:
    """Token ids and labels; -100 where there is no loss."""
    prompt = (
        tokenizer(render(tokenizer, document.prompt), add_special_tokens=False).input_ids if document.prompt else []
    )
    answer = tokenizer(document.answer, add_special_tokens=False).input_ids
    answer += [tokenizer.eos_token_id] if document.ends else []
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def build_model(
    args: MidtrainArguments, name: str | None, dtype: str | None, documents: Sequence[Document], seed: int
) -> tuple[Any, Any]:
    """The base model and its tokenizer, before the id tokens are added."""
    if name is not None:
        return base_model.load_pretrained(name, dtype)
    texts = [f"{document.prompt}\n{document.answer}" for document in documents]
    words = [f"{code}:{bucket}" for code, _ in FACTS.values() for bucket in range(10)]
    tokenizer = base_model.train_tokenizer(texts, args.vocab_size, [*words, *EVIDENCE_WORDS, *PROMPT_WORDS])
    return base_model.make_small_model(args, tokenizer, seed), tokenizer


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
    embeddings = np.load(run_dir.stage_dir(args.run_dir, "semantic_ids") / "embeddings.npy")
    documents = mixed_documents(sequences(data_dir), catalogue, embeddings, args, training_args.seed)
    model, tokenizer = build_model(
        args, model_args.model_name_or_path, model_args.dtype, documents, training_args.seed
    )
    shape = run_dir.read_metrics(args.run_dir, "semantic_ids")
    tokens = [*semantic_ids.tokens(shape["levels"], shape["codebook_size"]), THINK, THINK_END]
    ids = base_model.add_tokens(model, tokenizer, tokens, training_args.seed)

    encoded = [encode(document, tokenizer, training_args.max_length) for document in documents]
    dataset = Dataset.from_list(encoded)
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
    run_dir.write_json(out_dir / "log_history.json", trainer.state.log_history)
    return {
        "documents": len(documents),
        "tokens_under_loss": dict(token_counts),
        "parameters": sum(p.numel() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()),
        "steps": trainer.state.global_step,
        "train_loss": trainer.state.log_history[-1].get("train_loss"),
    }


if __name__ == "__main__":
    recipe.launch("midtrain")
