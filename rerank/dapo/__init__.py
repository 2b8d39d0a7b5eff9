"""Stage 7: DAPO on the SFT model, with the rewards the recipe names and rollouts from vLLM.

In: sft, candidates and traces. Out: `model/`, `rollouts/` (every completion, as Parquet) and `log_history.json`.

TRL's GRPOTrainer set up as DAPO (arXiv:2503.14476): token-level loss, clip-higher 0.2/0.28, no KL term, truncated
completions masked, soft overlong punishment, dynamic sampling (`groups`, `sampler`). Rollouts come from vLLM inside
the trainer (`vllm_mode: colocate`) or from a server (`vllm_mode: server`, whose launch line `rerank run --dry-run`
prints).

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.dapo --config recipes/ml100k/7_dapo.yaml
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import GRPOConfig, ModelConfig, get_peft_config
from trl.rewards import get_soft_overlong_punishment

from rerank import base_model, group_forward, plugins, recipe, rollout_server, run_dir, stopping, vllm_cpu
from rerank.catalogue import Catalogue
from rerank.dapo.gains import gain_at_equal_ranks, gain_over_training
from rerank.dapo.prompt_stream import REWARD_COLUMNS, PromptStream, prompt_row
from rerank.plugins import RANK_GAIN
from rerank.prompts import completion, parse_completion
from rerank.rollouts import RolloutWriter
from rerank.sft import RowEncoder, check_model, save_ranker, training_rows

logger = logging.getLogger(__name__)

INPUTS = ("data", "semantic_ids", "midtrain", "candidates", "traces", "sft")
MASKED_ROWS_COUNT_NOTHING = ("dapo", "cispo", "vespo")  # losses of TRL that divide by the tokens of the whole step
INVALID = "invalid"  # the reward's name that `invalid_reward` stands for


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
    without_trace: bool = field(
        default=False, metadata={"help": "Start from sft/model_no_trace, to see what the reasoning is worth."}
    )
    dynamic_sampling: bool = field(
        default=True, metadata={"help": "Exchange groups whose completions all have the same outcome for others."}
    )
    outcome: str = field(
        default=RANK_GAIN, metadata={"help": "What completions of a useful group differ in: rank_gain or a reward."}
    )
    max_sampling_rounds: int = field(
        default=3, metadata={"help": "Rounds of sampling in a step at most; then it runs on the groups there are."}
    )
    invalid_reward: float | None = field(
        default=None, metadata={"help": "All that a completion which is no ranking or was cut off earns, such as -1."}
    )
    shuffle_candidates: bool = field(
        default=False, metadata={"help": "Show candidates in random order; rewards keep the first stage's ranks."}
    )
    group_forward: bool = field(
        default=True, metadata={"help": "Compute the prompt once for all completions of a group in a micro-batch."}
    )
    max_logp_gap: float = field(
        default=0.05,
        metadata={"help": "Stop when sampling and training log-probabilities of a token differ by more on average."},
    )
    consistency_rows: int = field(
        default=16, metadata={"help": "Rows ranked greedily in two orders of their candidates, now and then; 0: none."}
    )
    consistency_steps: int = field(default=10, metadata={"help": "Steps between two such checks."})
    probe: bool = field(default=True, metadata={"help": "`rerank run` refuses rewards that `rerank probe` refuses."})
    rollout_dtype: str = field(
        default="auto",
        metadata={"help": "Number format of the colocated vLLM engine; `auto`: vLLM's choice, float32 on an old CPU."},
    )
    max_minutes: float | None = field(default=None, metadata={"help": "End training after this many minutes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows not in ("dapo", "all"):
            raise ValueError(f"rows is {self.rows!r}; choose dapo or all")
        if self.overlong_tokens < 0:
            raise ValueError(f"overlong_tokens is {self.overlong_tokens}; give 0 or more")
        if self.max_sampling_rounds < 1:
            raise ValueError(f"max_sampling_rounds is {self.max_sampling_rounds}; give 1 or more")
        if self.consistency_rows < 0 or self.consistency_steps < 1:
            raise ValueError(
                f"consistency_rows is {self.consistency_rows} and consistency_steps {self.consistency_steps}; "
                "give 0 rows or more, every 1 or more steps"
            )
        if not self.max_logp_gap > 0:
            raise ValueError(f"max_logp_gap is {self.max_logp_gap} but must be above 0")


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
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Correct for the engine's log-probabilities; costs a forward pass a step."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Token limit of a completion; by default what the sft stage found enough."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})


ARGUMENTS = (DapoArguments, DapoConfig, ModelConfig)


def check(args: DapoArguments, training_args: DapoConfig, model_args: ModelConfig) -> None:
    """Load every reward, call it on a gold and a junk completion, and look at the model folder, if it is there.

    Raises:
        ValueError: On an unknown or misused reward, an outcome that none reports, groups that do not fit into a
            process's batch, or a model of another catalogue.
    """
    rewards = plugins.load_rewards(args.rewards, REWARD_COLUMNS)
    plugins.check_outcome(args.outcome, rewards)
    if args.invalid_reward is not None and training_args.mask_truncated_completions:
        raise ValueError("invalid_reward needs mask_truncated_completions: false, else what was cut off never learns")
    if args.invalid_reward is not None and INVALID in [reward.name for reward in rewards]:
        raise ValueError(f"a reward is called {INVALID!r}, which is what invalid_reward is stored as; rename yours")
    if args.dynamic_sampling and training_args.loss_type not in MASKED_ROWS_COUNT_NOTHING:
        raise ValueError(
            f"loss_type {training_args.loss_type} would count the masked rows that fill up a step; use "
            f"one of {', '.join(MASKED_ROWS_COUNT_NOTHING)}, or set dynamic_sampling: false"
        )
    size = training_args.num_generations
    batch = training_args.per_device_train_batch_size * training_args.steps_per_generation
    if batch % size:
        raise ValueError(
            f"a process samples {batch} completions at a time (per_device_train_batch_size x steps_per_generation), "
            f"which num_generations {size} does not divide; change one of them"
        )
    if args.group_forward and training_args.per_device_train_batch_size % size:
        raise ValueError(
            f"per_device_train_batch_size is {training_args.per_device_train_batch_size}, but group_forward takes "
            f"whole groups of num_generations {size}; make it a multiple, or set group_forward: false"
        )
    labels = ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>"]
    row = {
        "row_id": 0, "user": 0, "history": [2, 3], "candidates": [0, 1], "relevance": [0.0, 1.0],
        "candidate_labels": labels, "first_stage_ranks": [1, 2], "target_rank": 2,
    }  # fmt: skip
    completions = [completion("why", [1, 0], labels), "no ranking"]
    for reward in rewards:
        reward(completions, prompts=["", ""], completion_ids=[[0], [0]], **{key: [v, v] for key, v in row.items()})
    if run_dir.is_finished(args.run_dir, "sft"):
        if not (folder := start_dir(args)).is_dir():
            raise FileNotFoundError(f"{folder} is missing; set no_trace_control: true in the sft recipe")
        check_model(folder, Catalogue.load(args.run_dir))


def start_dir(args: DapoArguments) -> Path:
    """The sft stage's model to start from."""
    return run_dir.stage_dir(args.run_dir, "sft") / ("model_no_trace" if args.without_trace else "model")


