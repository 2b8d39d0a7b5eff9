"""Stages of a pipeline that do not go together are refused before either is launched."""

from collections.abc import Mapping, Sequence
from typing import Any


def check_across(stages: Mapping[str, Sequence[Any]]) -> None:
    """Refuse stages that do not go together.

    Args:
        stages: Those to be launched -> their arguments, in order.
    """
    if "candidates" in stages and "traces" in stages:
        _check_letters(stages["candidates"][0], stages["traces"][1])
    if {"sft", "dapo"} & set(stages):
        _check_models(stages)
    if "sft" in stages and stages["sft"][0].task == "rerank":
        _check_first_labels(stages)


def _check_letters(candidates: Any, settings: Any) -> None:
    """Refuse lists that are to be made longer than letters can name."""
    from rerank.prompts import MAX_LETTERS

    if candidates.source in ("lists", "requests"):  # whose lists have lengths of their own
        return
    if settings.ranking == "letter" and candidates.num_candidates > MAX_LETTERS:
        raise ValueError(
            f"num_candidates is {candidates.num_candidates} but ranking: letter of the traces recipe names at most "
            f"{MAX_LETTERS}; lower it, or set traces.ranking=number"
        )


def _check_first_labels(stages: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a loss on the first label where a later stage cannot use the model, or an earlier one lacks its needs."""
    from rerank.losses import load_losses

    args = stages["sft"][0]
    has_scores = "traces" not in stages or stages["traces"][0].teacher == "evidence"
    losses = load_losses(args.losses, args.task, has_scores)
    if losses.one_token and "dapo" in stages:
        raise ValueError(
            f"losses of the sft recipe has {losses.one_token}, after which a model writes no ranking to reward; leave "
            "7_dapo.yaml out of the recipe folder, or train sft with the losses nll and ranknet"
        )
    if losses.first_label and "traces" in stages and stages["traces"][1].ranking == "semantic_id":
        raise ValueError(
            "losses of the sft recipe reads the first label as one token, but ranking: semantic_id of the traces "
            "recipe has labels of several; set traces.ranking=letter or traces.ranking=number"
        )


def _check_models(stages: Mapping[str, Sequence[Any]]) -> None:
    """Refuse adapters, token limits and group_forward that are not for the model which an earlier stage makes."""
    from rerank.dapo.checks import check_token_limits
    from rerank.models import adapters, group_attention, memory

    for stage, config in memory.configs(stages).items():
        args, options, model_args = stages[stage]
        if config is None:
            continue
        adapters.check_modules(model_args, config)
        if stage == "dapo":
            check_token_limits(options, "the model that it starts from", config, options.max_completion_length)
            if args.group_forward is True:
                group_attention.check_config(config, model_args.attn_implementation)
