"""The model that the sft stage starts from: the run's mid-trained one, or a pretrained one that the recipe names."""

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from rerank.catalogue import Catalogue, check_vocabulary
from rerank.launch import run_dir
from rerank.losses import load_losses
from rerank.models import adapters, memory, names
from rerank.models import base as base_model
from rerank.models.checks import check_pretrained
from rerank.models.one_token import check_labels
from rerank.prompts import THINK, THINK_END, PromptSettings
from rerank.rows import Prompter
from rerank.rows.checks import SPLITS, token_labels, warn_of_split_codes, warn_of_split_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig, SFTConfig

    from rerank.sft import SftArguments

TAGS = (THINK, THINK_END)


def start_model(args: "SftArguments", model_args: "ModelConfig") -> str:
    """The model's folder or hub name."""
    if model_args.model_name_or_path is not None:
        return names.resolve(model_args.model_name_or_path, "model_name_or_path")
    return str(run_dir.stage_dir(args.run_dir, "midtrain") / "model")


def check_start(args: "SftArguments", model_args: "ModelConfig") -> None:
    """Refuse a model that is not there, does not know the semantic ids of the prompts, or whose new rows no adapter
    would train; say which labels it splits. A name on the hub is asked only once the stage runs.
    """
    named = model_args.model_name_or_path
    is_midtrained = run_dir.is_finished(args.run_dir, "midtrain")
    if named is not None and is_midtrained:
        raise ValueError(
            f"model_name_or_path is {named} but {args.run_dir} has a mid-trained model; leave model_name_or_path out "
            "of the sft recipe, or the midtrain stage out of the run"
        )
    if named is not None:
        check_pretrained(named, model_args)
    if not is_midtrained and (named is None or not Path(start_model(args, model_args)).is_dir()):
        return
    if named is None:
        adapters.check_adapter(model_args, start_model(args, model_args))
    tokenizer = load_start_tokenizer(args, model_args)
    if args.task == "rerank" and all(run_dir.is_finished(args.run_dir, stage) for stage in ("candidates", "traces")):
        folder = run_dir.stage_dir(args.run_dir, "candidates")
        settings = PromptSettings.load(run_dir.stage_dir(args.run_dir, "traces"))
        losses = load_losses(args.losses, args.task)
        if losses.first_label:
            for split in SPLITS if losses.one_token else SPLITS[:1]:  # a model that ranks so ranks the held-out lists
                check_labels(tokenizer, Prompter.of_run(args.run_dir), folder / f"{split}.parquet")
        warn_of_split_labels(tokenizer, folder, settings)
        if is_midtrained and run_dir.read_record(args.run_dir, "midtrain").given.get("model_name_or_path") is None:
            warn_of_split_codes(tokenizer, folder, settings)


def check_sizes(args: "SftArguments", training_args: "SFTConfig", model_args: "ModelConfig") -> None:
    """Refuse losses of next items that are not for a catalogue of this size."""
    num_items = pq.read_metadata(run_dir.stage_dir(args.run_dir, "data") / "items.parquet").num_rows
    config = memory.start_config("sft", args, model_args, {})
    hidden_size = config.get_text_config().hidden_size if config is not None else 0
    num_targets = training_args.per_device_train_batch_size * (args.max_items - 1)
    for loss in load_losses(args.losses, args.task).auxiliary.values():
        loss.check_size(num_items, hidden_size, num_targets)


def load_start_tokenizer(args: "SftArguments", model_args: "ModelConfig") -> "PreTrainedTokenizerBase":
    """The model's tokenizer with the tags of a trace and labels that are tokens, which it gets where it lacks them.

    Raises:
        ValueError: When it does not know the semantic ids of the prompts, an adapter would leave new tokens
            untrained, or a mid-trained model has other labels.
    """
    start = start_model(args, model_args)
    tokenizer = base_model.load_tokenizer(start, model_args)
    if run_dir.is_finished(args.run_dir, "semantic_ids") and needs_ids(args, model_args):
        check_vocabulary(tokenizer, Catalogue.load(args.run_dir).semantic_ids, start)
    known = tokenizer.get_vocab()
    if new := [token for token in _tokens(args) if token not in known]:
        if model_args.model_name_or_path is None:
            raise ValueError(
                f"{start} does not know the label {new[-1]} of the longest list; set list_labels: token and "
                f"longest_list: {new[-1][3:-1]} in the midtrain recipe, or traces.ranking=number"
            )
        if model_args.use_peft and "embed_tokens" not in (model_args.lora_modules_to_save or []):
            raise ValueError(
                f"{start} lacks the tokens {', '.join(new)}, which an adapter would leave untrained; set "
                "lora_modules_to_save: [embed_tokens, lm_head], set use_peft: false, or add a midtrain stage"
            )
        base_model.extend_vocabulary(tokenizer, new)
    return tokenizer


def _tokens(args: "SftArguments") -> list[str]:
    """The tokens that the model must have: of a trace, and of labels, as far as lists and settings are known."""
    if args.task != "rerank" or not all(
        run_dir.is_finished(args.run_dir, stage) for stage in ("candidates", "traces")
    ):
        return list(TAGS)
    settings = PromptSettings.load(run_dir.stage_dir(args.run_dir, "traces"))
    return [*TAGS, *token_labels(args.run_dir, settings)]


def needs_ids(args: "SftArguments", model_args: "ModelConfig") -> bool:
    """Whether the model must know the run's semantic ids, as far as it is known before the traces stage."""
    if args.task == "next_item":
        return args.item_text == "semantic_id"
    if run_dir.is_finished(args.run_dir, "traces"):
        return PromptSettings.load(run_dir.stage_dir(args.run_dir, "traces")).shows_ids
    return model_args.model_name_or_path is None  # a mid-trained model knows all ids of its run


def load_start(
    args: "SftArguments", model_args: "ModelConfig", seed: int, out_dir: Path
) -> "tuple[PreTrainedModel, str]":
    """The model with rows for tags and labels, and the folder that an adapter is merged into at the end.

    Args:
        args: Of the stage.
        model_args: TRL's.
        seed: Of new rows.
        out_dir: For the model as it starts, where its folder lacks them and an adapter is trained.
    """
    from accelerate import PartialState

    start = start_model(args, model_args)
    model, tokenizer = base_model.load_pretrained(start, model_args)
    if model_args.model_name_or_path is None:
        return model, start
    base_model.add_tokens(model, tokenizer, _tokens(args), seed)
    if not model_args.use_peft:
        return model, start
    base_dir = out_dir / "base"
    with base_model.gathered_parameters(*model.parameters()):
        if PartialState().is_main_process:
            model.save_pretrained(base_dir)
    return model, str(base_dir)
