"""Memory that training takes on one device, reckoned from a model's configuration before anything is loaded.

Weights are counted on the meta device, what a forward pass keeps for the backward one is counted by a forward pass on
tensors without memory. Some architectures cannot do that (routed experts, rotations that depend on the row): then the
reason is said. The head's logits, which come in chunks, and what an allocator wastes are left out.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerank.launch import recipe, run_dir
from rerank.launch.trainer_options import keeps_masters
from rerank.models import base as base_model
from rerank.models import names
from rerank.models.checks import unknown_of
from rerank.models.configs import find_config, read_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
    from trl import GRPOConfig, ModelConfig

GB = 1e9
STARTS = {"midtrain": None, "sft": "midtrain", "dapo": "sft"}  # stage -> that whose model it starts from
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
        parts = ", ".join(f"{name} {size / GB:.2g}" for name, size in vars(self).items() if size)
        return f"{self.total / GB:.1f} GB ({parts})"


def training_need(
    config: "PreTrainedConfig",
    options: "TrainingArguments",
    model_args: "ModelConfig",
    length: int,
    accelerate: Mapping[str, Any],
    with_engine: bool = False,
) -> Need:
    """The memory of a stage on each of its devices.

    Args:
        config: Of the model.
        options: Of the trainer.
        model_args: TRL's: number format of the weights, adapter.
        length: Tokens of a row.
        accelerate: The accelerate file, which says what is sharded over how many devices.
        with_engine: Whether an engine beside training serves rollouts.
    """
    dtype = weights_dtype(config, model_args)
    num_weights, num_trained = count_weights(config, model_args)
    shape = Shape(options.per_device_train_batch_size, length, dtype, options.bf16 or options.fp16)
    kept = activations(config, shape, options.gradient_checkpointing)
    sizes = {
        "weights": float(dtype.itemsize * num_weights),
        "gradients": float(dtype.itemsize * num_trained),
        "optimizer": float(2 * dtype.itemsize * num_trained),  # Adam's moments are of the weights' type
    }
    if dtype.itemsize < 4 and keeps_masters(options, accelerate):
        sizes["optimizer"] = 12.0 * num_trained  # a float32 copy, and moments of its type
    stage, num_devices = _sharding(accelerate)
    for name in SHARDED.get(stage, ()):
        sizes[name] /= num_devices
    engine = engine_need(num_weights, options, accelerate, kept) if with_engine else 0.0
    return Need(**sizes, activations=float(kept), engine=engine)


def engine_need(num_weights: int, options: "GRPOConfig", accelerate: Mapping[str, Any], kept: float) -> float:
    """Bytes of a colocated engine on a device: weights in 16 bits and the cache; on a GPU its share of that.

    One that sleeps while there are activations takes what goes beyond these, which are `kept`.
    """
    found = 2.0 * num_weights / options.vllm_tensor_parallel_size
    if accelerate.get("use_cpu"):
        found += float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0) * 2**30
    else:
        found = max(found, options.vllm_gpu_memory_utilization * (there(accelerate) or 0.0))
    return max(0.0, found - kept) if options.vllm_enable_sleep_mode else found


def weights_dtype(config: "PreTrainedConfig", model_args: "ModelConfig") -> "torch.dtype":
    """The number format in which `models.base.load_pretrained` loads a model."""
    import torch

    if model_args.dtype == "auto":
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return dtype_named(model_args.dtype)


def dtype_named(name: str | None) -> "torch.dtype":
    """A number format of PyTorch; float32 without a name."""
    import torch

    return getattr(torch, name or "float32")


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


@dataclass(frozen=True)
class Shape:
    """A forward pass: rows of `length` tokens, the number format of the weights, and whether autocast is on."""

    num_rows: int
    length: int
    dtype: "torch.dtype"
    autocast: bool


def activations(config: "PreTrainedConfig", shape: Shape, checkpointing: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass.

    With gradient checkpointing the inputs of all layers, and all that one of them keeps.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    with FakeTensorMode():
        model = base_model.with_exact_attention(AutoModelForCausalLM.from_config(config, dtype=shape.dtype)).train()
        kept = saved_bytes(model, shape)
        if not checkpointing:
            return kept
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return saved_bytes(model, shape) + kept // config.get_text_config().num_hidden_layers


def saved_bytes(model: "PreTrainedModel", shape: Shape) -> int:
    """Bytes of all tensors but weights that autograd saves in a forward pass up to the head, each counted once."""
    import torch

    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: "torch.Tensor") -> "torch.Tensor":
        saved.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape.autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model.get_decoder()(input_ids=torch.zeros(shape.num_rows, shape.length, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)


def there(accelerate: Mapping[str, Any]) -> float | None:
    """Bytes that one process of a launch can take here; None where it asks for GPUs and there are none."""
    import psutil
    import torch

    if accelerate.get("use_cpu"):
        return psutil.virtual_memory().available / (accelerate.get("num_processes") or 1)
    if not torch.cuda.is_available():
        return None
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return float(min(device.total_memory for device in devices))


def estimates(stages: Mapping[str, Sequence[Any]], accelerate: str | Path) -> list[str]:
    """A line for each stage that trains a model: what it takes on each device, and whether that is more than there is.

    Of a model that is on the hub alone the line says what is not known; the stages that start from it are left out.

    Args:
        stages: Those to be launched -> their arguments, in order.
        accelerate: The accelerate file.
    """
    where = recipe.load(accelerate)
    room, length, lines = there(where), 0, not_here(stages)
    for stage, config in configs(stages).items():
        _, options, model_args = arguments = stages[stage]
        length = (options.vllm_max_model_length if stage == "dapo" else options.max_length) or length
        if config is None or not length:
            continue
        has_engine = stage == "dapo" and options.use_vllm and options.vllm_mode == "colocate"
        try:
            need = training_need(config, options, model_args, length, where, has_engine)
        except (RuntimeError, ValueError, ImportError) as error:  # of the architecture's own code
            lines.append(f"the memory that {stage} takes is not known: {str(error).splitlines()[0]}")
            continue
        too_much = "" if room is None or need.total < room else f", which is too much; {_cure(stage, arguments)}"
        there_is = "" if room is None else f" of {room / GB:.1f} GB"
        lines.append(f"{stage} takes about {need} on each device{there_is}{too_much}")
    return lines


def not_here(stages: Mapping[str, Sequence[Any]]) -> list[str]:
    """A line for each model on the hub that stages name, which says what is not known of it."""
    named: dict[str, tuple[str, str]] = {}
    if "traces" in stages and stages["traces"][0].teacher == "vllm":
        named["traces asks"] = str(stages["traces"][0].teacher_model), "main"
    for stage in [name for name in stages if name in STARTS]:
        args, _, model_args = stages[stage]
        if model_args.model_name_or_path is not None and not getattr(args, "start_model", None):
            named[f"{stage} starts from"] = model_args.model_name_or_path, model_args.model_revision
    return [
        f"{what} {name}, of which this machine has not all: {unknown} are not known until it has; "
        f"`hf download {name}` brings it"
        for what, (name, revision) in named.items()
        if (unknown := unknown_of(name, revision))
    ]


def configs(stages: Mapping[str, Sequence[Any]]) -> dict[str, "PreTrainedConfig | None"]:
    """The configuration of the model that each stage trains, of those that train one; None where it is on the hub.

    Args:
        stages: Those to be launched -> their arguments, in order.
    """
    found: dict[str, PreTrainedConfig | None] = {}
    for stage in [name for name in stages if name in STARTS]:
        args, _, model_args = stages[stage]
        found[stage] = start_config(stage, args, model_args, found)
    return found


def _cure(stage: str, arguments: Sequence[Any]) -> str:
    """Settings that would make it less, and are not made yet."""
    _, options, model_args = arguments
    cures = ["num_generations with per_device_train_batch_size"] if stage == "dapo" else ["max_length"]
    if options.per_device_train_batch_size > 1 and stage != "dapo":
        cures.insert(0, "per_device_train_batch_size")
    set_them = [] if options.gradient_checkpointing else ["gradient_checkpointing: true"]
    set_them += [] if model_args.use_peft else ["use_peft: true"]
    return f"lower {' or '.join(cures)}" + "".join(f", or set {key}" for key in set_them)


def start_config(
    stage: str, args: Any, model_args: "ModelConfig", before_it: Mapping[str, "PreTrainedConfig | None"]
) -> "PreTrainedConfig | None":
    """Of the model that a stage trains: the recipe's, that of the stage before, or the one that is made."""
    start, named, before = getattr(args, "start_model", None), model_args.model_name_or_path, STARTS[stage]
    if start is not None:
        folder = Path(names.locate(start, "start_model"))
        return read_config(folder) if (folder / "config.json").is_file() else None
    if named is not None:
        return find_config(named, model_args.model_revision)
    if before is None:
        return base_model.small_config(args, args.vocab_size)
    if before in before_it:
        return before_it[before]
    made = run_dir.stage_dir(args.run_dir, before) / "model"
    return read_config(made) if (made / "config.json").is_file() else None
