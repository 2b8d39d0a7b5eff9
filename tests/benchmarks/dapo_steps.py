"""Whole DAPO steps against plain TRL, and rollouts against Hugging Face's `generate`; part of `tests.benchmarks.dapo`.

`useful_groups_ratio`: groups a second whose completions differ in the target's rank gain, trained on by the dapo stage
over those that TRL's GRPOTrainer with vLLM trains on, both from the sft model of a finished run (`--run`, such as that
of `make demo`) with its recipe; shares of useful groups stand beside. TRL is as installed, but for the patches without
which it cannot sample on CPU. `step_efficiency`: seconds of vLLM for the step's tokens and of the group forward and
backward pass over what was kept, each alone, over the seconds of the whole step. The first step counts on no side.
`step_efficiency_validating`: the same with each step's part of a check of the recipe's validation rows, measured after
the last step, added to its seconds.

`vllm_speedup`: seconds of HF `generate` over those of vLLM for 64 prompts of 250 tokens (16 at 135M) with completions
of uneven length, 10 to 190 tokens and 60 on average, at 1M, 6M and 135M parameters; the figure is that of 6M.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

SIZES = {"1M": (128, 352, 4, 2), "6M": (256, 704, 7, 4), "135M": (576, 1536, 30, 9)}
NUM_PROMPTS = {"1M": 64, "6M": 64, "135M": 16}
PROMPT_TOKENS, VOCABULARY = 250, 3000


def step_figures(run: str, recipe_file: str, steps: int, show: Callable[[Any], None]) -> dict[str, float]:
    """`useful_groups_ratio` and `step_efficiency`, each side in a process of its own."""
    sides = {}
    for side in ("dapo", "trl"):
        words = [sys.executable, "-m", "tests.benchmarks.dapo_steps", side, run, recipe_file, str(steps)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the side {side} failed: {done.stderr[-2000:]}")
        sides[side] = json.loads(done.stdout.strip().splitlines()[-1])
    table = Table("", "s a step", "share of useful groups", "useful groups a second")
    for side, found in sides.items():
        table.add_row(side, *(f"{found[name]:.3f}" for name in ("seconds", "share_useful", "useful_a_second")))
    show(table)
    ratio = sides["dapo"]["useful_a_second"] / sides["trl"]["useful_a_second"]
    efficiencies = {"step_efficiency": "efficiency", "step_efficiency_validating": "efficiency_validating"}
    return {"useful_groups_ratio": round(ratio, 3)} | {
        name: round(sides["dapo"][found], 3) for name, found in efficiencies.items()
    }


def arguments(run: str, recipe_file: str, steps: int, out: str) -> tuple:
    """Of the dapo stage, by the recipe, for a few steps and nothing saved."""
    from rerank.launch import recipe

    keys = {**recipe.load(recipe_file), "run_dir": run, "max_steps": steps + 1, "save_strategy": "no"}
    keys |= {"disable_tqdm": True, "output_dir": out}
    return recipe.resolve("dapo", keys, recipe_file)


def run_dapo(run: str, recipe_file: str, steps: int, out: str) -> dict[str, float]:
    """Steps of the dapo stage, then their bare parts."""
    from rerank import dapo
    from rerank.launch import recipe, run_dir, validation
    from rerank.launch.processes import in_shares
    from rerank.models import base as base_model
    from rerank.models import engine
    from rerank.rows import Prompter

    args, config, model_args = arguments(run, recipe_file, steps, out)
    base = run_dir.stage_dir(run, "sft") / "model"
    model, tokenizer = base_model.load_pretrained(str(base), model_args)
    tokenizer.padding_side = "left"
    every = config.eval_steps or math.ceil(recipe.load(recipe_file)["max_steps"] / validation.NUM_CHECKS)
    prompts, held_out = dapo.prepare(args, config, Prompter.of_run(run, tokenizer), base)
    trainer = dapo.make_trainer(args, config, model_args, prompts, model, Path(out))
    complete = dapo.completer(trainer, prompts.max_completion_tokens)
    engine.score_labelled_tokens_only()
    generate, sampled, batches = trainer.vllm_generation.llm.generate, [], []

    def note_prompts(prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        found = generate(prompts, sampling_params, **kwargs)
        sampled[-1].append((prompts, [len(answer.outputs[0].token_ids) for answer in found]))
        return found

    def note_step(inputs: Any) -> Any:
        sampled.append([])
        batches.append(score(inputs))
        return batches[-1]

    score, trainer._generate_and_score_completions = trainer._generate_and_score_completions, note_step
    trainer.vllm_generation.llm.generate = note_prompts
    trainer.train()
    trainer.vllm_generation.llm.generate = generate
    entries = [entry for entry in trainer.state.log_history if "step_time" in entry][1:]
    bare = [
        bare_generation(trainer.vllm_generation.llm, calls) + bare_update(trainer, batch)
        for calls, batch in zip(sampled[1:], batches[1:], strict=True)
    ]
    seconds = [entry["step_time"] for entry in entries]
    wanted = config.generation_batch_size // config.num_generations
    useful = sum(wanted - entry["groups/missing"] for entry in entries)
    began = time.perf_counter()
    validation.measure(held_out, in_shares(complete, held_out))
    validating = (time.perf_counter() - began) / every * len(entries)
    return {
        "seconds": statistics.median(seconds),
        "share_useful": statistics.mean(entry["groups/share_useful"] for entry in entries),
        "useful_a_second": useful / sum(seconds),
        "efficiency": sum(bare) / sum(seconds),
        "efficiency_validating": sum(bare) / (sum(seconds) + validating),
    }


def bare_generation(engine: Any, calls: list[tuple[list, list[int]]]) -> float:
    """Seconds of the engine for as many tokens after the same prompts, one call a round."""
    from vllm import SamplingParams

    seconds = 0.0
    for prompts, lengths in calls:
        params = [
            SamplingParams(max_tokens=length, ignore_eos=True, logprobs=0, seed=number)
            for number, length in enumerate(lengths)
        ]
        engine.reset_prefix_cache()
        begin = time.perf_counter()
        type(engine).generate(engine, prompts, params, use_tqdm=False)
        seconds += time.perf_counter() - begin
    return seconds


def bare_update(trainer: Any, batch: dict[str, Any]) -> float:
    """Seconds of log-probabilities, a loss and its gradient, for each micro-batch of a step."""
    import torch
    from trl.trainer.utils import split_tensor_dict

    seconds = 0.0
    for part in split_tensor_dict(batch, trainer.args.steps_per_generation):
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        mask = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
        begin = time.perf_counter()
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model_wrapped, ids, mask, part["completion_ids"].shape[1], compute_entropy=True
        )
        (logps * part["advantages"][:, None] * part["completion_mask"]).sum().backward()
        seconds += time.perf_counter() - begin
    trainer.model.zero_grad()
    return seconds


def run_trl(run: str, recipe_file: str, steps: int, out: str) -> dict[str, float]:
    """Steps of GRPOTrainer on the same prompts, with TRL's own correction for the engine's log-probabilities."""
    from datasets import Dataset
    from trl import GRPOTrainer

    from rerank import dapo
    from rerank.launch import run_dir
    from rerank.models import base as base_model
    from rerank.models import engine as vllm_cpu
    from rerank.prompts import parse_completion
    from rerank.rows import Prompter, reward_columns

    class Counting(GRPOTrainer):
        useful: list[list[bool]] = []

        def _calculate_rewards(self, inputs, prompts, completions, ids):  # noqa: ANN001, ANN202
            gains = [
                rows[row["row_id"]].rank_gain(parse_completion(text, row["candidate_labels"], row["top_k"]).order)
                for row, text in zip(inputs, completions, strict=True)
            ]
            size = self.num_generations
            self.useful.append([len(set(gains[i : i + size])) > 1 for i in range(0, len(gains), size)])
            return super()._calculate_rewards(inputs, prompts, completions, ids)

    args, config, model_args = arguments(run, recipe_file, steps, out)
    config.vllm_importance_sampling_correction = True
    base = run_dir.stage_dir(run, "sft") / "model"
    model, tokenizer = base_model.load_pretrained(str(base), model_args)
    tokenizer.padding_side = "left"
    prompts, _ = dapo.prepare(args, config, Prompter.of_run(run, tokenizer), base)
    rewards = args.load_rewards()
    config.reward_weights = [reward.weight for reward in rewards]
    asked = [prompt.asked for prompt in prompts.take(0, len(prompts.rows))]
    rows, columns = {each.row.row_id: each.row for each in asked}, reward_columns(asked)
    dataset = Dataset.from_dict({"prompt": columns.pop("prompts"), **columns})
    vllm_cpu.keep_weights_live()
    with vllm_cpu.trl_engine_options(dtype=vllm_cpu.engine_dtype(args.rollout_dtype), **vllm_cpu.engine_options()):
        trainer = Counting(model, rewards, config, dataset, processing_class=tokenizer)
    trainer.train()
    seconds = [entry["step_time"] for entry in trainer.state.log_history if "step_time" in entry][1:]
    useful = [value for step in trainer.useful[1:] for value in step]
    return {
        "seconds": statistics.median(seconds),
        "share_useful": statistics.mean(useful),
        "useful_a_second": sum(useful) / sum(seconds),
    }


def rollout_figures(repeats: int, show: Callable[[Any], None]) -> dict[str, float]:
    """`vllm_speedup`, each size in a process of its own."""
    table, ratios = Table("model", "vLLM, s", "HF generate, s", "ratio"), {}
    for size in SIZES:
        words = [sys.executable, "-m", "tests.benchmarks.dapo_steps", "rollouts", size, str(repeats)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"rollouts at {size} failed: {done.stderr[-2000:]}")
        ours, theirs = json.loads(done.stdout.strip().splitlines()[-1])
        ratios[size] = theirs / ours
        table.add_row(size, f"{ours:.2f}", f"{theirs:.2f}", f"{ratios[size]:.2f}")
    show(table)
    return {"vllm_speedup": round(ratios["6M"], 3)} | {
        f"vllm_speedup_{size}": round(ratios[size], 3) for size in ("1M", "135M")
    }


def time_rollouts(size: str, repeats: int, folder: str) -> tuple[float, float]:
    """Median seconds of vLLM and of HF for the same prompts and lengths, taking turns."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from vllm import LLM, SamplingParams

    from rerank.models import engine as vllm_cpu

    hidden, intermediate, layers, heads = SIZES[size]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    vllm_cpu.keep_weights_live()
    engine = LLM(folder, skip_tokenizer_init=True, max_model_len=512, **vllm_cpu.engine_options())
    rng = np.random.default_rng(0)
    prompts = rng.integers(VOCABULARY, size=(NUM_PROMPTS[size], PROMPT_TOKENS))
    lengths = np.clip(10 + rng.exponential(50, len(prompts)), 10, 190).astype(int).tolist()
    params = [
        SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, logprobs=0, seed=number)
        for number, length in enumerate(lengths)
    ]
    inputs = {"input_ids": torch.tensor(prompts), "attention_mask": torch.ones(prompts.shape, dtype=torch.long)}

    def sample_vllm() -> None:
        engine.reset_prefix_cache()
        engine.generate([{"prompt_token_ids": row} for row in prompts.tolist()], params, use_tqdm=False)

    def sample_hf() -> None:
        with torch.no_grad():
            model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=max(lengths), min_new_tokens=max(lengths))

    times: dict[Callable, list[float]] = {sample_vllm: [], sample_hf: []}
    for _ in range(repeats + 1):
        for sample, seconds in times.items():
            begin = time.perf_counter()
            sample()
            seconds.append(time.perf_counter() - begin)
    ours, theirs = (statistics.median(seconds[1:]) for seconds in times.values())
    return ours, theirs


def main() -> None:
    """One part in a process of its own: its figures are the last line of standard output."""
    from rerank.launch import recipe

    recipe.set_environment()
    part, *words = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        if part == "rollouts":
            print(json.dumps(time_rollouts(words[0], int(words[1]), folder)))
        else:
            run, recipe_file, steps = words
            print(json.dumps({"dapo": run_dapo, "trl": run_trl}[part](run, recipe_file, int(steps), folder)))


if __name__ == "__main__":
    main()
