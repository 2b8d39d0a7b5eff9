"""All completions of a prompt in one row: the prompt is computed once, forward and backward, not once per completion.

A row holds the groups of a micro-batch one after another, without padding: a prompt without its last token, then for
each completion that last token and the completion without its own last one, so that each position of a completion
predicts one of its tokens. Positions are those of the padded rows that TRL makes. A completion attends to its prompt
and itself (Prefix Grouper, arXiv:2506.05433).

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

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION = "group_sdpa"
FAMILIES = ("gemma", "glm", "granite", "llama", "mistral", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")

# Per group: number of tokens of its prompt, without the last, and of each of its completions.
Groups = tuple[tuple[int, tuple[int, ...]], ...]


def prepare_model(model: "PreTrainedModel | PeftModel") -> None:
    """Let a model, with LoRA or without, take packed rows; with other rows it works as before.

    A reference model needs it too. It leaves no trace in saved models.

    Raises:
        ValueError: When it cannot run packed rows, or would compute other numbers than on plain rows.
    """
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    obstacle = _obstacle(base.config, base.config._attn_implementation)
    if any(adapter.is_prompt_learning for adapter in adapters):
        obstacle = "its adapter adds tokens to the prompt; use LoRA"
    _refuse(type(base).__name__, obstacle)
    base.set_attn_implementation(ATTENTION)


def check_config(config: "PreTrainedConfig", attention: str | None = None) -> None:
    """Refuse a model that `prepare_model` would refuse, before it is loaded.

    Args:
        config: Of the model.
        attention: The recipe's `attn_implementation`.
    """
    _refuse((config.architectures or [config.model_type])[0], _obstacle(config, attention or "sdpa"))


def _refuse(name: str, obstacle: str | None) -> None:
    if obstacle:
        raise ValueError(f"{name} cannot run a group as one row: {obstacle}, or set group_forward: false")


def _obstacle(config: "PreTrainedConfig", attention: str | None) -> str | None:
    """The first reason against packed rows, with the cure."""
    options = config.to_dict()
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type} is none of {', '.join(FAMILIES)}; use one of these"
    layers = set(options.get("layer_types") or ["full_attention"]) - {"full_attention"}
    if layers:
        return f"it has layers of type {', '.join(sorted(layers))}; use a model with full attention"
    if "layer_types" not in options and options.get("sliding_window"):
        return f"sliding_window is {options['sliding_window']}; use a model with full attention"
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
    heads_per_key = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, heads_per_key), repeat_kv(value, heads_per_key)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # which leaves rotated queries and keys in float32
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    output = attention_of(device)(query, key, value, groups, scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, group_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _slices(groups: Groups) -> Iterator[tuple[slice, list[slice]]]:
    """The places of a prompt and of each of its completions in the packed row, per group."""
    start = 0
    for prompt_length, lengths in groups:
        ends = list(accumulate((prompt_length, *lengths), initial=start))
        prompt, *completions = [slice(*pair) for pair in pairwise(ends)]
        yield prompt, completions
        start = ends[-1]


def attend_in_turn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Groups, scaling: float | None
) -> torch.Tensor:
    """Output (1, A, N, D) for queries, keys and values of that shape: one call per prompt and completion."""
    outputs = []
    for prompt, completions in _slices(groups):
        for own, before in [(prompt, slice(0, 0)), *((completion, prompt) for completion in completions)]:
            keys = torch.cat([key[:, :, before], key[:, :, own]], dim=2)
            values = torch.cat([value[:, :, before], value[:, :, own]], dim=2)
            mask = causal_lower_right(own.stop - own.start, keys.shape[2])
            outputs.append(scaled_dot_product_attention(query[:, :, own], keys, values, mask, scale=scaling))
    return torch.cat(outputs, dim=2)


def attention_of(device: str) -> Callable[..., torch.Tensor]:
    """The attention of packed rows on a type of device."""
    return CpuGroupAttention.apply if device == "cpu" else attend_in_turn


class CpuGroupAttention(torch.autograd.Function):
    """The same output as `attend_in_turn`, without copies of a prompt's keys and values.

    The completions of a group attend to its prompt in one call of PyTorch's flash attention and to themselves in one
    call each; the two outputs are weighted by their softmax sums. The kernel's backward pass needs only the output and
    sum of a softmax: given those of the total, it returns each part's gradients (Ring Attention, arXiv:2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query, key, value, groups: Groups, scaling: float | None) -> torch.Tensor:  # noqa: ANN001
        output = torch.empty_like(query)  # (1, A, N, D)
        log_sums = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for queries, keys, causal in _calls(groups):
            found, found_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], is_causal=causal, scale=scaling
            )
            if not causal:  # the completions' attention to themselves is there already
                own, own_sums = output[:, :, queries], log_sums[:, :, queries]
                sums = torch.logaddexp(own_sums, found_sums)
                found = torch.lerp(own.to(sums), found.to(sums), (found_sums - sums).exp()[..., None])
                found_sums = sums
            output[:, :, queries], log_sums[:, :, queries] = found, found_sums
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.groups, ctx.scaling = groups, scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for queries, keys, causal in _calls(ctx.groups):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                output[:, :, queries], log_sums[:, :, queries], 0.0, causal, scale=ctx.scaling,
            )  # fmt: skip
            for total, part, where in zip(gradients, parts, (queries, keys, keys), strict=True):
                total[:, :, where] += part
        return *gradients, None, None


def _calls(groups: Groups) -> Iterator[tuple[slice, slice, bool]]:
    """Queries, their keys, and whether causal: each part with itself, then all completions with the prompt."""
    for prompt, completions in _slices(groups):
        parts = [part for part in (prompt, *completions) if part.stop > part.start]
        yield from ((part, part, True) for part in parts)
        if prompt in parts and len(parts) > 1:
            yield slice(parts[1].start, parts[-1].stop), prompt, False
