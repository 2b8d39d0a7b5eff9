"""Memory that training takes on one device, reckoned from a model's configuration before anything is loaded.

Weights are counted on the meta device, what a forward pass keeps for the backward one is counted by a forward pass on
tensors without memory, so that both hold for any architecture. The head's logits, which come in chunks, and what an
allocator wastes are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerank.launch import recipe, run_dir
from rerank.models import base as base_model
from rerank.models import names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
    from trl import ModelConfig

GB = 1e9
STARTS = {"midtrain": None, "sft": "midtrain", "dapo": "sft"}  # stage -> that whose model it starts from
ADAM = 8  # bytes of a trained weight: two float32 moments
CURE = "lower per_device_train_batch_size or max_length, set gradient_checkpointing: true, or use_peft: true"
SHARDED = {1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}  # by ZeRO stage


@dataclass(frozen=True)
class Need:
    """Bytes on one device, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    engine: float = 0.0

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in vars(self).items() if size)
        return f"{self.total / GB:.1f} GB ({parts})"


def training_need(
    config: "PreTrainedConfig",
    options: "TrainingArguments",
    model_args: "ModelConfig",
    length: int,
    accelerate: Mapping[str, Any],
    with_engine: bool = False,
) -> Need:
    """What a stage takes on each of its devices.

    Args:
        config: Of the model.
        options: Of the trainer.
        model_args: TRL's: number format of the weights, adapter.
        length: Tokens of a row.
        accelerate: The accelerate file, which says what is sharded over how many devices.
        with_engine: Whether a second copy of the weights serves rollouts; its cache is not counted.
    """
    import torch

    number = 4 if model_args.dtype in (None, "auto", "float32") else 2
    num_weights, num_trained = count_weights(config, model_args)
    compute = torch.bfloat16 if options.bf16 or options.fp16 or number == 2 else torch.float32
    kept = activations(config, options.per_device_train_batch_size, length, compute, options.gradient_checkpointing)
    sizes = {
        "weights": float(number * num_weights),
        "gradients": float(number * num_trained),
        "optimizer": float(ADAM * num_trained),
    }
    stage, num_devices = _sharding(accelerate)
    for name in SHARDED.get(stage, ()):
        sizes[name] /= num_devices
    return Need(**sizes, activations=float(kept), engine=float(2 * num_weights if with_engine else 0))


def _sharding(accelerate: Mapping[str, Any]) -> tuple[int, int]:
    """The stage of ZeRO that an accelerate file amounts to, and the number of devices."""
    stage = accelerate.get("deepspeed_config", {}).get("zero_stage", 0)
    if accelerate.get("distributed_type") == "FSDP":
        stage = 3
    return stage, accelerate.get("num_processes") or 1


def count_weights(config: "PreTrainedConfig", model_args: "ModelConfig") -> tuple[int, int]:
    """All weights of a model, with its adapter if it has one, and those that are trained."""
    import torch
    from transformers import AutoModelForCausalLM

    from rerank.models.adapters import lora_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapter = lora_config(model_args, model)
        if adapter is not None:
            from peft import get_peft_model

            model = get_peft_model(model, adapter)
    sizes = {weight: weight.numel() for weight in model.parameters()}  # a tied table once
    return sum(sizes.values()), sum(size for weight, size in sizes.items() if weight.requires_grad)


def activations(
    config: "PreTrainedConfig", num_rows: int, length: int, dtype: "torch.dtype", checkpointing: bool
) -> int:
    """Bytes that a forward pass of `num_rows` rows of `length` tokens keeps for the backward pass.

    With gradient checkpointing the inputs of all layers, and all that one of them keeps.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        kept = saved_bytes(model, num_rows, length, dtype)
        if not checkpointing:
            return kept
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return saved_bytes(model, num_rows, length, dtype) + kept // config.get_text_config().num_hidden_layers


def saved_bytes(model: "PreTrainedModel", num_rows: int, length: int, dtype: "torch.dtype") -> int:
    """Bytes of all tensors but weights that autograd saves in a forward pass up to the head, each counted once."""
    import torch

    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: "torch.Tensor") -> "torch.Tensor":
        saved.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model.get_decoder()(input_ids=torch.zeros(num_rows, length, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)


def there(accelerate: Mapping[str, Any]) -> float | None:
    """Bytes that one process of a launch can take here; None where it asks for GPUs and there are none."""
    import psutil
    import torch

    if accelerate.get("use_cpu"):
        return psutil.virtual_memory().available / (accelerate.get("num_processes") or 1)
    if not torch.cuda.is_available():
        return None
    return float(min(torch.cuda.mem_get_info(device)[1] for device in range(torch.cuda.device_count())))


def estimates(stages: Mapping[str, Sequence[Any]], accelerate: str | Path) -> list[str]:
    """A line for each stage that trains a model: what it takes on each device, and whether that is more than there is.

    A model that has to be asked for on the hub is left out, as are the stages that start from it.

    Args:
        stages: Those to be launched -> their arguments, in order.
        accelerate: The accelerate file.
    """
    where = recipe.load(accelerate)
    room, length, lines = there(where), 0, []
    configs: dict[str, PreTrainedConfig | None] = {}
    for stage in [name for name in stages if name in STARTS]:
        args, options, model_args = stages[stage]
        config = configs[stage] = _config(stage, args, model_args, configs)
        length = (options.vllm_max_model_length if stage == "dapo" else options.max_length) or length
        if config is None or not length:
            continue
        has_engine = stage == "dapo" and options.use_vllm and options.vllm_mode == "colocate"
        need = training_need(config, options, model_args, length, where, has_engine)
        lines.append(f"{stage} takes about {need} on each device{_compared(need.total, room)}")
    return lines


def _compared(size: float, room: float | None) -> str:
    """The end of a line about `size` bytes where there are `room`."""
    if room is None:
        return ""
    return f" of {room / GB:.1f} GB" + (f", which is too much: {CURE}" if size > room else "")


def _config(
    stage: str, args: Any, model_args: "ModelConfig", configs: Mapping[str, "PreTrainedConfig | None"]
) -> "PreTrainedConfig | None":
    """Of the model that a stage trains: the recipe's, that of the stage before, or the one that is made."""
    from transformers import AutoConfig

    named, before = model_args.model_name_or_path, STARTS[stage]
    if named is not None:
        folder = Path(names.resolve(named, "model_name_or_path"))
        files = list(folder.glob("*.gguf"))
        return (
            AutoConfig.from_pretrained(folder, **({"gguf_file": files[0].name} if files else {}))
            if folder.is_dir()
            else None
        )
    if before is None:
        return base_model.small_config(args, args.vocab_size)
    if before in configs:
        return configs[before]
    made = run_dir.stage_dir(args.run_dir, before) / "model"
    return AutoConfig.from_pretrained(made) if (made / "config.json").is_file() else None
