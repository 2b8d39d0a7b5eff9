"""Stage 7: DAPO on the SFT model, with the rewards the recipe names and rollouts from vLLM.

In: sft, candidates and traces. Out: `model/`, `rollouts/` (every completion, as Parquet) and `log_history.json`.

TRL's GRPOTrainer set up as DAPO (arXiv:2503.14476): token-level loss, clip-higher 0.2/0.28, no KL term, truncated
completions masked, soft overlong punishment. Rollouts come from vLLM inside the trainer (`vllm_mode: colocate`) or
from a server (`vllm_mode: server`, whose launch line `rerank run --dry-run` prints).

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.dapo --config recipes/ml100k/7_dapo.yaml
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config
from trl.rewards import get_soft_overlong_punishment

from rerank import base_model, plugins, recipe, rollout_server, run_dir, stopping, vllm_cpu
from rerank.catalogue import Catalogue
from rerank.prompts import completion, parse_completion
from rerank.rollouts import RolloutWriter
from rerank.sft import RowEncoder, check_model, save_ranker, training_rows

logger = logging.getLogger(__name__)

INPUTS = ("data", "semantic_ids", "midtrain", "candidates", "traces", "sft")
COLUMNS = (
    "row_id",
    "user",
    "history",
    "candidates",
    "relevance",
    "candidate_labels",
    "first_stage_ranks",
    "target_rank",
)
GAP = "sampling/sampling_logp_difference/mean"


@dataclass
class DapoArguments(recipe.StageArguments):
    """Options of the dapo stage."""

    rewards: list[dict] = field(
        default_factory=list, metadata={"help": "List of {name, weight, kwargs, when}; see rewards/__init__.py."}
    )
    rows: str = field(
        default="dapo", metadata={"help": "Training rows: `dapo`, those that SFT has not seen, or `all`."}
    )
    overlong_tokens: int = field(
        default=0, metadata={"help": "Tokens before the length limit in which the soft punishment grows; 0 for none."}
    )
    probe: bool = field(default=True, metadata={"help": "`rerank run` refuses rewards that `rerank probe` refuses."})
    rollout_dtype: str = field(default="auto", metadata={"help": "Number format of the colocated vLLM engine."})
    max_minutes: float | None = field(default=None, metadata={"help": "End training after this many minutes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows not in ("dapo", "all"):
            raise ValueError(f"rows is {self.rows!r}; choose dapo or all")
        if self.overlong_tokens < 0:
            raise ValueError(f"overlong_tokens is {self.overlong_tokens}; give 0 or more")


@dataclass
class DapoConfig(GRPOConfig):
    """TRL's GRPOConfig with DAPO's published settings as defaults."""

    loss_type: str = field(default="dapo", metadata={"help": "Normalisation of the loss; `dapo`: all tokens alike."})
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip range."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip range (clip-higher)."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL term; DAPO has none."})
    mask_truncated_completions: bool = field(default=True, metadata={"help": "No loss on truncated completions."})
    use_vllm: bool = field(default=True, metadata={"help": "Sample rollouts with vLLM."})
    vllm_mode: str = field(default="colocate", metadata={"help": "Where vLLM runs: colocate or server."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Token limit of a completion; by default what the sft stage found enough."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})


ARGUMENTS = (DapoArguments, DapoConfig, ModelConfig)


def check(args: DapoArguments, training_args: DapoConfig, model_args: ModelConfig) -> None:
    """Load every reward, call it on a gold and a junk completion, and look at the model folder, if it is there.

    Raises:
        ValueError: On an unknown or misused reward, or a model of another catalogue.
    """
    rewards = plugins.load_rewards(args.rewards, COLUMNS)
    labels = ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>"]
    row = {
        "row_id": 0, "user": 0, "history": [2, 3], "candidates": [0, 1], "relevance": [0.0, 1.0],
        "candidate_labels": labels, "first_stage_ranks": [1, 2], "target_rank": 2,
    }  # fmt: skip
    completions = [completion("why", [1, 0], labels), "no ranking"]
    for reward in rewards:
        reward(completions, prompts=["", ""], completion_ids=[[0], [0]], **{key: [v, v] for key, v in row.items()})
    if run_dir.is_finished(args.run_dir, "sft"):
        check_model(run_dir.stage_dir(args.run_dir, "sft") / "model", Catalogue.load(args.run_dir))


class DapoTrainer(GRPOTrainer):
    """TRL's GRPOTrainer that stores every rollout and survives a vLLM server that is away for a while.

    Overrides `_calculate_rewards` and `_generate_and_score_completions`, to keep what the store needs, and
    `_generate_single_turn`, to retry. Each calls TRL's own.
    """

    def __init__(self, *args: Any, writer: RolloutWriter, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.writer = writer
        self._scored: tuple[list, list, torch.Tensor] = ([], [], torch.empty(0))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.vllm_mode != "server":
            return super()._generate_single_turn(*args, **kwargs)
        return rollout_server.retry(super()._generate_single_turn, self.args.vllm_server_timeout)(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):  # noqa: ANN001, ANN202
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (all B, rewards)
        self._scored = (completions, completion_ids_list, rewards)
        return rewards

    def _generate_and_score_completions(self, inputs):  # noqa: ANN001, ANN202
        output = super()._generate_and_score_completions(inputs)
        self.writer.add(self._records(inputs, output))
        self.writer.flush()
        return output

    def _records(self, inputs: Sequence[dict[str, Any]], output: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """One record per local completion, in the order of the batch."""
        completions, completion_ids, all_rewards = self._scored
        first = self.accelerator.process_index * len(inputs)
        rewards = all_rewards[first : first + len(inputs)].cpu()
        totals = (rewards * self.reward_weights.cpu()).nansum(dim=1).tolist()
        records = []
        for i, row in enumerate(inputs):
            parsed, length = parse_completion(completions[i], row["candidate_labels"]), len(completion_ids[i])
            record = {name: row[name] for name in ("row_id", "user", "prompt", "candidates", "relevance")}
            components = zip(self.reward_func_names, rewards[i].tolist(), strict=True)
            records.append(
                record
                | {
                    "step": self.state.global_step,
                    "group": (first + i) // self.num_generations,
                    "completion": completions[i],
                    "completion_ids": list(completion_ids[i]),
                    "policy_logps": _row(output, "old_per_token_logps", i, length),
                    "sampling_logps": _row(output, "sampling_per_token_logps", i, length),
                    "reward_components": {name: value for name, value in components if not np.isnan(value)},
                    "reward": totals[i],
                    "advantage": output["advantages"][i].item(),
                    "truncated": completion_ids[i][-1] not in (*self.eos_token_ids, self._tokenizer.pad_token_id),
                    "failure": parsed.failure,
                    "order": parsed.order,
                    "first_stage_ranks": row["first_stage_ranks"],
                    "target_rank_before": row["target_rank"],
                    "target_rank_after": _target_rank(parsed.order, row["relevance"]),
                    "kept": True,
                    "discard_reason": None,
                }
            )
        return records


def _row(output: dict[str, torch.Tensor], name: str, i: int, length: int) -> list[float] | None:
    return output[name][i, :length].float().cpu().tolist() if name in output else None


def _target_rank(order: Sequence[int] | None, relevance: Sequence[float]) -> int | None:
    """1-based place of the best relevant candidate, None without a ranking."""
    if order is None:
        return None
    return min(place for place, position in enumerate(order, start=1) if relevance[position] == max(relevance))


def prompt_rows(rows: Sequence[dict[str, Any]], encoder: RowEncoder) -> list[dict[str, Any]]:
    """Rows as the trainer's dataset: the rendered prompt and the columns that rewards get."""
    prepared = []
    for row in rows:
        ranks = list(range(1, len(row["candidates"]) + 1))  # candidates are shown in first-stage order
        columns = {name: row[name] for name in ("row_id", "user", "history", "candidates", "relevance")}
        extra = {"candidate_labels": encoder.labels(row), "first_stage_ranks": ranks}
        target_rank = _target_rank([rank - 1 for rank in ranks], row["relevance"])
        prepared.append({"prompt": encoder.prompt(row), **columns, **extra, "target_rank": target_rank})
    return prepared


