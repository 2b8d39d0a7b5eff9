"""Rankings that a trained model writes: its folder, greedy completions through vLLM, and their parsed answers."""

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rerank.catalogue import check_vocabulary
from rerank.prompts import parse_completion
from rerank.rows import Prompter, RankingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("config.json", "prompt.json", "catalogue.parquet", "features.json", "generation.json")


@dataclass(frozen=True)
class RankingModel:
    """A model folder of the sft or dapo stage.

    Attributes:
        folder: Where it is.
        prompter: Turns rows into prompts and labels; it has no tokenizer.
        max_completion_tokens: Token limit of an answer.
        num_candidates: Length of the lists that it was trained on, where the folder names it.
    """

    folder: Path
    prompter: Prompter
    max_completion_tokens: int
    num_candidates: int | None

    @classmethod
    def load(cls, folder: str | Path) -> "RankingModel":
        """Read everything but tokenizer and weights."""
        folder = Path(folder)
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; give a model folder of the sft or dapo stage.")
        generation = json.loads((folder / "generation.json").read_text())
        limits = generation["max_completion_tokens"], generation.get("num_candidates")
        return cls(folder, Prompter.of_model(folder), *limits)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Its tokenizer; one that lacks a semantic id of the catalogue beside it is refused."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        check_vocabulary(tokenizer, self.prompter.catalogue.semantic_ids, str(self.folder))
        return tokenizer


@dataclass(frozen=True)
class Answer:
    """One parsed completion: its `order` (positions into the candidates, best first), or the `failure`."""

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


def generate_answers(model: RankingModel, rows: Sequence[RankingRow]) -> tuple[list[Answer], float]:
    """A greedy completion of each row's prompt, and the seconds that it took without the engine's start."""
    from rerank.models import engine as vllm_engine

    tokenizer = model.load_tokenizer()
    prompter = replace(model.prompter, tokenizer=tokenizer)
    prompts = [prompter.prompt(row) for row in rows]
    max_length = max(len(ids) for ids in tokenizer(prompts).input_ids) + model.max_completion_tokens
    _check_positions(model, max_length)
    engine = vllm_engine.open_engine(model.folder, max_length)
    try:
        began = time.perf_counter()
        completions = vllm_engine.generate(engine, prompts, model.max_completion_tokens)
        seconds = time.perf_counter() - began
    finally:
        engine.llm_engine.engine_core.shutdown()  # the next model's engine needs the memory
        del engine
        gc.collect()
    answers = [
        read_answer(completion.text, len(completion.token_ids), completion.truncated, prompter.labels(row))
        for row, (completion,) in zip(rows, completions, strict=True)
    ]
    return answers, seconds


def _check_positions(model: RankingModel, max_length: int) -> None:
    """Refuse prompts that do not fit into the model's positions with their completions."""
    config = json.loads((model.folder / "config.json").read_text())
    positions = config.get("text_config", config).get("max_position_embeddings")
    if positions is not None and max_length > positions:
        answer = model.max_completion_tokens
        raise ValueError(
            f"{model.folder}: a prompt of {max_length - answer} tokens and a completion of {answer} do not "
            f"fit into the model's {positions} positions; lower max_history or max_completion_tokens."
        )
