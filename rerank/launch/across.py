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
    if "candidates" in stages and stages["candidates"][0].encoder is not None and "semantic_ids" in stages:
        raise ValueError(
            f"encoder of the candidates recipe is {stages['candidates'][0].encoder}, but the stage semantic_ids makes "
            "embeddings of the texts; leave it out"
        )
    if "dapo" in stages:
        _check_group_forward(stages)
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
            f"{MAX_LETTERS}; lower it, or set traces.ranking=number or token"
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
            "recipe has labels of several; set traces.ranking=letter, number or token"
        )


def _check_group_forward(stages: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a model whose groups dapo could not compute as one row."""
    from rerank.models import group_attention, memory

    args, _, model_args = stages["dapo"]
    config = memory.configs(stages)["dapo"] if args.group_forward is True else None
    if config is not None:
        group_attention.check_config(config, model_args.attn_implementation)
