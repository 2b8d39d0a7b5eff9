"""Options of TRL and transformers that cannot be followed, refused before anything is loaded."""

import importlib.util

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny_model import tiny_model, tiny_tokenizer

from rerank.launch import recipe
from rerank.launch.trainer_options import USUAL_WEIGHT, check_stage

SFT = {"run_dir": "run", "use_cpu": True, "bf16": False, "report_to": "none"}
DAPO = {**SFT, "rewards": [{"name": "rank_promotion"}]}


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("sft", {"eval_strategy": "steps", "eval_steps": 5}, "eval_strategy is steps, .* eval_rows validation rows"),
        ("dapo", {"eval_strategy": "epoch"}, "eval_strategy is epoch, .* eval_rows validation rows"),
        ("sft", {"save_only_model": True}, "save_only_model is true, and a stopped stage could not be resumed"),
        ("sft", {"fp16": True}, "fp16 is true, which a CPU does not train in; set bf16 or neither"),
        ("dapo", {"model_init_kwargs": {"attn_implementation": "sdpa"}}, "model_init_kwargs .* write attn_implem"),
        ("dapo", {"top_p": 0.8}, "top_p is 0.8, .* from another distribution"),
        ("dapo", {"top_k": 3}, "top_k is 3, .* from another distribution"),
        ("dapo", {"min_p": 0.1}, "min_p is 0.1, .* from another distribution"),
        ("dapo", {"repetition_penalty": 1.2}, "repetition_penalty is 1.2, .* from another distribution"),
        ("dapo", {"generation_kwargs": {"frequency_penalty": 1}}, "generation_kwargs .* from another distribution"),
        ("dapo", {"vllm_structured_outputs_regex": "x"}, "vllm_structured_outputs_regex is x, .* another distribut"),
        ("sft", {"dtype": "bf16"}, "dtype is 'bf16' but must be one of auto, float32, bfloat16, float16"),
        ("dapo", {"dtype": "bf16"}, "dtype is 'bf16' but must be one of auto, float32, bfloat16, float16"),
        ("dapo", {"vllm_mode": "colocated"}, "vllm_mode is 'colocated' but must be one of colocate, server"),
        ("dapo", {"rollout_dtype": "bf16"}, "rollout_dtype is 'bf16' but must be one of auto, float32, bfloat16, flo"),
        ("dapo", {"temperature": 0.0}, "temperature is 0.0, .* set it above 0"),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused(stage, options, message):
    keys = {**(DAPO if stage == "dapo" else SFT), **options}
    with pytest.raises(ValueError, match=rf"^r.yaml: {message}"):
        recipe.resolve(stage, keys, "r.yaml")


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger_kernel is installed")
def test_a_kernel_that_is_not_installed_is_refused():
    with pytest.raises(ValueError, match="use_liger_kernel is true but liger_kernel is not installed; install it, or"):
        recipe.resolve("sft", {**SFT, "use_liger_kernel": True}, "r.yaml")


@pytest.mark.parametrize("version", [2, 3])
def test_attention_that_is_not_installed_is_refused(version, monkeypatch):
    keys = {**SFT, "attn_implementation": f"flash_attention_{version}"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"is flash_attention_{version} but flash_attn.* is not installed; install"):
        recipe.resolve("sft", keys, "r.yaml")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name.startswith("flash_attn") else None)
    recipe.resolve("sft", keys, "r.yaml")


def test_the_defaults_are_what_is_followed():
    for stage, keys in (("sft", SFT), ("dapo", DAPO)):
        recipe.resolve(stage, keys, "r.yaml")


# --- weights of 16 bits, of which small steps are lost

