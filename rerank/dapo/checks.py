"""Checks of a dapo recipe before anything is trained: batches, rewards, rows."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rerank import scoring
from rerank.models import group_attention
from rerank.models.configs import check_context
from rerank.prompts import completion
from rerank.rows import PromptedRow, Prompter, RankingRow, reward_columns
from rerank.rows import checks as row_checks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from trl import GRPOConfig

    from rerank.dapo import DapoArguments, DapoConfig

logger = logging.getLogger(__name__)

MASKED_ROWS_COUNT_NOTHING = ("dapo", "cispo", "vespo")  # losses of TRL that divide by the tokens of the whole step
PAPERS_LIMIT = 20480  # tokens of a completion (arXiv:2503.14476), where no limit is known yet
MOST_DRAWS = 2  # of a training row: beyond it rewards rise on these rows and fall on others


def check_batches(args: "DapoArguments", config: "DapoConfig") -> None:
    """Refuse groups that do not fit into a process's batch, and a loss that would count padding."""
    if args.dynamic_sampling and config.loss_type not in MASKED_ROWS_COUNT_NOTHING:
        raise ValueError(
            f"loss_type {config.loss_type} would count the masked rows of padding groups; use "
            f"one of {', '.join(MASKED_ROWS_COUNT_NOTHING)}, or set dynamic_sampling: false"
        )
    size = config.num_generations
    batch = config.per_device_train_batch_size * config.steps_per_generation
    if batch % size:
        raise ValueError(
            f"a process samples {batch} completions at a time (per_device_train_batch_size x steps_per_generation), "
            f"which num_generations {size} does not divide; change one of them"
        )
    if args.group_forward is True and (obstacle := _cut_groups(config)):
        raise ValueError(f"{obstacle}, or set group_forward: auto")


def _cut_groups(config: "GRPOConfig") -> str | None:
    size, rows = config.num_generations, config.per_device_train_batch_size
    if rows % size == 0:
        return None
    return (
        f"per_device_train_batch_size is {rows}, but group_forward takes whole groups of num_generations "
        f"{size}; make it a multiple"
    )


def choose_group_forward(
    setting: bool | str, config: "GRPOConfig", model: "PreTrainedModel"
) -> tuple[bool, str | None]:
    """Whether a prompt is computed once for its group, as the model is then prepared for, and what speaks against it.

    Args:
        setting: True, False, or `auto`: where nothing speaks against it.
        config: Of the trainer.
        model: The policy, before it is wrapped.

    Raises:
        ValueError: When something does and `setting` is True.
    """
    if setting is False:
        return False, None
    obstacle = _cut_groups(config) or group_attention.obstacle_of(model)
    if setting == "auto" and obstacle:
        logger.info("each completion is computed with its own prompt, as TRL does: %s", obstacle)
        return False, obstacle
    group_attention.prepare_model(model)
    logger.info("a prompt is computed once for the completions of its group")
    return True, None


def check_token_limits(config: "GRPOConfig", whose: str, model: "PreTrainedConfig | None", limit: int | None) -> None:
    """Refuse limits that leave no room for a prompt, or that are beyond the model's context.

    Args:
        config: Of the trainer.
        whose: The model, for messages.
        model: Its configuration, where it is known.
        limit: Tokens of a completion, where they are known.
    """
    most = config.vllm_max_model_length
    if most is not None and limit is not None and most <= limit:
        raise ValueError(
            f"vllm_max_model_length is {most} but max_completion_length is {limit}, which leaves no room for a "
            "prompt; raise the first or lower the second"
        )
    if model is not None:
        check_context(model, whose, "vllm_max_model_length", most)
        check_context(model, whose, "max_completion_length, with a prompt's first token,", limit and limit + 1)


def check_rewards(rewards: Sequence[scoring.Reward], max_completion_tokens: int | None) -> None:
    """Call each reward on a gold and a junk completion, so that one which breaks does so before a model is loaded."""
    max_completion_tokens = max_completion_tokens or PAPERS_LIMIT
    row = RankingRow(row_id=0, user=0, history=(2, 3), candidates=(0, 1), relevance=(0.0, 1.0))
    asked = PromptedRow(row, "", ["<s_a_0><s_b_0>", "<s_a_0><s_b_1>"], max_completion_tokens)
    texts = [completion("why", [1, 0], asked.labels), "no ranking"]
    scoring.score(rewards, texts, {**reward_columns([asked, asked]), "completion_ids": [[0], [0]]})


def check_prompts(
    prompter: Prompter,
    limits: Mapping[str, int | None],
    max_completion_tokens: int,
    asked: Sequence[PromptedRow],
    lengths: Sequence[int] | None = None,
) -> None:
    """`rerank.rows.checks.check_context` of each limit, by name; `lengths` are the prompts' where they are known."""
    assert prompter.tokenizer is not None
    lengths = row_checks.prompt_lengths(prompter.tokenizer, asked) if lengths is None else lengths
    for name, most in limits.items():
        row_checks.check_context(prompter, asked, lengths, name, most, max_completion_tokens)


def warn_of_repeats(config: "DapoConfig", num_rows: int) -> None:
    """Say that a recipe draws each row more often than MOST_DRAWS, dynamic sampling left out."""
    draws = config.num_train_epochs
    if config.max_steps > 0:
        completions = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
        prompts = config.max_steps * completions / (config.num_generations * config.num_iterations)
        draws = prompts / num_rows
    if draws > MOST_DRAWS:
        logger.warning(
            "dapo draws each of its %d training rows %.1f times or more, and learns them by heart; lower max_steps, "
            "raise lists_per_row of the candidates stage, or set rows: all",
            num_rows,
            draws,
        )