def reward_functions(args: DapoArguments, max_completion_length: int) -> tuple[list[Any], list[float]]:
    """The recipe's rewards and DAPO's soft overlong punishment (eq. 13), with their weights."""
    rewards = plugins.load_rewards(args.rewards, COLUMNS)
    functions, weights = list(rewards), [reward.weight for reward in rewards]
    if args.overlong_tokens:
        functions.append(get_soft_overlong_punishment(max_completion_length, args.overlong_tokens))
        weights.append(1.0)
    return functions, weights


def gain_over_training(rewards: Sequence[float]) -> dict[str, Any]:
    """Mean reward of the first and last fifth of the steps, and a 95 % interval of the difference (Welch)."""
    from scipy.stats import ttest_ind

    fifth = max(1, len(rewards) // 5)
    first, last = np.asarray(rewards[:fifth]), np.asarray(rewards[-fifth:])
    gain = {"reward_first_fifth": float(first.mean()), "reward_last_fifth": float(last.mean())}
    if fifth < 2:
        return {**gain, "reward_gain_interval": None}
    interval = ttest_ind(last, first, equal_var=False).confidence_interval(0.95)
    return {**gain, "reward_gain_interval": [float(interval.low), float(interval.high)]}


def gain_at_equal_ranks(rollouts: Path) -> dict[str, Any]:
    """The gain of `gain_over_training`, had both fifths of the steps the same mix of rows, and its 95 % interval.

    A step's mean reward says as much of its rows as of the policy: where the target stands first there is nothing to
    gain. So groups are compared with groups whose target had the same first-stage rank, and the differences averaged
    by how frequent a rank is in all steps (post-stratification; normal interval, groups of a rank independent). Ranks
    with fewer than two groups in either fifth are left out.
    """
    from scipy.stats import norm

    table = pq.read_table(rollouts, columns=["step", "group", "target_rank_before", "reward"]).to_pandas()
    groups = table.groupby(["step", "group"], as_index=False).mean()
    steps = np.unique(groups["step"])
    fifth = max(1, len(steps) // 5)
    chosen = (steps[:fifth], steps[-fifth:])
    parts = [groups[groups["step"].isin(part)].groupby("target_rank_before") for part in chosen]
    (mean, variance, size), (last_mean, last_variance, last_size) = (
        (part["reward"].mean(), part["reward"].var(), part["reward"].size()) for part in parts
    )
    difference, squared_error = last_mean - mean, variance / size + last_variance / last_size
    known = squared_error.dropna().index
    if known.empty:
        return {"reward_gain_at_equal_ranks": None, "reward_gain_at_equal_ranks_interval": None}
    shares = groups["target_rank_before"].value_counts()[known]
    shares = shares / shares.sum()
    gain, error = float((shares * difference).sum()), float(np.sqrt((shares**2 * squared_error).sum()))
    interval = [float(end) for end in norm.interval(0.95, gain, error)] if error > 0 else [gain, gain]
    return {"reward_gain_at_equal_ranks": gain, "reward_gain_at_equal_ranks_interval": interval}


def prepare(args: DapoArguments, config: DapoConfig, encoder: RowEncoder, base_dir: Path) -> Any:
    """The training set; sets lengths that the recipe leaves open, and refuses prompts that do not fit."""
    from datasets import Dataset

    uses = ("dapo",) if args.rows == "dapo" else ("sft", "dapo")
    rows = [row for use in uses for row in training_rows(args.run_dir, use)]
    if not rows:
        raise ValueError(
            "no training rows are left for dapo; lower rows_for_sft of the traces stage, or set rows: all"
        )
    dataset = Dataset.from_list(prompt_rows(sorted(rows, key=lambda row: row["row_id"]), encoder))
    if config.max_completion_length is None:
        config.max_completion_length = json.loads((base_dir / "generation.json").read_text())["max_completion_tokens"]
    longest = max(len(encoder.tokenizer(prompt).input_ids) for prompt in dataset["prompt"])
    if config.vllm_max_model_length is None:
        config.vllm_max_model_length = longest + config.max_completion_length
    if longest + config.max_completion_length > config.vllm_max_model_length:
        raise ValueError(
            f"the longest prompt has {longest} tokens and a completion up to {config.max_completion_length}, "
            f"but vllm_max_model_length is {config.vllm_max_model_length}; raise it or lower max_history"
        )
    return dataset


def main(args: DapoArguments, training_args: DapoConfig, model_args: ModelConfig, out_dir: Path) -> dict:
    """Train with rollouts, save the model and what ranking with it needs; returns the stage's metrics."""
    base_dir = run_dir.stage_dir(args.run_dir, "sft") / "model"
    model, tokenizer = base_model.load_pretrained(str(base_dir), model_args)
    tokenizer.padding_side = "left"
    encoder = RowEncoder(args.run_dir, tokenizer)
    dataset = prepare(args, training_args, encoder, base_dir)
    functions, training_args.reward_weights = reward_functions(args, training_args.max_completion_length)
    if training_args.vllm_mode == "server":
        rollout_server.check_vocabulary(training_args, tokenizer, encoder.catalogue.semantic_ids)
    vllm_cpu.keep_weights_live()
    writer = RolloutWriter(out_dir / "rollouts")
    options = {"dtype": args.rollout_dtype, **vllm_cpu.engine_options()}
    with vllm_cpu.trl_engine_options(**options):
        trainer = DapoTrainer(
            model,
            functions,
            training_args,
            dataset,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            writer=writer,
        )
    writer.rank = trainer.accelerator.process_index
    writer.discard_from(stopping.last_step(training_args.output_dir))
    stopping.train(trainer, args.max_minutes)
    base_model.save_trained(trainer, tokenizer, base_dir, out_dir / "model")
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    if trainer.accelerator.is_main_process:
        save_ranker(args.run_dir, encoder, out_dir / "model", True, training_args.max_completion_length)
        run_dir.write_json(out_dir / "log_history.json", trainer.state.log_history)
    return {
        "rollout_engine": "vllm" if training_args.use_vllm else "transformers",
        "vllm_mode": training_args.vllm_mode if training_args.use_vllm else None,
        "max_logp_gap": max((entry[GAP] for entry in steps if GAP in entry), default=None),
        "steps": trainer.state.global_step,
        "rows": len(dataset),
        **gain_over_training([entry["reward"] for entry in steps]),
        **gain_at_equal_ranks(writer.folder),
    }


if __name__ == "__main__":
    recipe.launch("dapo")
