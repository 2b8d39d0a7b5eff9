"""Models: a pretrained one loaded, a small Qwen3-shaped one made, tokens added."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.launch.values import option
from rerank.models import gguf_tokenizer, names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
EMBEDDING_SPREAD = 0.1
# A date that a chat template asks for (Llama 3.1 and 3.2) is their own default one: prompts stay the same tomorrow.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


@dataclass
class SmallModelArguments:
    """Shape of the small model that is made when the recipe names no base model."""

    hidden_size: int = option(128, "Width of the small model.")
    num_layers: int = option(4, "Layers of the small model.")
    num_heads: int = option(4, "Attention heads of the small model.")
    num_kv_heads: int = option(2, "Key-value heads of the small model.")
    vocab_size: int = option(2000, "Size of its BPE vocabulary, id tokens not counted.")
    context_length: int = option(1024, "Positions of the small model, in tokens.")

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads} "
                "must divide one another in this order; try 128, 4 and 2"
            )


def load_pretrained(
    name: str, settings: "ModelConfig | None" = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Model (in float32 unless `settings.dtype` says otherwise) and tokenizer; a GGUF file in its folder is unpacked.

    Args:
        name: As `names.resolve` takes it.
        settings: TRL's, of which `dtype`, `attn_implementation` and `model_revision` are followed.
    """
    from transformers import AutoModelForCausalLM

    name = names.resolve(name, "model")
    kwargs = {"dtype": (settings and settings.dtype) or "float32"}
    if settings is not None:
        refuse_quantized(settings)
        kwargs |= {"attn_implementation": settings.attn_implementation, "revision": settings.model_revision}
    tokenizer = load_tokenizer(name, settings)
    file = gguf_of(Path(name))
    if file is None:
        return with_exact_attention(AutoModelForCausalLM.from_pretrained(name, **kwargs)), tokenizer
    packed = AutoModelForCausalLM.from_pretrained(name, gguf_file=file.name, **kwargs)
    # A model loaded from GGUF refuses to be saved: the same weights in a model made from its plain configuration.
    dropped = ("quantization_config", "_name_or_path", "architectures")
    config = type(packed.config)(**{k: v for k, v in packed.config.to_dict().items() if k not in dropped})
    model = type(packed)(config).to(packed.dtype)  # type: ignore[arg-type]  # a decorator hides its signature
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    return with_exact_attention(model), tokenizer


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file of a model folder; None without one, and for a name on the hub."""
    files = list(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"model folder {folder} has {len(files)} .gguf files; leave one")
    return files[0] if files else None


def caps_attention(config: "PreTrainedConfig") -> bool:
    """Whether a model soft-caps the scores of its attention (Gemma 2), which transformers' sdpa leaves out."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def with_exact_attention(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model, with eager attention in place of an sdpa that would compute other numbers."""
    if caps_attention(model.config) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return model


