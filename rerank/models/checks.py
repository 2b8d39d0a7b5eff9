"""Whether a pretrained model can be trained, read from the files of its folder before its weights load."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.models import adapters, names
from rerank.models import base as base_model
from rerank.models.configs import read_config
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
    packed, config = base_model.gguf_of(folder), read_config(folder)
    if packed is not None:
        _check_blocks(packed)
    else:
        _check_rows(folder, config)
    _check_attention(folder, config, settings.attn_implementation)
    adapters.check_modules(settings, config)
    check_template(base_model.load_tokenizer(str(folder), settings))


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
