"""Stage 7: DAPO on the SFT model, with the rewards the recipe names and rollouts from vLLM.

In: sft, candidates and traces. Out: `model/`, `rollouts/` (every completion, as Parquet) and `log_history.json`.

TRL's GRPOTrainer set up as DAPO (arXiv:2503.14476): token-level loss, clip-higher 0.2/0.28, no KL term, truncated
completions masked, soft overlong punishment, dynamic sampling (`groups`, `sampler`). Rollouts come from vLLM inside
the trainer (`vllm_mode: colocate`) or from a server (`vllm_mode: server`, whose launch line `rerank run --dry-run`
prints).

By default each sampling has one update, at which the ratio is 1 and clipping does nothing. `steps_per_generation`
above `gradient_accumulation_steps` makes it several, each on a part of the rollouts; `num_iterations` above 1 repeats
them.

`bypass_reasoning` with the dapo model of another run as `start_model` is the second stage of GR2's technical report,
which internalises the reasoning: RL continues with the reasoning cut off, on the same rows and rewards. How the report
cuts it off, and for how many steps, is not published; here prompts end in `<think></think>`.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m rerank.dapo --config recipes/ml100k/7_dapo.yaml
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trl import GRPOConfig, ModelConfig

from rerank import scoring
from rerank.catalogue import Catalogue
from rerank.dapo.checks import check_batches, check_prompts, check_rewards, check_token_limits, warn_of_repeats
from rerank.dapo.gains import gain_at_equal_ranks, gain_over_training
from rerank.dapo.prompt_stream import PromptStream
from rerank.dapo.start import check_start, generation_of, is_to_be_made, refuse_one_token, start_dir, token_limit
from rerank.launch import run_dir, stopping, validation
from rerank.launch.files import write_json
from rerank.launch.stages import Stage
from rerank.launch.values import NUMBER_FORMATS, check_choice, check_range, option
from rerank.models import adapters, engine, server
from rerank.models import base as base_model
from rerank.models.configs import context_length, read_config
from rerank.models.ranker import complete_greedily
from rerank.models.saving import check_model, save_ranker, save_trained
from rerank.prompts import THINK, THINK_END, PromptSettings
from rerank.rows import PromptedRow, Prompter
from rerank.rows.checks import prompt_lengths
from rerank.rows.on_read import places_to_check
from rerank.rows.stored import TrainingLists

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rerank.dapo.trainer import DapoTrainer

logger = logging.getLogger(__name__)

RENAMED_KEYS = {"shuffle_candidates": "give it to the candidates stage, with lists_per_row"}


@dataclass
class DapoArguments(validation.ValidatedArguments):
    """Options of the dapo stage."""

    rewards: list[dict] | str = option(
        [], "List of {name, weight, kwargs, condition}, or a file with it such as recipes/rewards/naive.yaml."
    )
    rows: str = option("dapo", "Training rows: `dapo`, those that SFT has not seen, or `all`.")
    further_lists: bool = option(
        True, "Train on the further lists of a row too, not on that of the first stage alone."
    )
    without_trace: bool = option(False, "Start from sft/model_no_trace, to see what the reasoning is worth.")
    start_model: str | None = option(
        None, "Start from this model folder of another run's dapo or sft stage, of the same prompts and items."
    )
    bypass_reasoning: bool = option(
        False, "Prompts end in the tags of an empty trace: the model learns to rank without thinking aloud."
    )
    dynamic_sampling: bool = option(True, "Drop groups whose completions all have one outcome, sample new prompts.")
    outcome: str | None = option(
        None,
        "Completions of a useful group differ in it: rank_gain or a reward. By default rank_gain, where rows have "
        "several positives the reward of the largest weight.",
    )
    max_sampling_rounds: int = option(3, "Rounds of sampling in a step at most; then it runs on the groups there are.")
    group_forward: bool | str = option(
        "auto", "Compute a prompt once for all completions of its group: true, false, or auto, where the model can."
    )
    max_logp_gap: float = option(0.05, "Stop when sampling and training log-probabilities differ by more on average.")
    probe: bool = option(True, "`rerank run` refuses rewards that `rerank probe` refuses.")
    rollout_dtype: str = option("auto", "Number format of the colocated engine; auto: vLLM's, float32 on an old CPU.")
    max_minutes: float | None = option(None, "End training after this many minutes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, ("dapo", "all"))
        check_range("max_sampling_rounds", self.max_sampling_rounds, least=1)
        check_range("max_logp_gap", self.max_logp_gap, above=0)
        check_choice("rollout_dtype", self.rollout_dtype, NUMBER_FORMATS)
        check_choice("group_forward", str(self.group_forward).lower(), ("auto", "true", "false"))
        self.group_forward = {"true": True, "false": False}.get(str(self.group_forward).lower(), "auto")
        self.rewards = scoring.read_rewards(self.rewards, "the recipe")
        scoring.check_outcome(self.outcome, self.load_rewards())
        if self.start_model and self.without_trace:
            raise ValueError(f"start_model is {self.start_model} but without_trace is true; leave one of the two out")

    def load_rewards(self) -> list[scoring.Reward]:
        """The rewards that the recipe names."""
        assert isinstance(self.rewards, list)  # once read from a file
        return scoring.load_rewards(self.rewards)


@dataclass
class DapoConfig(GRPOConfig):
    """TRL's GRPOConfig with DAPO's published settings as defaults."""

    loss_type: str = option("dapo", "Normalisation of the loss; `dapo`: all tokens alike.")
    epsilon: float = option(0.2, "Lower clip range.")
    epsilon_high: float | None = option(0.28, "Upper clip range (clip-higher); does nothing at one update a rollout.")
    beta: float = option(0.0, "Weight of the KL term; DAPO has none.")
    mask_truncated_completions: bool = option(True, "No loss on truncated completions.")
    use_vllm: bool = option(True, "Sample rollouts with vLLM.")
    vllm_mode: str = option("colocate", "Where vLLM runs: colocate or server.")
    vllm_importance_sampling_correction: bool = option(False, "Correct for the engine; costs a forward pass a step.")
    max_completion_length: int | None = option(None, "Token limit of a completion; by default that of the sft stage.")
    logging_steps: float = option(1, "Steps from one log to the next.")
    save_total_limit: int | None = option(2, "Checkpoints kept.")


def check(args: DapoArguments, training_args: DapoConfig, model_args: ModelConfig) -> None:
    """Look at batches, rewards and the model folder, if it is there."""
    check_batches(args, training_args)
    is_made, folder = run_dir.is_finished(args.run_dir, "sft"), start_dir(args)
    if is_to_be_made(folder):
        is_made = False
    elif args.start_model:
        check_start(folder, args.run_dir)
    elif is_made and not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; set no_trace_control: true in the sft recipe")
    config = read_config(folder) if (folder / "config.json").is_file() else None
    if config is not None:
        adapters.check_modules(model_args, config)
    known_limit = token_limit(training_args, folder) if is_made else training_args.max_completion_length
    check_rewards(args.load_rewards(), known_limit)
    check_token_limits(training_args, str(folder), config, known_limit)
    if run_dir.is_finished(args.run_dir, "candidates"):
        validation.validation_rows(args.run_dir, args.eval_rows)
    if is_made:
        refuse_one_token(folder)
    if is_made and PromptSettings.load(folder).shows_ids:
        check_model(folder, Catalogue.load(args.run_dir))
    if run_dir.is_finished(args.run_dir, "traces"):
        warn_of_repeats(training_args, len(lists_to_train_on(args).used))


def lists_to_train_on(args: DapoArguments) -> TrainingLists:
    """The rows that the recipe names, without their content."""
    lists = TrainingLists.find(args.run_dir, args.rows)
    return lists if args.further_lists else lists.first_only()


def prepare(
    args: DapoArguments, config: DapoConfig, prompter: Prompter, base_dir: Path
) -> tuple[PromptStream, list[PromptedRow]]:
    """The prompts to train on and the validation rows, as they are asked.

    Sets lengths that the recipe leaves open, and refuses prompts that do not fit: all of them before training where
    there are few rows, else those of a sample, and each of the others when it is read (`rerank.rows.on_read`).
    """
    lists = lists_to_train_on(args)
    rows = lists.stored(stored_rows(config), prompter.needs_features)
    num_groups = config.generation_batch_size // config.num_generations
    if len(rows) < num_groups:  # TRL would have no batch, and end at once
        raise ValueError(
            f"dapo has {len(rows)} training rows but samples {num_groups} groups at a time; make "
            "per_device_train_batch_size or gradient_accumulation_steps smaller, or set rows: all"
        )
    config.max_completion_length = token_limit(config, base_dir)
    limit = config.max_completion_length
    prompts = PromptStream(rows, prompter, config.seed, limit, lists)
    held_out = validation.validation_rows(args.run_dir, args.eval_rows, prompter.needs_features)
    asked, places = [prompter.ask(row, limit) for row in held_out], places_to_check(len(rows))
    every = [*(prompts.ask(rows[place]) for place in places), *asked]
    assert prompter.tokenizer is not None  # as of every prompter that a model is trained with
    lengths, context = prompt_lengths(prompter.tokenizer, every), context_length(read_config(base_dir))
    if config.vllm_max_model_length is None:
        unseen = 0 if len(places) == len(rows) else max(lengths) // 4  # room for prompts longer than the sample's
        needed = max(lengths) + limit
        config.vllm_max_model_length = max(needed, min(needed + unseen, context or needed + unseen))
    limits = {"vllm_max_model_length": config.vllm_max_model_length, f"the context of {base_dir}": context}
    check_prompts(prompter, limits, limit, every, lengths)
    if len(places) < len(rows):
        prompts.check = lambda prompt: check_prompts(prompter, limits, limit, [prompt])
    return prompts, asked


def stored_rows(config: DapoConfig) -> Path:
    """The file that rows are read from while the stage runs."""
    return Path(str(config.output_dir)) / "rows.arrow"


def make_trainer(
    args: DapoArguments,
    config: DapoConfig,
    model_args: ModelConfig,
    prompts: PromptStream,
    model: "PreTrainedModel",
    out_dir: Path,
) -> "DapoTrainer":
    """The trainer with its engine; LoRA's first weights follow from the seed."""
    from transformers import ProgressCallback, set_seed

    from rerank.dapo.tracking import ShortProgress
    from rerank.dapo.trainer import DapoTrainer

    engine.keep_weights_live()
    set_seed(config.seed)
    peft_config = adapters.lora_config(model_args, model, dropout=False)
    with engine.trl_engine_options(dtype=engine.engine_dtype(args.rollout_dtype), **engine.engine_options()):
        trainer = DapoTrainer(args, config, model, prompts, out_dir / "rollouts", peft_config)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress())
    if not config.use_vllm:
        logger.warning("rankings under shuffled candidates are not compared without an engine; set use_vllm: true")
    return trainer