def load_tokenizer(name: str, settings: "ModelConfig | None" = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of `load_pretrained`, without the model; a date in its chat template is fixed.

    Where it has no token for padding, that is its end of sequence, as in TRL; batches mask it by length.

    Raises:
        ValueError: When it cannot be read, ends every text by itself, or has no token that ends one.
    """
    from transformers import AutoTokenizer

    name = names.resolve(name, "model")
    file = gguf_of(Path(name))
    revision = settings.model_revision if settings else "main"
    try:
        tokenizer: PreTrainedTokenizerBase = (
            gguf_tokenizer.load(file) if file else AutoTokenizer.from_pretrained(name, revision=revision)
        )
    except ImportError:  # of what reads it, with how to install it
        raise
    except Exception as error:  # whatever a damaged or missing file leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the tokenizer of {name} cannot be read: {reason}; copy the model's tokenizer files again"
        ) from None
    written, end = tokenizer("").input_ids, tokenizer.eos_token_id
    begins_so = end == tokenizer.bos_token_id and len(written) == 1
    if end is not None and written[-1:] == [end] and not begins_so:
        raise ValueError(
            f"the tokenizer of {name} writes {tokenizer.eos_token} behind every text, and a prompt must not end; "
            "set add_eos_token to false in its tokenizer_config.json, or take that out of its post_processor"
        )
    if end is None:
        raise ValueError(
            f"the tokenizer of {name} has no eos_token, so no answer would end; name one in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = tokenizer.chat_template
    if isinstance(template, str) and "strftime_now" in template and not template.startswith(FIXED_DATE):
        tokenizer.chat_template = FIXED_DATE + template
    return tokenizer


def refuse_quantized(settings: "ModelConfig") -> None:
    """Refuse `load_in_4bit` and `load_in_8bit`: merged adapters and vLLM's weight sync need plain weights."""
    for key, is_set in (("load_in_4bit", settings.load_in_4bit), ("load_in_8bit", settings.load_in_8bit)):
        if is_set:
            raise ValueError(f"{key} is not supported, as later stages need plain weights; use dtype: bfloat16")


def train_tokenizer(texts: Iterable[str], vocab_size: int, words: Sequence[str] = ()) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer whose merges never cross white space, with one token for each of `words`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # " 3." on a candidate line and " 3" in a ranking begin with the same token
    words_only = pre_tokenizers.Split(Regex(r"[,.]| ?[^\s,.]+|\s"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words_only, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(texts)
    weight = 1 + len(texts) // 4  # frequent enough to be merged first
    repeated = (part for word in words for part in (f"{word}\n" * weight, f" {word}" * weight))
    bpe.train_from_iterator(itertools.chain(texts, repeated), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        extra_special_tokens=list(SPECIAL_TOKENS[2:]),
    )
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


def small_config(shape: SmallModelArguments, num_tokens: int) -> "PreTrainedConfig":
    """The configuration of the small model, with rows for `num_tokens` tokens."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=num_tokens,
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=shape.context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
    )


def make_small_model(shape: SmallModelArguments, tokenizer: "PreTrainedTokenizerBase", seed: int) -> "PreTrainedModel":
    """A Qwen3-shaped model with random weights and tied embeddings, in float32.

    Embeddings are initialised with standard deviation 0.1 instead of transformers' 0.02, with which so small a model
    needs thousands of steps to copy tokens (measured on lists to sort: loss 2.4 against 3.9 after 250 steps).
    """
    import torch
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = small_config(shape, len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        _token_tables(model)[0].mul_(EMBEDDING_SPREAD / config.initializer_range)
    return model


@contextlib.contextmanager
def gathered_parameters(*weights: "torch.Tensor") -> Iterator[None]:
    """Gather weights that ZeRO-3 has sharded; changes that every process makes to them are kept."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(weights), modifier_rank=0):
        yield


def _token_tables(model: "PreTrainedModel") -> list["torch.Tensor"]:
    """The embedding and, where it is not tied to it, the output head."""
    tables = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    return tables[:1] if tables[0] is tables[1] else tables  # type: ignore[return-value]  # weights are tensors


def extend_vocabulary(tokenizer: "PreTrainedTokenizerBase", tokens: Iterable[str]) -> None:
    """Add ordinary tokens as they stand; a normalizer that prepends (Llama 2's) would split them behind a word."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def check_ordinary(tokenizer: "PreTrainedTokenizerBase", tokens: Iterable[str]) -> None:
    """Refuse tokens that are special, which would vanish from completions, or that the tokenizer splits."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    for token in tokens:
        token_id = tokenizer.convert_tokens_to_ids(token)
        is_special = token_id in special
        if is_special or tokenizer(token, add_special_tokens=False).input_ids != [token_id]:
            where = f"the tokenizer of {tokenizer.name_or_path}" if tokenizer.name_or_path else "this tokenizer"
            raise ValueError(
                f"{token} is {'a special token of' if is_special else 'split by'} {where}, where it must be an "
                "ordinary token; change that in its tokenizer.json and tokenizer_config.json, or take another model"
            )


def add_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str], seed: int
) -> list[int]:
    """Add ordinary tokens (special ones would vanish from decoded completions) with embeddings; returns their ids.

    New rows are drawn from a normal distribution with the mean and spread of those of known tokens, so that they
    differ, also where they take unused rows of a padded vocabulary (Qwen's), which are all alike.
    """
    import torch

    embedding = _token_tables(model)[0]
    with gathered_parameters(embedding):
        num_rows = embedding.shape[0]
    known = sorted(token_id for token_id in tokenizer.get_vocab().values() if token_id < num_rows)
    extend_vocabulary(tokenizer, tokens)
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))  # type: ignore[assignment]  # of a list, a list
    check_ordinary(tokenizer, tokens)
    if max(ids, default=0) >= num_rows:
        model.resize_token_embeddings(max(len(tokenizer), *(token_id + 1 for token_id in ids)), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    new = sorted(set(ids).difference(known))
    for table in _token_tables(model):
        with torch.no_grad(), gathered_parameters(table):
            old = table[known].float()
            noise = torch.randn(len(new), old.shape[1], generator=generator) * old.std()
            table[new] = (old.mean(0) + noise).to(table.dtype)
    return ids
