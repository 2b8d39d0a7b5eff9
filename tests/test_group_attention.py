"""Groups in one row: TRL's own numbers, each prompt computed once, completions apart, and what is refused."""

from contextlib import nullcontext, suppress
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.distributed
from kernel_stand_ins import stand_ins
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rerank.models import group_kernels
from rerank.models.group_attention import ATTENTION, FAMILIES, group_logps_and_entropies, prepare_model
from rerank.models.group_kernels import CPU, EFFICIENT, FLASH

VOCABULARY, PROMPT, COMPLETION, TEMPERATURE = 50, 9, 6, 0.7
# prompt length and completion lengths of each group; a completion of length 0 is masked out
GROUPS = [(9, [6, 3, 1, 5]), (4, [5]), (7, [2, 0, 4])]
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2,  # large, for distributions far from uniform
}  # fmt: skip


def make_model(family="qwen3", dtype=torch.float32, **options):
    """A random model with TRL's fused head; in float64 its norms too, which otherwise compute in float32."""
    torch.manual_seed(0)
    if family in ("mistral", "phi3"):
        options.setdefault("sliding_window", None)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SHAPE, **options)).to(dtype)
    for module in model.modules():
        if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(exact_norm, module)
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return model


SUMMED_IN_FLOAT32 = 2e-6  # by TRL's fused head, whatever its type, in other pieces for other batches


def exact_norm(norm, states):
    return torch.nn.functional.rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)


def make_batch(groups=GROUPS, seed=1):
    """Padded rows (B, T) as TRL makes them, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    rows, masks = [], []
    for prompt_length, lengths in groups:
        prompt = torch.randint(1, VOCABULARY, (prompt_length,), generator=generator)
        for length in lengths:
            completion = torch.randint(1, VOCABULARY, (length,), generator=generator)
            sides = torch.zeros(PROMPT - prompt_length).long(), torch.zeros(COMPLETION - length).long()
            rows.append(torch.cat([sides[0], prompt, completion, sides[1]]))
            masks.append(torch.cat([sides[0], torch.ones(prompt_length + length).long(), sides[1]]))
    return torch.stack(rows), torch.stack(masks)


def by_trl(model, ids, mask):
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext))
    method = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
    return method(trainer, model, ids, mask, COMPLETION, compute_entropy=True)[:2]


def by_trl_unpadded(model, ids, mask):
    """Each group alone, so that its prompt has no padding: rotations are computed in float32, in float64 too."""
    found, row = [], 0
    for prompt_length, lengths in GROUPS:
        rows = slice(row, row := row + len(lengths))
        found.append(by_trl(model, ids[rows, PROMPT - prompt_length :], mask[rows, PROMPT - prompt_length :]))
    return [torch.cat(values) for values in zip(*found, strict=True)]


def by_group(model, ids, mask, **options):
    prepare_model(model)
    return group_logps_and_entropies(model, ids, mask, COMPLETION, compute_entropy=True, **options)


def gradients(model, logps, entropies):
    """Of a loss in which every value has another weight."""
    weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
    model.zero_grad()
    (logps * weights + 0.3 * entropies * weights.flip(0)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, other, logps_tolerance, gradient_tolerance, reference=by_trl):
    """The group forward of `model` against TRL's method on `other`, which has the same weights."""
    ids, mask = make_batch()
    plain, grouped = reference(other, ids, mask), by_group(model, ids, mask)
    for ours, theirs in zip(grouped, plain, strict=True):
        assert ours.shape == theirs.shape == ids[:, -COMPLETION:].shape
        torch.testing.assert_close(ours, theirs, atol=logps_tolerance, rtol=0)
        assert not ours[mask[:, -COMPLETION:] == 0].any()
    expected, found = gradients(other, *plain), gradients(model, *grouped)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = max(gradient_tolerance, SUMMED_IN_FLOAT32 if name == "lm_head.weight" else 0)
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("dtype", "against"),
    [(torch.float32, (1e-5, 1e-4)), (torch.float64, (1e-9, 1e-9, by_trl_unpadded))],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_values_and_gradients_are_trls(family, dtype, against, checkpointing):
    model, other = (make_model(family, dtype) for _ in range(2))
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    check_equal(model, other, *against)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_lora_under_gradient_checkpointing_gets_trls_gradients(reentrant):
    models = []
    for _ in range(2):
        model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        models.append(model)
    models[1].load_state_dict(models[0].state_dict())
    check_equal(*models, 1e-5, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_is_let_in_has_trls_values(family):
    model, batch = make_model(family).eval(), make_batch()
    with torch.no_grad():
        torch.testing.assert_close(by_trl(model, *batch), by_group(model, *batch), atol=1e-5, rtol=0)


def test_each_prompt_is_computed_once_and_in_each_piece_that_its_group_is_cut_into():
    model, (ids, mask) = make_model(), make_batch()
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    whole = by_group(model, ids, mask)
    assert seen == [(8 + 15) + (3 + 5) + (6 + 6)]  # prompts without their last token, and completions
    cut = by_group(model, ids, mask, batch_size=6)  # in the last group
    assert seen[1:] == [(8 + 15) + (3 + 5) + (6 + 2), 6 + 4]
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)
    assert group_logps_and_entropies(model, ids, mask, COMPLETION)[1] is None  # entropies only where asked for


