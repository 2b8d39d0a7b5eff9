"""Whether a pretrained model can be trained, read from the files of its folder before its weights load."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.models import adapters, names
from rerank.models import base as base_model
from rerank.prompts.chat import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl import ModelConfig

TABLES = ("embed_tokens.weight", "wte.weight", "lm_head.weight")  # ends of the names of the tables of tokens


def check_pretrained(name: str, settings: "ModelConfig") -> None:
    """Refuse a model that cannot be trained; a name on the hub is not asked.

    Args:
        name: As `names.resolve` takes it.
        settings: TRL's.

    Raises:
        ValueError: When its configuration, its GGUF file or its tokenizer cannot be read or used, its embeddings do
            not fit its configuration, or its attention would be computed otherwise than it was trained.
    """
    base_model.refuse_quantized(settings)
    folder = Path(names.resolve(name, "model_name_or_path"))
    if not folder.is_dir():
        return
    packed = base_model.gguf_of(folder)
    config = read_config(folder, packed)
    if packed is not None:
        _check_blocks(packed)
    else:
        _check_rows(folder, config)
    _check_attention(folder, config, settings.attn_implementation)
    adapters.check_tables(settings, config)
    check_template(base_model.load_tokenizer(str(folder), settings))


def read_config(folder: Path, packed: Path | None) -> "PreTrainedConfig":
    """The configuration of a model folder, of its GGUF file `packed` if there is one.

    Raises:
        ValueError: In one line, when transformers cannot read it or does not know the architecture.
    """
    file = packed or folder / "config.json"
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


def _check_blocks(packed: Path) -> None:
    """Refuse a GGUF file with tensors that cannot be turned into plain weights."""
    import gguf

    of_types = {tensor.tensor_type: tensor for tensor in gguf.GGUFReader(packed).tensors}
    for kind, tensor in of_types.items():
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise ValueError(
                f"{packed}: {tensor.name} is of type {kind.name}, which cannot be turned into plain weights to train; "
                "give a file of another type, such as Q8_0, or the model's safetensors"
            ) from None


def _tables(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and numbers of rows of the tables of tokens in a folder's safetensors files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from ((key, file.get_slice(key).get_shape()[0]) for key in file.keys() if key.endswith(TABLES))


def _check_rows(folder: Path, config: "PreTrainedConfig") -> None:
    """Refuse quantized weights, and tables of tokens with other rows than the configuration says."""
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{folder}/config.json has a quantization_config, but training needs plain weights; give the model that "
            "was not quantized"
        )
    expected = config.get_text_config().vocab_size
    for name, rows in _tables(folder):
        if rows != expected:
            raise ValueError(
                f"{folder}: {name} has {rows} rows but config.json says vocab_size {expected}; set vocab_size to "
                f"{rows} there, or take the files of one version of the model"
            )


def _check_attention(folder: Path, config: "PreTrainedConfig", attention: str | None) -> None:
    if attention == "sdpa" and base_model.caps_attention(config):
        raise ValueError(
            f"attn_implementation is sdpa, which leaves out the soft-capping of {folder}; set it to eager, or leave "
            "it out"
        )
