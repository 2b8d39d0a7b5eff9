"""Options of TRL and transformers that a stage cannot follow, refused before anything is loaded."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rerank.launch.stages import load_stage
from rerank.launch.values import NUMBER_FORMATS, check_choice

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments
    from trl import GRPOConfig, ModelConfig

USUAL_WEIGHT = 0.02  # the spread of a matrix that transformers makes, and about that of a trained one

# Options of sampling with which an engine draws from another distribution than the one that is trained.
SAMPLING = {
    "top_p": (1.0,),
    "top_k": (0, -1, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "vllm_structured_outputs_regex": (None,),
}
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # -> its package


def check_options(options: object) -> None:
    """Refuse the first option of the trainer or of the model that cannot be followed, with the cure."""
    from transformers import TrainingArguments
    from trl import ModelConfig

    if isinstance(options, TrainingArguments):
        check_trainer_options(options)
    elif isinstance(options, ModelConfig):
        check_model_options(options)


def check_trainer_options(options: "TrainingArguments") -> None:
    """`check_options` of a trainer."""
    from transformers import IntervalStrategy
    from trl import GRPOConfig, SFTConfig

    strategy = IntervalStrategy(options.eval_strategy).value
    if strategy != "no":
        raise ValueError(
            f"eval_strategy is {strategy}, but there is no set for it: while a stage trains, "
            "eval_rows validation rows (of midtrain eval_recall_rows) are ranked every eval_steps; leave it out"
        )
    if options.save_only_model:
        raise ValueError("save_only_model is true, and a stopped stage could not be resumed; leave it out")
    if options.fp16 and options.use_cpu:
        raise ValueError("fp16 is true, which a CPU does not train in; set bf16 or neither")
    if options.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("use_liger_kernel is true but liger_kernel is not installed; install it, or leave it out")
    if isinstance(options, GRPOConfig | SFTConfig) and options.model_init_kwargs:
        raise ValueError("model_init_kwargs is not read; write attn_implementation and dtype as keys of their own")
    if isinstance(options, GRPOConfig):
        check_choice("vllm_mode", options.vllm_mode, ("colocate", "server"))
        _check_sampling(options)


def check_model_options(options: "ModelConfig") -> None:
    """Refuse a number format that there is not, and attention that is not installed."""
    if options.dtype is not None:
        check_choice("dtype", options.dtype, NUMBER_FORMATS)
    package = FLASH.get(options.attn_implementation or "")
    if package and not any(importlib.util.find_spec(name) for name in (package, "kernels")):  # which brings it too
        raise ValueError(
            f"attn_implementation is {options.attn_implementation} but {package} is not installed; install it, or set "
            "attn_implementation: sdpa"
        )


def _check_sampling(options: "GRPOConfig") -> None:
    """Of reinforcement learning: completions must come from the policy as it is trained."""
    found = {name: vars(options)[name] for name in SAMPLING}
    named = {name: value for name, value in found.items() if value not in SAMPLING[name]}
    if options.generation_kwargs:
        named["generation_kwargs"] = options.generation_kwargs
    for name, value in named.items():
        raise ValueError(
            f"{name} is {value}, with which the engine samples from another distribution than the one that is "
            "trained, so that nothing is on-policy; leave it out"
        )
    if options.temperature <= 0:
        raise ValueError(f"temperature is {options.temperature}, with which all completions are alike; set it above 0")


def check_stage(stage: str, arguments: Sequence[Any], accelerate: str | None, is_launched: bool = False) -> None:
    """A stage's own check, and of one that trains a model that its steps are not lost to rounding.

    Adam's steps are about as large as the learning rate. Of a weight w, a number format of precision eps loses those
    below w x eps / 2, or half of that just below a power of two: of 0.02 in bfloat16 those below 8e-5.

    Args:
        stage: Its name.
        arguments: Its dataclasses.
        accelerate: The accelerate file, where known.
        is_launched: Whether the stage is launched at once.
    """
    import torch

    from rerank.launch import recipe

    load_stage(stage).check_before(arguments, is_launched)
    dtype = _trained_dtype(stage, arguments)
    if dtype is None or dtype.itemsize >= 4:
        return
    rate, least = arguments[1].learning_rate, USUAL_WEIGHT * torch.finfo(dtype).eps / 2
    if rate < least and not keeps_masters(arguments[1], recipe.load(accelerate) if accelerate else {}):
        raise ValueError(
            f"{stage}: weights are {str(dtype).removeprefix('torch.')} and learning_rate is {rate}, but such a weight "
            f"of {USUAL_WEIGHT} loses steps below {least:.1g}; set dtype: float32 with bf16: true, or launch with "
            "DeepSpeed, which keeps float32 weights, such as --accelerate recipes/accelerate/zero2.yaml"
        )


def _trained_dtype(stage: str, arguments: Sequence[Any]) -> "torch.dtype | None":
    """The number format of the weights that a stage trains; None where it trains none or it is not known yet."""
    from rerank.models import memory

    if stage not in memory.STARTS:
        return None
    args, _, model_args = arguments
    if model_args.use_peft and not model_args.lora_modules_to_save:
        return None  # PEFT makes adapters in float32
    if stage == "midtrain" and model_args.model_name_or_path is None:
        return None  # the small model is float32
    if model_args.dtype != "auto":
        return memory.dtype_named(model_args.dtype)
    config = memory.start_config(stage, args, model_args, {})
    return None if config is None else memory.weights_dtype(config, model_args)


def keeps_masters(options: "TrainingArguments", where: Mapping[str, Any]) -> bool:
    """Whether a launch trains float32 copies of 16-bit weights: DeepSpeed does, FSDP under mixed precision.

    Args:
        options: Of the trainer.
        where: The accelerate file, where known.
    """
    kind, precision = where.get("distributed_type"), where.get("mixed_precision", "no")
    launched = {name: os.environ.get(f"ACCELERATE_{name}", "") for name in ("USE_DEEPSPEED", "USE_FSDP")}
    if options.deepspeed or kind == "DEEPSPEED" or launched["USE_DEEPSPEED"] == "true":
        return True
    is_mixed = options.bf16 or options.fp16 or precision != "no"
    return bool(is_mixed and (options.fsdp or kind == "FSDP" or launched["USE_FSDP"] == "true"))
