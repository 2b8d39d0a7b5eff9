"""LoRA adapters as the recipe's keys of TRL describe them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.models.configs import read_config
from rerank.plugins import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel
    from trl import ModelConfig

TABLES = {"embed_tokens", "lm_head"}


def lora_config(settings: "ModelConfig", model: "PreTrainedModel", dropout: bool = True) -> "PeftConfig | None":
    """The adapter for a model, or None; a table of tokens that is tied to the other stays tied when it is trained.

    PEFT by itself trains a copy of the one that is named, so that tokens are read and written by two different rows.

    Args:
        settings: TRL's.
        model: To be trained.
        dropout: Whether `lora_dropout` is followed; completions of a policy are sampled without it.
    """
    from trl import get_peft_config

    config = get_peft_config(settings)
    if config is None:
        return None
    check_tables(settings, model.config)
    if model.config.get_text_config().tie_word_embeddings and TABLES & set(settings.lora_modules_to_save or ()):
        config.ensure_weight_tying = True
    if isinstance(config.target_modules, str) and config.target_modules.isidentifier():
        config.target_modules = {config.target_modules}  # TRL takes it out of a list of one: an expression to PEFT
    if not dropout:
        config.lora_dropout = 0.0
    return config


def check_tables(settings: "ModelConfig", config: "PreTrainedConfig") -> None:
    """Refuse an adapter on one of two tables of tokens that are tied: tokens would be read and written differently."""
    named = TABLES.intersection(target_modules(settings)) if settings.use_peft else ()
    if named and config.get_text_config().tie_word_embeddings:
        raise ValueError(
            f"lora_target_modules holds {min(named)}, which this model ties to the other table of tokens, so that "
            "reading and writing would differ; leave it out, or name embed_tokens in lora_modules_to_save"
        )


def target_modules(settings: "ModelConfig") -> list[str]:
    """`lora_target_modules`, of which TRL takes a single one out of its list."""
    given = settings.lora_target_modules or []
    return [given] if isinstance(given, str) else list(given)


def check_modules(settings: "ModelConfig", config: "PreTrainedConfig") -> None:
    """`check_tables`, and refuse a name in `lora_target_modules` that no module of the model has."""
    check_tables(settings, config)
    named = [name for name in target_modules(settings) if name != "all-linear"]
    if not (settings.use_peft and named):
        return
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = [name for name, _ in model.named_modules()]
    is_expression = isinstance(settings.lora_target_modules, str) and not named[0].isidentifier()
    for name in named:
        pattern = name if is_expression else rf"(.*\.)?{re.escape(name)}"
        if not any(re.fullmatch(pattern, module) for module in modules):
            linear = [module for module, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
            known = sorted({module.rpartition(".")[2] for module in linear})
            raise ValueError(
                f"lora_target_modules holds {name}, but the model has no such module{did_you_mean(name, known)}; it "
                f"has {', '.join(known)}, and all-linear names all but the head"
            )


def check_adapter(settings: "ModelConfig", folder: str | Path) -> None:
    """`check_modules` of the model in a folder, before it is loaded; a name on the hub is not asked."""
    if settings.use_peft and (Path(folder) / "config.json").is_file():
        check_modules(settings, read_config(Path(folder)))