def reward_functions(
    args: DapoArguments, max_completion_length: int, eos_token_id: int
) -> tuple[list[Any], list[float]]:
    """The recipe's rewards, DAPO's soft overlong punishment (eq. 13) and what stands for all of them where a
    completion is invalid, with their weights."""
    rewards = plugins.load_rewards(args.rewards, REWARD_COLUMNS)
    functions, weights = list(rewards), [reward.weight for reward in rewards]
    if args.overlong_tokens:
        functions.append(get_soft_overlong_punishment(max_completion_length, args.overlong_tokens))
        weights.append(1.0)
    if args.invalid_reward is not None:
        functions.append(invalid_reward(args.invalid_reward, eos_token_id))
        weights.append(1.0)
    return functions, weights


def invalid_reward(value: float, eos_token_id: int) -> Any:
    """A reward of `value` for a completion that is no ranking or was cut off, and for no other.

    Source: arXiv:2607.01170, which keeps them in their group at -1.
    """

    def invalid(completions: list, completion_ids: list, candidate_labels: list, **columns: Any) -> list[float | None]:
        rows = zip(completions, completion_ids, candidate_labels, strict=True)
        is_valid = [ids[-1] == eos_token_id and parse_completion(text, labels).order is not None
                    for text, ids, labels in rows]  # fmt: skip
        return [None if valid else value for valid in is_valid]

    return invalid


def prepare(args: DapoArguments, config: DapoConfig, encoder: RowEncoder, base_dir: Path) -> PromptStream:
    """The prompts; sets lengths that the recipe leaves open, and refuses prompts that do not fit."""
    uses = ("dapo",) if args.rows == "dapo" else ("sft", "dapo")
    rows = [row for use in uses for row in training_rows(args.run_dir, use)]
    if not rows:
        raise ValueError(
            "no training rows are left for dapo; lower rows_for_sft of the traces stage, or set rows: all"
        )
    num_groups = config.generation_batch_size // config.num_generations
    if len(rows) < num_groups:  # TRL would have no batch, and end at once
        raise ValueError(
            f"dapo has {len(rows)} training rows but samples {num_groups} groups at a time; make "
            "per_device_train_batch_size or gradient_accumulation_steps smaller, or set rows: all"
        )
    if config.max_completion_length is None:
        config.max_completion_length = json.loads((base_dir / "generation.json").read_text())["max_completion_tokens"]
    prompts = PromptStream(rows, encoder, config.seed, args.shuffle_candidates)
    check_lengths(prompts.rows, encoder, config)
    return prompts