CPU, ZERO2, ZERO3, FSDP = (f"recipes/accelerate/{name}.yaml" for name in ("cpu", "zero2", "zero3", "fsdp2"))
IN_16_BITS = {"dtype": "bfloat16", "learning_rate": 5e-7}
STARTS = {
    "midtrain": {**SFT, "num_documents": 10, "model_name_or_path": "Qwen/Qwen3-8B"},
    "sft": {**SFT, "model_name_or_path": "Qwen/Qwen3-8B"},
    "dapo": DAPO,
}
REFUSAL = (
    r"weights are bfloat16 and learning_rate is 5e-07, but such a weight of 0.02 loses steps below 8e-05; set dtype: "
    r"float32 with bf16: true, or launch with DeepSpeed, .* --accelerate recipes/accelerate/zero2.yaml"
)


def check_weights(stage, accelerate=CPU, **options):
    check_stage(stage, recipe.resolve(stage, {**STARTS[stage], **IN_16_BITS, **options}, "r.yaml"), accelerate)


@pytest.mark.parametrize("stage", STARTS)
def test_small_steps_of_weights_in_16_bits_are_refused_and_each_cure_works(stage, monkeypatch):
    for accelerate in (CPU, "recipes/accelerate/ddp.yaml", "recipes/accelerate/one_gpu.yaml", None):
        with pytest.raises(ValueError, match=f"^{stage}: {REFUSAL}"):
            check_weights(stage, accelerate)
    check_weights(stage, dtype="float32")
    check_weights(stage, ZERO2)
    check_weights(stage, learning_rate=1e-4)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # launched by hand, with an accelerate file of DeepSpeed
    check_weights(stage, None)


def test_fsdp_keeps_float32_weights_under_mixed_precision_only(tmp_path):
    check_weights("dapo", FSDP)
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump({**recipe.load(FSDP), "mixed_precision": "no"}))
    with pytest.raises(ValueError, match=REFUSAL):
        check_weights("dapo", str(plain))


def test_the_format_of_auto_is_that_of_the_start_model(tmp_path):
    config = tiny_model(tiny_tokenizer()).config
    for dtype, is_refused in (("float32", False), ("bfloat16", True)):
        folder = tmp_path / "run/sft/model"
        config.dtype = dtype
        config.save_pretrained(folder)
        arguments = recipe.resolve(
            "dapo", {**DAPO, **IN_16_BITS, "dtype": "auto", "run_dir": str(tmp_path / "run")}, ""
        )
        if not is_refused:
            check_stage("dapo", arguments, CPU)
            continue
        with pytest.raises(ValueError, match=REFUSAL):
            check_stage("dapo", arguments, CPU)
    check_weights("dapo", dtype="auto", run_dir=str(tmp_path / "none"))  # not known before sft is made


def test_an_adapter_is_float32_but_not_the_modules_that_it_saves():
    lora = {"use_peft": True, "lora_target_modules": ["q_proj"]}
    check_weights("dapo", **lora)
    with pytest.raises(ValueError, match=REFUSAL):
        check_weights("dapo", **lora, lora_modules_to_save=["lm_head"])
    model = tiny_model(tiny_tokenizer(), tied=False).to(torch.bfloat16)  # PEFT's own doing, on which this stands
    made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    formats = {name: weight.dtype for name, weight in made.named_parameters() if weight.requires_grad}
    assert {dtype for name, dtype in formats.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in formats.items() if "lm_head" in name} == {torch.bfloat16}


def test_the_bound_is_where_a_weight_of_that_size_begins_to_move():
    def moved(dtype, rate, start=USUAL_WEIGHT, steps=1):
        weight = torch.nn.Parameter(torch.full((1,), start, dtype=dtype))
        optimizer, before = torch.optim.AdamW([weight], rate, weight_decay=0), weight.item()
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.item() != before

    for dtype in (torch.bfloat16, torch.float16):
        least = USUAL_WEIGHT * torch.finfo(dtype).eps / 2
        assert moved(dtype, least) and not moved(dtype, least / 2.1)
    assert not moved(torch.bfloat16, 5e-7, start=1e-3, steps=200) and moved(torch.float32, 5e-7)
