"""Stage 6: fine-tune the mid-trained model on accepted traces.

In: midtrain, candidates and traces. Out: `model/`, and with `no_trace_control` also `model_no_trace/`, trained for as
many steps on the same rows with an empty trace: what the reasoning is worth is the difference between the two.

The loss is GR2's (arXiv:2606.31984 eq. 3): tokens of the trace weigh `reasoning_weight`, tokens of the ranking
`ranking_weight`, the prompt nothing. At equal weights of 1 it is TRL's own loss.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.sft --config recipes/ml100k/6_sft.yaml
"""

import copy
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from rerank import base_model, model_card, recipe, run_dir, stopping
from rerank.catalogue import Catalogue, check_vocabulary
from rerank.prompts import THINK_END, PromptSettings, candidate_labels, completion, render, rerank_prompt

logger = logging.getLogger(__name__)

INPUTS = ("data", "semantic_ids", "midtrain", "candidates", "traces")


@dataclass
class SftArguments(recipe.StageArguments):
    """Options of the sft stage."""

    reasoning_weight: float = field(default=0.5, metadata={"help": "Weight of a trace token in the loss (lambda_r)."})
    ranking_weight: float = field(default=1.0, metadata={"help": "Weight of a ranking token in the loss (lambda_o)."})
    no_trace_control: bool = field(
        default=False, metadata={"help": "Also train a model without traces, for equally many steps."}
    )
    max_minutes: float | None = field(default=None, metadata={"help": "End each training after this many minutes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.reasoning_weight, self.ranking_weight) < 0 or self.ranking_weight == 0:
            raise ValueError(
                f"reasoning_weight is {self.reasoning_weight} and ranking_weight {self.ranking_weight}; "
                "neither may be negative, and the ranking must weigh something"
            )


ARGUMENTS = (SftArguments, SFTConfig, ModelConfig)


def check(args: SftArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse a model whose tokenizer lacks the catalogue's semantic ids."""
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


def token_weights(labels: torch.Tensor, think_end: int, reasoning: float, ranking: float) -> torch.Tensor:
    """Loss weight of each token: `reasoning` up to and with `</think>`, `ranking` after it. Shapes (B, T)."""
    seen = (labels == think_end).long().cumsum(dim=1)
    after = (seen > 0) & (labels != think_end)
    return torch.where(after, ranking, reasoning).to(torch.float32)


class WeightedSftTrainer(SFTTrainer):
    """TRL's SFTTrainer with two token weights.

    Overrides `compute_loss`, for the weights: the per-token log-probabilities come from TRL's fused head, the sum is
    divided by the optimizer step's count of supervised tokens, so the loss does not depend on how a batch is cut.
    """

    def __init__(self, *args: Any, think_end: int, weights: tuple[float, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.think_end, self.weights = think_end, weights

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ANN001
        if self.weights == (1.0, 1.0) or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        weights = token_weights(inputs["labels"], self.think_end, *self.weights)[:, 1:]  # (B, T-1)
        num_tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -(outputs.log_probs * weights).sum() / torch.as_tensor(num_tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes what is already a global mean
        for name, chosen in (
            ("reasoning_nll", weights == self.weights[0]),
            ("ranking_nll", weights == self.weights[1]),
        ):
            mask = chosen & outputs.label_mask
            sums = torch.stack([-(outputs.log_probs * mask).sum().detach(), mask.sum()])
            total, count = self.accelerator.gather(sums.unsqueeze(0)).sum(dim=0).tolist()
            self._metrics[mode][name].append(total / max(count, 1))
        return loss


def training_rows(run: str, used_for: str) -> list[dict[str, Any]]:
    """The hit rows of the training list that the traces stage assigned to `sft` or `dapo`."""
    folder = run_dir.stage_dir(run, "candidates")
    split = pq.read_table(run_dir.stage_dir(run, "traces") / "row_split.parquet").to_pydict()
    chosen = {row for row, use in zip(split["row_id"], split["used_for"], strict=True) if use == used_for}
    rows = pq.read_table(folder / "train.parquet", filters=[("hit", "==", True)]).to_pylist()
    return [row for row in rows if row["row_id"] in chosen]


class RowEncoder:
    """Rows to prompts and token ids, by the settings that the traces stage fixed for all later stages."""

    def __init__(self, run: str, tokenizer: Any) -> None:
        self.tokenizer, self.catalogue = tokenizer, Catalogue.load(run)
        self.settings = PromptSettings.load(run_dir.stage_dir(run, "traces"))
        features = json.loads((run_dir.stage_dir(run, "candidates") / "features.json").read_text())
        self.names, self.edges = features["names"], features["edges"]

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The rendered prompt of a row."""
        content = rerank_prompt(row, self.catalogue, self.settings, self.edges, self.names)
        return render(self.tokenizer, content)

    def labels(self, row: Mapping[str, Any]) -> list[str]:
        """What a completion must write for each candidate."""
        return candidate_labels(row, self.catalogue, self.settings)

    def example(self, row: Mapping[str, Any], trace: str | None, order: Sequence[int]) -> dict[str, list[int]]:
        """Token ids and labels of prompt and completion; the two are tokenized apart, as rollouts are."""
        prompt = self.tokenizer(self.prompt(row)).input_ids
        answer = self.tokenizer(completion(trace, order, self.labels(row)), add_special_tokens=False).input_ids
        answer = [*answer, self.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def examples(encoder: RowEncoder, run: str, with_trace: bool) -> list[dict[str, list[int]]]:
    """The accepted attempts of the sft rows, encoded."""
    accepted = pq.read_table(run_dir.stage_dir(run, "traces") / "accepted.parquet").to_pylist()
    rows = {row["row_id"]: row for row in training_rows(run, "sft")}
    return [
        encoder.example(rows[a["row_id"]], a["trace"] if with_trace else None, a["order"])
        for a in accepted
        if a["row_id"] in rows
    ]


def save_ranker(run: str, encoder: RowEncoder, folder: Path, trace: bool, max_completion_tokens: int) -> None:
    """Beside a trained model, all that ranking new rows needs: prompt settings, catalogue, evidence, lengths."""
    encoder.settings.save(folder)
    encoder.catalogue.save(folder)
    for name in ("features.json", "evidence.npz"):
        shutil.copy2(run_dir.stage_dir(run, "candidates") / name, folder / name)
    num_candidates = run_dir.read_metrics(run, "candidates")["num_candidates"]
    generation = {"max_completion_tokens": max_completion_tokens, "trace": trace, "num_candidates": num_candidates}
    run_dir.write_json(folder / "generation.json", generation)
    stage = folder.parent.name.removesuffix(".partial")
    midtrain = yaml.safe_load((run_dir.stage_dir(run, "midtrain") / "recipe.yaml").read_text())
    what = model_card.ranker(num_candidates, trace)
    model_card.write(folder, run, stage, what, midtrain.get("model_name_or_path"))


def fit(args: SftArguments, config: SFTConfig, model_args: ModelConfig, folder: Path, with_trace: bool) -> dict:
    """Train one model into `folder`; returns its metrics."""
    from datasets import Dataset

    base_dir = run_dir.stage_dir(args.run_dir, "midtrain") / "model"
    model, tokenizer = base_model.load_pretrained(str(base_dir), model_args)
    encoder = RowEncoder(args.run_dir, tokenizer)
    encoded = examples(encoder, args.run_dir, with_trace)
    lengths = [sum(label != -100 for label in row["labels"]) for row in encoded]
    too_long = sum(len(row["input_ids"]) > (config.max_length or 1 << 30) for row in encoded)
    if too_long:
        raise ValueError(f"{too_long} of {len(encoded)} rows are longer than max_length {config.max_length}; raise it")
    trainer = WeightedSftTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(encoded),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        think_end=tokenizer.convert_tokens_to_ids(THINK_END),
        weights=(args.reasoning_weight, args.ranking_weight) if with_trace else (args.ranking_weight,) * 2,
    )
    stopping.train(trainer, args.max_minutes)
    base_model.save_trained(trainer, tokenizer, base_dir, folder)
    if trainer.accelerator.is_main_process:
        # room for traces somewhat longer than any seen
        save_ranker(args.run_dir, encoder, folder, with_trace, max(lengths) + max(lengths) // 4)
        run_dir.write_json(
            folder.parent / f"log_history{folder.name.removeprefix('model')}.json", trainer.state.log_history
        )
    stopping.release(trainer)
    return {
        "rows": len(encoded),
        "steps": trainer.state.global_step,
        "train_loss": trainer.state.log_history[-1].get("train_loss"),
        "mean_completion_tokens": sum(lengths) / len(lengths),
        "max_completion_tokens": max(lengths),
    }


def main(args: SftArguments, training_args: SFTConfig, model_args: ModelConfig, out_dir: Path) -> dict:
    """Train the model with traces, then the control without; returns the metrics of both."""
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    control = copy.deepcopy(training_args)
    metrics = fit(args, training_args, model_args, out_dir / "model", with_trace=True)
    if args.no_trace_control:
        control.output_dir = f"{control.output_dir}_no_trace"
        control.max_steps = metrics["steps"]
        metrics["no_trace"] = fit(args, control, model_args, out_dir / "model_no_trace", with_trace=False)
    return metrics


if __name__ == "__main__":
    recipe.launch("sft")
