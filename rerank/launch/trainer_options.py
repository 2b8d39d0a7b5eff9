"""Options of TRL and transformers that a stage cannot follow, refused before anything is loaded."""

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import GRPOConfig

# Options of sampling with which an engine draws from another distribution than the one that is trained.
SAMPLING = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}


def check_trainer_options(options: "TrainingArguments") -> None:
    """Refuse the first option that cannot be followed, with the cure."""
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
        _check_sampling(options)


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
