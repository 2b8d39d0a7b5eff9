"""Stages of a pipeline that do not go together are refused before either is launched."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_across(stages: Mapping[str, Sequence[Any]], paths: Mapping[str, Path]) -> None:
    """Refuse stages that do not go together.

    Args:
        stages: Those to be launched -> their arguments, in order.
        paths: Of their recipes.
    """
    if "data" in stages:
        _check_columns(stages, paths)
    if "candidates" in stages and "traces" in stages:
        _check_letters(stages["candidates"][0], stages["traces"][1])
    if "candidates" in stages and stages["candidates"][0].encoder is not None and "semantic_ids" in stages:
        raise ValueError(
            f"encoder of the candidates recipe is {stages['candidates'][0].encoder}, but the stage semantic_ids makes "
            "embeddings of the texts; leave it out"
        )
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


def _check_columns(stages: Mapping[str, Sequence[Any]], paths: Mapping[str, Path]) -> None:
    """Refuse columns that the data recipe does not name, facts that no column gives, and lists of another kind."""
    from rerank.candidates import check_kind
    from rerank.prompts.fields import HISTORY_FIELDS, check_item_fields, check_row_fields

    data, where = stages["data"][0], paths["data"]
    items, of_rows = _item_columns(data), data.request_fields or []
    if "candidates" in stages:
        args = stages["candidates"][0]
        with _in_recipe(paths["candidates"]):
            check_kind(args, bool(data.requests))
            cure = f"name the columns of numbers there in item_columns, or leave {{}} out of {paths['candidates']}"
            _refuse_unknown("item_numbers", args.item_numbers, items, f"{where} names the item columns", cure)
    if "traces" in stages:
        settings = stages["traces"][1]
        with _in_recipe(paths["traces"]):
            check_item_fields(settings, items, str(where))
            of_histories = HISTORY_FIELDS.values() if data.requests else ()
            check_row_fields(settings, list(of_histories), dict.fromkeys(of_rows))
            if "candidates" in stages and settings.evidence != "none":
                _check_facts(settings.evidence_names, data, stages["candidates"][0])
    if "evaluate" in stages:
        with _in_recipe(paths["evaluate"]):
            cure = (
                f"name the columns there in request_fields or item_columns, or leave {{}} out of {paths['evaluate']}"
            )
            known = [*of_rows, *items]
            _refuse_unknown("slices", stages["evaluate"][0].slices, known, f"{where} names the columns", cure)


@contextmanager
def _in_recipe(path: Path) -> Iterator[None]:
    """The name of the recipe before what is refused."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _item_columns(data: Any) -> list[str]:
    """The item columns that a data recipe names, and those that the stage takes by name or makes."""
    given = {"title": "", "category": "", "text": "", **(data.item_columns or {})}
    by_name = ["brand"] if data.items and "brand" not in given else []
    named = [name for name, column in given.items() if column is not None and name != "item"]
    return list(dict.fromkeys([*named, *by_name, *(data.text_columns or [])]))


def _check_facts(names: Sequence[str], data: Any, candidates: Any) -> None:
    """Refuse facts that the candidates stage will not have."""
    from rerank.baselines.features import FEATURES, FEEDBACK_FEATURES
    from rerank.candidates.counting import ITEM_NUMBER
    from rerank.rows.histories import COLUMN

    known = [*FEATURES, *(FEEDBACK_FEATURES if data.requests else ())]
    known += [f"{ITEM_NUMBER}{name}" for name in candidates.item_numbers]
    known += [f"{COLUMN}{name}" for name in data.candidate_fields or []]
    cure = (
        "name columns of items in item_numbers of the candidates stage, those of candidates in candidate_fields of "
        "the data stage, or leave {} out"
    )
    _refuse_unknown("evidence_names", names, known, "the facts are", cure)


def _refuse_unknown(key: str, names: Sequence[str], known: Sequence[str], there: str, cure: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        it, listed = "it" if len(unknown) == 1 else "them", ", ".join(map(repr, unknown))
        raise ValueError(f"{key} holds {listed} but {there} {', '.join(known) or 'none'}; {cure.replace('{}', it)}")
