"""LoRA adapters as the recipe's keys of TRL describe them."""

from pathlib import Path
from typing import TYPE_CHECKING

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
    if not dropout:
        config.lora_dropout = 0.0
    return config


def check_tables(settings: "ModelConfig", config: "PreTrainedConfig") -> None:
    """Refuse an adapter on one of two tables of tokens that are tied: tokens would be read and written differently."""
    named = TABLES.intersection(settings.lora_target_modules or ()) if settings.use_peft else ()
    if named and config.get_text_config().tie_word_embeddings:
        raise ValueError(
            f"lora_target_modules holds {min(named)}, which this model ties to the other table of tokens, so that "
            "reading and writing would differ; leave it out, or name embed_tokens in lora_modules_to_save"
        )


def check_adapter(settings: "ModelConfig", folder: str | Path) -> None:
    """`check_tables` of the model in a folder, before it is loaded; a name on the hub is not asked."""
    if settings.use_peft and (Path(folder) / "config.json").is_file():
        from transformers import AutoConfig

        check_tables(settings, AutoConfig.from_pretrained(folder))
