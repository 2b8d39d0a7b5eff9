"""vLLM's sleep mode: the engine sleeps once a step, after its last round, and gets weights only when they changed."""

from types import SimpleNamespace

import pytest
from scripted_dapo import LIMIT, SIZE, random_tokens
from scripted_trainer import make_trainer
from trl.generation.vllm_generation import VLLMGeneration

from rerank import dapo
from rerank.dapo.trainer import DapoTrainer
from rerank.models import engine

PARTS = {"weights", "kv_cache"}
ROUNDS, STEPS = 3, 3


class Engine:
    """A colocated engine of vLLM in sleep mode, asleep at first; it counts, and refuses what would crash it."""

    def __init__(self) -> None:
        self.awake, self.has_weights = set(), False
        self.sleeps = self.syncs = self.calls = 0
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def sleep(self, level):
        assert level == 2 and self.awake == PARTS
        self.awake, self.has_weights = set(), False
        self.sleeps += 1

    def wake_up(self, tags):
        assert not self.awake & {*tags}
        self.awake |= {*tags}

    def load_weights(self, weights):
        assert "weights" in self.awake
        self.has_weights = True
        self.syncs += 1

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, **options):
        """Groups of equal lengths, which are dropped, but in every third sampled round."""
        assert self.awake == PARTS and self.has_weights
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        self.calls += params[0].temperature > 0
        outputs = []
        for place, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            length = 3 if self.calls % ROUNDS else 3 + place % SIZE
            ids = random_tokens(one.seed or 0, length, eos=1)
            logprobs = [{token: SimpleNamespace(logprob=-1.0, rank=1)} for token in ids]
            output = SimpleNamespace(token_ids=ids, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return outputs


def colocated(llm):
    """TRL's own code of a colocated engine, around this one."""

    def make(model, accelerator, **options):
        generation = object.__new__(VLLMGeneration)
        known = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "logprobs": 0}
        known |= {"max_completion_length": LIMIT, "structured_outputs_regex": None, "tensor_parallel_size": 1}
        known |= {"generation_kwargs": {}, "_iter_named_params": lambda: iter([("weight", None)])}
        vars(generation).update(known, model=model, accelerator=accelerator, mode="colocate", llm=llm)
        generation.enable_sleep_mode = generation._llm_weights_sleeping = options["enable_sleep_mode"]
        return generation

    return make


class Trainer(DapoTrainer):
    """Its losses are computed while the engine sleeps."""

    def compute_loss(self, *args, **kwargs):
        assert not self.vllm_generation.llm.awake
        return super().compute_loss(*args, **kwargs)


def trained(folder, monkeypatch):
    llm = Engine()
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", colocated(llm))
    options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "max_steps": STEPS}
    trainer = make_trainer(folder, kind=Trainer, rounds=ROUNDS, max_logp_gap=100.0, count=30, **options)
    trainer.train()
    assert llm.calls == ROUNDS * STEPS  # a step samples three times
    return trainer, llm


def test_an_engine_sleeps_once_a_step_and_gets_weights_only_when_they_changed(tmp_path, monkeypatch):
    trainer, llm = trained(tmp_path, monkeypatch)
    assert (llm.syncs, llm.sleeps) == (STEPS, STEPS)
    trainer.generate_greedily(["Rank: the title"])  # as validation does, with the weights of the last step
    assert (llm.syncs, llm.sleeps, llm.awake) == (STEPS + 1, STEPS, PARTS)
    trainer.generate_greedily(["Rank: the title"])
    trainer.rest_engine()
    trainer.rest_engine()
    assert (llm.syncs, llm.sleeps, llm.awake) == (STEPS + 1, STEPS + 1, set())


def test_it_sleeps_after_a_check_of_validation_rows(tmp_path, monkeypatch):
    trainer, llm = trained(tmp_path, monkeypatch)
    dapo.completer(trainer, LIMIT)([SimpleNamespace(prompt="Rank: the title", begun="")])
    assert (llm.syncs, llm.sleeps, llm.awake) == (STEPS + 1, STEPS + 1, set())


def test_by_trl_alone_it_would_get_them_in_every_round(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "sleep_when_told", lambda generation: lambda: None)
    _, llm = trained(tmp_path, monkeypatch)
    assert llm.syncs >= ROUNDS * STEPS and llm.sleeps >= ROUNDS * STEPS


def test_a_trl_that_keeps_no_book_of_its_sleep_is_refused():
    with pytest.raises(RuntimeError, match="has no _llm_weights_sleeping; install the TRL version that pyproject"):
        engine.sleep_when_told(SimpleNamespace(llm=None))