def completer(trainer: "DapoTrainer", max_completion_tokens: int) -> validation.Complete:
    """Greedy completions by the model in training: through its engine, or without one through transformers."""

    def complete(asked: Sequence[PromptedRow]) -> list[str]:
        texts = [row.prompt for row in asked]
        if trainer.use_vllm:
            completions = trainer.generate_greedily(texts)
            trainer.rest_engine()  # an update on rollouts that are there already may come next
        else:
            completions = complete_greedily(trainer, texts, max_completion_tokens)
        return [row.begun + text for row, text in zip(asked, completions, strict=True)]

    return complete


def main(args: DapoArguments, training_args: DapoConfig, model_args: ModelConfig, out_dir: Path) -> dict:
    """Train with rollouts, save the model and what ranking with it needs; returns the stage's metrics."""
    from rerank.dapo.tracking import GAP

    base_dir = start_dir(args)
    tokenizer = base_model.load_tokenizer(str(base_dir), model_args)
    tokenizer.padding_side = "left"
    prompter = replace(Prompter.of_run(args.run_dir, tokenizer), bypass_reasoning=args.bypass_reasoning)
    prompts, held_out = prepare(args, training_args, prompter, base_dir)
    if training_args.vllm_mode == "server":
        ids = prompter.catalogue.semantic_ids if prompter.catalogue.has_ids else [THINK, THINK_END]
        server.check_vocabulary(training_args, tokenizer, ids)
    model, _ = base_model.load_pretrained(str(base_dir), model_args)
    trainer = make_trainer(args, training_args, model_args, prompts, model, out_dir)
    checks = validation.Validation(args, held_out, completer(trainer, prompts.max_completion_tokens), trainer)
    trainer.continue_from(stopping.last_checkpoint(training_args.output_dir))
    stopping.train(trainer, args.max_minutes)
    save_trained(trainer, tokenizer, base_dir, out_dir / "model", checks.finish())
    if checks.kept_step == 0:
        logger.warning("no check was better than that of the start, which is kept; see dapo/log_history.json")
    steps = [entry for entry in trainer.state.log_history if "rollouts/reward" in entry]
    if trainer.accelerator.is_main_process:
        bypasses = args.without_trace or args.bypass_reasoning
        has_trace = not bypasses and generation_of(base_dir).get("trace", True)
        save_ranker(args.run_dir, prompter, out_dir / "model", has_trace, prompts.max_completion_tokens)
        write_json(out_dir / "log_history.json", trainer.state.log_history)
        stored_rows(training_args).unlink()
    return {
        "rollout_engine": "vllm" if training_args.use_vllm else "transformers",
        "vllm_mode": training_args.vllm_mode if training_args.use_vllm else None,
        "group_forward": trainer.group_forward,
        "group_forward_obstacle": trainer.group_obstacle,
        "max_logp_gap": max((entry[GAP] for entry in steps if GAP in entry), default=None),
        "steps": trainer.state.global_step,
        "rows": len(prompts.rows),
        "prompts_drawn": trainer.sampler.state.num_drawn,
        **checks.summary(),
        **gain_over_training([entry["rollouts/reward"] for entry in steps]),
        **gain_at_equal_ranks(trainer.writer.folder),
    }


STAGE = Stage(
    name="dapo",
    arguments=(DapoArguments, DapoConfig, ModelConfig),
    main=main,
    check=check,
    inputs=("data", "candidates", "traces", "sft"),
    inputs_if_made=("semantic_ids", "midtrain"),
    files=("start_model",),
    plugins={"rewards": "rewards"},
    trains=True,
    renamed_keys={**scoring.RENAMED_KEYS, **RENAMED_KEYS},
)