def check_lengths(rows: Sequence[Mapping[str, Any]], encoder: RowEncoder, config: DapoConfig) -> None:
    """Set the engine's context to what is needed, or refuse one that is too short, naming the rows."""
    prompts = [prompt_row(row, encoder)["prompt"] for row in rows]
    lengths = [len(ids) for ids in encoder.tokenizer(prompts).input_ids]
    longest, answer = max(lengths), config.max_completion_length
    if config.vllm_max_model_length is None:
        config.vllm_max_model_length = longest + answer
    room = config.vllm_max_model_length - answer
    long = [row["row_id"] for row, length in zip(rows, lengths, strict=True) if length > room]
    if long:
        shown = ", ".join(map(str, long[:3])) + (", ..." if len(long) > 3 else "")
        raise ValueError(
            f"{len(long)} of {len(rows)} prompts (row_id {shown}) have more than {room} tokens, the longest "
            f"{longest}: vllm_max_model_length is {config.vllm_max_model_length} and a completion takes up to "
            f"{answer}; raise the first or lower max_history of the traces stage"
        )


def make_trainer(
    args: DapoArguments, config: DapoConfig, model_args: ModelConfig, prompts: PromptStream, model: Any, out_dir: Path
) -> Any:
    """The trainer with its engine; LoRA's first weights follow from the seed."""
    from datasets import Dataset
    from transformers import ProgressCallback, set_seed

    from rerank.dapo.consistency import ConsistencyCheck
    from rerank.dapo.sampler import SamplingOptions
    from rerank.dapo.trainer import DapoTrainer, ShortProgress

    tokenizer = prompts.encoder.tokenizer
    functions, config.reward_weights = reward_functions(args, config.max_completion_length, tokenizer.eos_token_id)
    rounds = args.max_sampling_rounds if args.dynamic_sampling else 1
    vllm_cpu.keep_weights_live()
    if args.group_forward:
        group_forward.prepare_model(model)
    set_seed(config.seed)
    with vllm_cpu.trl_engine_options(dtype=vllm_cpu.engine_dtype(args.rollout_dtype), **vllm_cpu.engine_options()):
        trainer = DapoTrainer(
            model,
            functions,
            config,
            Dataset.from_dict({"prompt": [str(row["row_id"]) for row in prompts.rows]}),  # only its length counts
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            prompts=prompts,
            writer=RolloutWriter(out_dir / "rollouts"),
            sampling=SamplingOptions(args.outcome, rounds, args.dynamic_sampling),
            max_logp_gap=args.max_logp_gap,
            group_forward=args.group_forward,
        )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress())
    if args.consistency_rows and not config.use_vllm:
        logger.warning("consistency_rows needs use_vllm; nothing is logged of rankings under shuffled candidates")
    elif args.consistency_rows:
        trainer.consistency = ConsistencyCheck(trainer, prompts, args.consistency_rows, args.consistency_steps)
    return trainer


def main(args: DapoArguments, training_args: DapoConfig, model_args: ModelConfig, out_dir: Path) -> dict:
    """Train with rollouts, save the model and what ranking with it needs; returns the stage's metrics."""
    from rerank.dapo.trainer import GAP

    base_dir = start_dir(args)
    model, tokenizer = base_model.load_pretrained(str(base_dir), model_args)
    tokenizer.padding_side = "left"
    encoder = RowEncoder(args.run_dir, tokenizer)
    prompts = prepare(args, training_args, encoder, base_dir)
    if training_args.vllm_mode == "server":
        rollout_server.check_vocabulary(training_args, tokenizer, encoder.catalogue.semantic_ids)
    trainer = make_trainer(args, training_args, model_args, prompts, model, out_dir)
    trainer.writer.rank = trainer.accelerator.process_index
    trainer.writer.discard_from(stopping.last_step(training_args.output_dir), trainer.accelerator.num_processes)
    trainer.go_on_from(stopping.last_checkpoint(training_args.output_dir))
    stopping.train(trainer, args.max_minutes)
    base_model.save_trained(trainer, tokenizer, base_dir, out_dir / "model")
    steps = [entry for entry in trainer.state.log_history if "rollouts/reward" in entry]
    if trainer.accelerator.is_main_process:
        limit = training_args.max_completion_length
        save_ranker(args.run_dir, encoder, out_dir / "model", not args.without_trace, limit)
        run_dir.write_json(out_dir / "log_history.json", trainer.state.log_history)
    return {
        "rollout_engine": "vllm" if training_args.use_vllm else "transformers",
        "vllm_mode": training_args.vllm_mode if training_args.use_vllm else None,
        "max_logp_gap": max((entry[GAP] for entry in steps if GAP in entry), default=None),
        "steps": trainer.state.global_step,
        "rows": len(prompts.rows),
        "prompts_drawn": prompts.num_drawn,
        **gain_over_training([entry["rollouts/reward"] for entry in steps]),
        **gain_at_equal_ranks(trainer.writer.folder),
    }
