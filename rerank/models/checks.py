"""Whether a pretrained model can be trained, read from the files of its folder before its weights load."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.models import adapters, names
from rerank.models import base as base_model
from rerank.models.configs import read_config
from rerank.prompts.chat import PLAIN_TEMPLATE, TEMPLATE_FILE, THINK, THINK_END, check_template, render

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

TABLES = ("embed_tokens.weight", "wte.weight", "lm_head.weight")  # ends of the names of the tables of tokens
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of weights in several files
WEIGHTS = ("model.safetensors", "pytorch_model.bin", *INDEXES)
VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
POINTER = b"version https://git-lfs"


def check_pretrained(name: str, settings: "ModelConfig") -> None:
    """Refuse a model that cannot be trained; of a name on the hub what Hugging Face's cache holds is read.

    Args:
        name: As `names.resolve` takes it.
        settings: TRL's.

    Raises:
        ValueError: When its configuration, weights, GGUF file or tokenizer cannot be read or used, its embeddings do
            not fit its configuration, or its attention would be computed otherwise than it was trained.
    """
    base_model.refuse_quantized(settings)
    folder = names.local(name, "model_name_or_path", settings.model_revision)
    if folder is None:
        return
    is_whole = Path(names.resolve(name, "model_name_or_path")).is_dir()  # what a cache lacks can be loaded yet
    _refuse_pointers(folder)
    packed, config = base_model.gguf_of(folder), read_config(folder)
    if packed is not None:
        _check_blocks(packed)
    else:
        if is_whole:
            check_files(folder)
        _check_rows(folder, config)
    _check_attention(folder, config, settings.attn_implementation)
    adapters.check_modules(settings, config)
    if packed is not None or is_whole or has_vocabulary(folder):
        tokenizer = check_tokenizer(folder, settings)
        base_model.extend_vocabulary(tokenizer, [THINK, THINK_END])
        base_model.check_ordinary(tokenizer, [THINK, THINK_END])


def _refuse_pointers(folder: Path) -> None:
    """Refuse a file that Git has left out."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER):
            raise ValueError(
                f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in that folder, or download "
                "the file again"
            )


def check_files(folder: Path) -> None:
    """Refuse a folder without weights, or with some of their files."""
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(
            f"{folder} has no weights, neither {WEIGHTS[0]} nor {INDEXES[0]} with its shards; copy them into it, or "
            "download the model again"
        )
    if not (folder / WEIGHTS[0]).is_file():
        for index in [folder / name for name in INDEXES if (folder / name).is_file()][:1]:
            for shard in sorted(set(_weight_map(index).values())):
                if not (folder / shard).is_file():
                    raise ValueError(
                        f"{folder / shard} is missing, which {index.name} names; copy it into the folder, or download "
                        "the model again"
                    )


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each weight."""
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} is no index of weights; download it again") from None


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a file that a tokenizer is read from."""
    return any(next(folder.glob(pattern), None) for pattern in VOCABULARIES)


def check_tokenizer(folder: Path, settings: "ModelConfig | None" = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder; one that cannot be read, or whose template writes no prompt, is refused."""
    _refuse_pointers(folder)
    if base_model.gguf_of(folder) is None and not has_vocabulary(folder):
        raise ValueError(
            f"{folder} has no tokenizer.json and no other vocabulary; copy the model's tokenizer files into it"
        )
    tokenizer = base_model.load_tokenizer(str(folder), settings)
    check_template(tokenizer)
    try:
        render(tokenizer, "x")
    except Exception as error:  # whatever a template's own code leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the chat template of {folder} cannot write a user message: {reason}; correct {TEMPLATE_FILE} there, or "
            f"save another, such as {PLAIN_TEMPLATE}"
        ) from None
    return tokenizer


def unknown_of(name: str, revision: str = "main") -> str:
    """In words, what of a model on the hub is not known before it is loaded; empty for one on this machine."""
    folder = names.local(name, "model_name_or_path", revision)
    if folder is None:
        return "memory, chat template and tokenizer"
    is_own = Path(names.resolve(name, "model_name_or_path")).is_dir()
    return "" if is_own or has_vocabulary(folder) else "chat template and tokenizer"


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
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                yield from ((key, file.get_slice(key).get_shape()[0]) for key in file.keys() if key.endswith(TABLES))
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}; download it again") from None


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
