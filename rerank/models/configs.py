"""Configurations of models, read before their weights load."""

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.models import names
from rerank.models.base import gguf_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def find_config(name: str, revision: str = "main") -> "PreTrainedConfig | None":
    """The configuration of a model that is on this machine; None for a hub name whose model is not."""
    folder = names.local(name, "model_name_or_path", revision)
    return None if folder is None else read_config(folder)


def load_config(name: str, revision: str = "main") -> "PreTrainedConfig":
    """The configuration of a model; the hub is asked for one that is not on this machine."""
    from transformers import AutoConfig

    found = find_config(name, revision)
    return AutoConfig.from_pretrained(name, revision=revision) if found is None else found


def read_config(folder: Path) -> "PreTrainedConfig":
    """The configuration of a model folder, of its GGUF file if it has one.

    Raises:
        ValueError: In one line, when transformers cannot read it or does not know the architecture.
    """
    file = gguf_of(folder) or folder / "config.json"
    return copy.deepcopy(_read_config(file, file.stat().st_mtime_ns))


@functools.lru_cache
def _read_config(file: Path, written: int) -> "PreTrainedConfig":
    """`read_config` of a file as it was written then: seconds for GGUF, which holds a vocabulary too."""
    from transformers import AutoConfig

    options = {} if file.name == "config.json" else {"gguf_file": file.name}
    try:
        return AutoConfig.from_pretrained(file.parent, **options)
    except ImportError:  # of what reads such a file, with how to install it
        raise
    except Exception as error:  # whatever a damaged or unknown file leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        cure = "give the folder of another model, in a format that transformers loads"
        raise ValueError(f"{file} cannot be read as a model: {reason}; {cure}") from None


def context_length(config: "PreTrainedConfig") -> int | None:
    """Tokens of prompt and completion that a model was made for; None where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context(config: "PreTrainedConfig", whose: str, key: str, length: int | None) -> None:
    """Refuse an option that is longer than the context of a model.

    Args:
        config: Of the model.
        whose: The model, for the message.
        key: The option.
        length: Its value; None for no limit.
    """
    context = context_length(config)
    if length is not None and context is not None and length > context:
        raise ValueError(
            f"{key} is {length} but the context of {whose} is {context}; lower {key}, or take a model of a longer "
            "context (of a small one: raise context_length of the midtrain recipe)"
        )
