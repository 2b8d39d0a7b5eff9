"""Rankings from a trained model: its folder, its prompts, greedy completions through vLLM, and what they say."""

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rerank.catalogue import Catalogue, check_vocabulary
from rerank.prompts import PromptSettings, candidate_labels, parse_completion, render, rerank_prompt

FILES = ("config.json", "prompt.json", "catalogue.parquet", "features.json", "generation.json")


@dataclass(frozen=True)
class RankingModel:
    """A model folder of the sft or dapo stage: all that turns a row into a prompt and a completion into a ranking."""

    folder: Path
    settings: PromptSettings
    catalogue: Catalogue
    feature_names: list[str]
    edges: dict[str, list[float]]
    max_completion_tokens: int
    num_candidates: int | None  # of the lists it was trained on, where the folder says so

    @classmethod
    def load(cls, folder: str | Path) -> "RankingModel":
        """Read everything but the weights.

        Raises:
            FileNotFoundError: When the folder, or one of its files, is not there.
        """
        folder = Path(folder)
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; give a model folder of the sft or dapo stage.")
        features = json.loads((folder / "features.json").read_text())
        generation = json.loads((folder / "generation.json").read_text())
        return cls(
            folder=folder,
            settings=PromptSettings.load(folder),
            catalogue=Catalogue.load(folder),
            feature_names=features["names"],
            edges=features["edges"],
            max_completion_tokens=generation["max_completion_tokens"],
            num_candidates=generation.get("num_candidates"),
        )

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ValueError: When it lacks a semantic id of the catalogue beside it.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        check_vocabulary(tokenizer, self.catalogue.semantic_ids, str(self.folder))
        return tokenizer

    def labels(self, row: Mapping[str, Any]) -> list[str]:
        """What a completion must write for each candidate of the row."""
        return candidate_labels(row, self.catalogue, self.settings)

    def prompts(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[str]:
        """The rendered prompt of each row."""
        shared = (self.catalogue, self.settings, self.edges, self.feature_names)
        return [render(tokenizer, rerank_prompt(row, *shared)) for row in rows]


@dataclass(frozen=True)
class Answer:
    """One completion and what it says: `order` (positions into the candidates, best first), or the `failure`."""

    order: list[int] | None
    failure: str | None
    trace: str | None
    text: str
    num_tokens: int
    truncated: bool


def read_answer(text: str, num_tokens: int, truncated: bool, labels: Sequence[str]) -> Answer:
    """Parse one completion."""
    parsed = parse_completion(text, labels)
    return Answer(parsed.order, parsed.failure, parsed.trace, text, num_tokens, truncated)


def generate_answers(
    model: RankingModel, rows: Sequence[Mapping[str, Any]], seed: int = 0
) -> tuple[list[Answer], float]:
    """A greedy completion of each row's prompt, and the seconds it took without the engine's start."""
    from rerank import vllm_cpu

    tokenizer = model.tokenizer()
    prompts = model.prompts(rows, tokenizer)
    engine = vllm_cpu.open_engine(model.folder, _max_length(model, prompts, tokenizer), seed)
    try:
        began = time.perf_counter()
        completions = vllm_cpu.generate(engine, prompts, model.max_completion_tokens, progress=False)
        seconds = time.perf_counter() - began
    finally:
        engine.llm_engine.engine_core.shutdown()  # the next model's engine needs the memory
        del engine
        gc.collect()
    answers = [
        read_answer(completion.text, len(completion.token_ids), completion.truncated, model.labels(row))
        for row, (completion,) in zip(rows, completions, strict=True)
    ]
    return answers, seconds


def _max_length(model: RankingModel, prompts: Sequence[str], tokenizer: Any) -> int:
    """Tokens of the longest prompt with its completion.

    Raises:
        ValueError: When the model has fewer positions.
    """
    longest = max(len(ids) for ids in tokenizer(list(prompts)).input_ids)
    config = json.loads((model.folder / "config.json").read_text())
    positions = config.get("text_config", config).get("max_position_embeddings")
    if positions is not None and longest + model.max_completion_tokens > positions:
        raise ValueError(
            f"{model.folder}: a prompt of {longest} tokens and a completion of {model.max_completion_tokens} do not "
            f"fit into the model's {positions} positions; lower max_history or max_completion_tokens."
        )
    return longest + model.max_completion_tokens
