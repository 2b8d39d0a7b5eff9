"""Options of TRL and transformers that cannot be followed, refused before anything is loaded."""

import importlib.util

import pytest

from rerank.launch import recipe

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


def test_the_defaults_are_what_is_followed():
    for stage, keys in (("sft", SFT), ("dapo", DAPO)):
        recipe.resolve(stage, keys, "r.yaml")