def test_prompts_of_one_token_that_differ_only_in_their_padding_and_without_completions():
    model, (ids, mask) = make_model(), make_batch([(4, [2]), (5, [2])])
    ids[1, :PROMPT] = ids[0, :PROMPT]  # a token that is 0, like the padding of the row above
    for batch in ((ids, mask), make_batch([(1, [3, 2])])):
        torch.testing.assert_close(by_group(model, *batch), by_trl(model, *batch), atol=1e-5, rtol=0)
    logps, entropies = by_group(model, *make_batch([(5, [0, 0]), (3, [0])]))
    assert logps.shape == (3, COMPLETION) and not logps.any()
    assert not any(gradient.any() for gradient in gradients(model, logps, entropies).values())


def test_under_bfloat16_autocast_values_are_as_far_from_float32_as_trls():
    model, (ids, mask) = make_model(), make_batch()
    exact = by_trl(model, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        plain, grouped = by_trl(model, ids, mask), by_group(model, ids, mask)
    for ours, theirs, true in zip(grouped, plain, exact, strict=True):
        assert 0 < (ours - true).abs().max() < 2 * (theirs - true).abs().max()
    expected = gradients(model, *exact)
    for name, gradient in gradients(model, *grouped).items():
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.999, name


def test_other_rows_have_the_values_they_had_before():
    model, (ids, mask) = make_model(), make_batch()
    before = model(input_ids=ids, attention_mask=mask).logits
    prepare_model(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert ATTENTION not in model.config.to_json_string()


@pytest.mark.parametrize(("family", "options", "message"), [
    ("gpt2", {}, "model type gpt2 is none of .*qwen3.*; use one of these, or set group_forward: auto"),
    ("gemma2", {}, "attn_logit_softcapping is 50.0; use a model without, or set group_forward: auto"),
    ("mistral", {"sliding_window": 16}, "sliding_window is 16; use a model with full attention"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
     "it has layers of type sliding_attention; use a model with full attention"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
     r"its rotations depend on the length of a row \(rope_type dynamic\); use"),
    ("qwen3", {"attn_implementation": "eager"}, "Qwen3ForCausalLM cannot .*implementation is eager; use sdpa"),
    ("qwen3", {"attention_dropout": 0.1}, "attention_dropout is 0.1; set it to 0, or set group_forward: auto"),
])  # fmt: skip
def test_what_would_have_other_numbers_is_refused(family, options, message):
    model = make_model(family, **options)
    with pytest.raises(ValueError, match=message):
        prepare_model(model)


def test_an_adapter_that_lengthens_prompts_is_refused():
    model = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="its adapter adds tokens to the prompt; use LoRA, or set group_forward"):
        prepare_model(model)


@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT, None], ids=["flash", "efficient", "none"])
@pytest.mark.parametrize(
    ("dtype", "against"),
    [(torch.float32, (1e-5, 1e-4)), (torch.float64, (1e-9, 1e-9, by_trl_unpadded))],
    ids=["float32", "float64"],
)
def test_by_the_kernels_of_other_devices_values_and_gradients_are_trls(monkeypatch, kernel, dtype, against):
    monkeypatch.setattr(group_kernels, "kernel_of", lambda *tensors: kernel)
    with stand_ins():
        check_equal(*(make_model("qwen3", dtype) for _ in range(2)), *against)


@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT, None], ids=["flash", "efficient", "none"])
def test_under_autocast_other_kernels_are_as_near_to_float32_as_that_of_the_cpu(monkeypatch, kernel):
    model, (ids, mask) = make_model(), make_batch()
    exact = by_group(model, ids, mask)
    expected, errors = gradients(model, *exact), []
    for one in (CPU, kernel):
        monkeypatch.setattr(group_kernels, "kernel_of", lambda *tensors, one=one: one)
        with stand_ins(), torch.autocast("cpu", torch.bfloat16):
            found = by_group(model, ids, mask)
            errors.append(max((ours - true).abs().max() for ours, true in zip(found, exact, strict=True)))
            for name, gradient in gradients(model, *found).items():
                assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.999, name
    assert 0 < errors[1] < 2 * errors[0]


def test_positions_start_at_a_prompts_first_token_whatever_its_padding():
    seen = {}

    def model(**kwargs):
        seen.update(kwargs)
        raise InterruptedError

    with suppress(InterruptedError):
        group_logps_and_entropies(model, *make_batch(), COMPLETION)
    expected = []
    for prompt, lengths in GROUPS:  # the prompt but its last token, which predicts the first one of each completion
        expected += range(prompt - 1)
        for length in filter(None, lengths):
            expected += range(prompt - 1, prompt - 1 + length)
    assert seen["position_ids"].tolist() == [expected]
