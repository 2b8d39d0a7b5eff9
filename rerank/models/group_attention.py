"""All completions of a prompt in one row: the prompt is computed once, forward and backward, not once per completion.

A row holds the groups of a micro-batch one after another, without padding: a prompt without its last token, then for
each completion that last token and the completion without its own last one, so that each position of a completion
predicts one of its tokens. Positions are those of the padded rows that TRL makes. A completion attends to its prompt
and itself (Prefix Grouper, arXiv:2506.05433), by `group_kernels`.

    prepare_model(model)  # before training, and before it is wrapped; refuses a model that cannot do this

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None,
                                           compute_entropy=False, **kwargs):  # of a GRPOTrainer
        with self.accelerator.autocast():
            return *group_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy), None

The head is TRL's fused one, which GRPOTrainer adds: its temperature and number format apply, and no logits are kept.

Letters of shapes: B rows, T tokens of a padded row, C completion tokens of it, N tokens of a packed row, A attention
heads, D size of a head.
"""

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rerank.models.group_kernels import Groups, attend

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION = "group_sdpa"
FAMILIES = ("gemma", "glm", "granite", "llama", "mistral", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")


def prepare_model(model: "PreTrainedModel | PeftModel") -> None:
    """Let a model, with LoRA or without, take packed rows; with other rows it works as before.

    A reference model needs it too. It leaves no trace in saved models.

    Raises:
        ValueError: When it cannot run packed rows, or would compute other numbers than on plain rows.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if obstacle := obstacle_of(model):
        _refuse(type(base).__name__, obstacle)
    base.set_attn_implementation(ATTENTION)


def obstacle_of(model: "PreTrainedModel | PeftModel") -> str | None:
    """The first reason against packed rows of a model, with the cure; None where `prepare_model` takes it."""
    base = model
    if isinstance(model, PeftModel):
        if any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
            return "its adapter adds tokens to the prompt; use LoRA"
        base = model.get_base_model()
    return _obstacle(base.config, base.config._attn_implementation)


def check_config(config: "PreTrainedConfig", attention: str | None = None) -> None:
    """Refuse a model that `prepare_model` would refuse, before it is loaded.

    Args:
        config: Of the model.
        attention: The recipe's `attn_implementation`.
    """
    if obstacle := _obstacle(config, attention or "sdpa"):
        _refuse((config.architectures or [config.model_type])[0], obstacle)


def _refuse(name: str, obstacle: str) -> None:
    raise ValueError(f"{name} cannot run a group as one row: {obstacle}, or set group_forward: auto")


def _obstacle(config: "PreTrainedConfig", attention: str | None) -> str | None:
    options = config.to_dict()
    if options.get("attn_logit_softcapping"):
        return f"attn_logit_softcapping is {options['attn_logit_softcapping']}; use a model without"
    layers = set(options.get("layer_types") or ["full_attention"]) - {"full_attention"}
    if layers:
        return f"it has layers of type {', '.join(sorted(layers))}; use a model with full attention"
    if "layer_types" not in options and options.get("sliding_window"):
        return f"sliding_window is {options['sliding_window']}; use a model with full attention"
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type} is none of {', '.join(FAMILIES)}; use one of these"
    rope_type = options["rope_parameters"]["rope_type"]
    if rope_type in ("dynamic", "longrope"):
        return f"its rotations depend on the length of a row (rope_type {rope_type}); use a model with fixed ones"
    if attention not in ("sdpa", ATTENTION):
        return f"attn_implementation is {attention}; use sdpa"
    if options["attention_dropout"]:
        return f"attention_dropout is {options['attention_dropout']}; set it to 0"
    return None


def group_logps_and_entropies(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each completion token and entropy of its distribution, as TRL's own method returns them.

    Neighbouring rows with the same prompt are a group. Call it with the wrapped model, so that DDP and the like see
    the forward pass: one per `batch_size` rows.

    Args:
        model: With TRL's fused head, after `prepare_model`.
        input_ids: (B, T) prompts padded on the left, completions on the right.
        attention_mask: (B, T) 0 at padding.
        logits_to_keep: C.
        batch_size: Rows per forward pass; by default all. The prompt of a group that it cuts is computed twice.
        compute_entropy: Whether to return entropies.

    Returns:
        Log-probabilities (B, C), 0 at padding, and entropies alike, or None.
    """
    size = batch_size or len(input_ids)
    pairs = zip(input_ids.split(size), attention_mask.split(size), strict=True)
    logps, entropies = zip(*(_score(model, ids, mask, logits_to_keep) for ids, mask in pairs), strict=True)
    return torch.cat(logps), torch.cat(entropies) if compute_entropy else None


def _score(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`group_logps_and_entropies` of one forward pass; entropies where the model's head computes them."""
    chosen, predicts, groups = _choose_tokens(input_ids, attention_mask.bool(), logits_to_keep)
    labels = input_ids.roll(-1, dims=1).masked_fill(~predicts, -100)
    positions = attention_mask.cumsum(1) - 1  # from the prompt's first token: padding would cost bfloat16 precision
    outputs = model(
        input_ids=input_ids[chosen][None],  # (1, N)
        # four dimensions mark a mask as made already, and an empty one cannot be used by mistake
        attention_mask=torch.empty(1, 1, 1, 0, device=input_ids.device),
        position_ids=positions[chosen][None],
        shift_labels=labels[chosen][None],
        fused_lm_head=True,
        groups=groups,
    )

    def unpack(values: torch.Tensor) -> torch.Tensor:
        padded = values.new_zeros(chosen.shape).masked_scatter(chosen, values)  # (B, T)
        return padded[:, -logits_to_keep - 1 : -1]

    return unpack(outputs.log_probs), None if outputs.entropy is None else unpack(outputs.entropy)


def _choose_tokens(
    input_ids: torch.Tensor, mask: torch.Tensor, logits_to_keep: int
) -> tuple[torch.Tensor, torch.Tensor, Groups]:
    """Masks (B, T) of the tokens that make the packed row and of those that predict one, and the groups.

    Rows without a completion are left out, unless all are without.
    """
    last = input_ids.shape[1] - logits_to_keep - 1  # column of the last prompt token
    predicts = torch.zeros_like(mask)
    predicts[:, last:-1] = mask[:, last + 1 :]
    lengths = predicts.sum(1).tolist()
    prompt_lengths = mask[:, :last].sum(1).tolist()
    prompts = input_ids[:, : last + 1].masked_fill(~mask[:, : last + 1], -1)
    groups: list[tuple[int, list[int]]] = []  # first row, lengths
    for row in [row for row, length in enumerate(lengths) if length] or [0]:
        if not groups or not torch.equal(prompts[row], prompts[groups[-1][0]]):
            groups.append((row, []))
        groups[-1][1].append(lengths[row])
    chosen = predicts.clone()
    for row, _ in groups:
        chosen[row, :last] = mask[row, :last]
    return chosen, predicts, tuple((prompt_lengths[row], tuple(lengths)) for row, lengths in groups)


def group_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    groups: Groups | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature of transformers: of packed rows where `groups` is given, else transformers' own."""
    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # which leaves rotated queries and keys in float32
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    output = attend(query, key, value, groups, scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, group_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
