"""A trained model's rankings: its folder, greedy completions through vLLM or one token each, and parsed answers."""

import gc
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

from rerank.catalogue import Catalogue, check_vocabulary
from rerank.models.configs import context_length, read_config
from rerank.models.ranking_grammar import RankingGrammar
from rerank.prompts import THINK_END, completion, completion_text, parse_completion, prompt_ids
from rerank.rows import PromptedRow, Prompter, RankingRow
from rerank.rows.checks import check_context, prompt_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from rerank.baselines import Counts

MOST_ROWS_AT_ONCE = 256
CACHE_BYTES = 8 * 2**30
EVIDENCE_FILE = "evidence.npz"
FILES = ("config.json", "prompt.json", "catalogue.parquet", "features.json", "generation.json")


@dataclass(frozen=True)
class RankingModel:
    """A model folder of the sft or dapo stage.

    Attributes:
        folder: Where it is.
        prompter: Turns rows into prompts and labels; it has no tokenizer.
        max_completion_tokens: Token limit of an answer.
        one_token: Whether it was trained on a ranking's first label alone, so that it can rank by that, but not write.
        has_trace: Whether it was trained to write traces.

    Its prompter bypasses the reasoning where it was trained so.
    """

    folder: Path
    prompter: Prompter
    max_completion_tokens: int
    one_token: bool = False
    has_trace: bool = True

    @classmethod
    def load(cls, folder: str | Path) -> "RankingModel":
        """Read everything but tokenizer and weights."""
        folder = Path(folder)
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; give a model folder of the sft or dapo stage.")
        generation = json.loads((folder / "generation.json").read_text())
        limit, one_token = generation["max_completion_tokens"], generation.get("one_token", False)
        prompter = replace(Prompter.of_model(folder), bypass_reasoning=generation.get("bypass_reasoning", False))
        return cls(folder, prompter, limit, one_token, generation.get("trace", True) and not one_token)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Its tokenizer; one that lacks a semantic id of the catalogue beside it is refused, if prompts show ids."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if self.prompter.settings.shows_ids:
            check_vocabulary(tokenizer, self.prompter.catalogue.semantic_ids, str(self.folder))
        return tokenizer

    def load_counts(self) -> "Counts | None":
        """The counts that its facts rest on; None where its prompts show no facts."""
        from rerank.baselines import Counts

        if not self.prompter.needs_features:
            return None
        path = self.folder / EVIDENCE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, but the model's prompts show evidence; copy the whole folder."
            )
        try:
            return Counts.load(path)
        except (BadZipFile, EOFError) as error:
            raise ValueError(f"{path} is not whole ({error}); copy it again") from None


@dataclass(frozen=True)
class Batch:
    """Rows to answer together.

    Attributes:
        rows: Of any lengths.
        catalogue: The items whose texts their prompts show; None for the model's own.
        constrained: Whether every answer is made a ranking.
        one_token: Whether the probabilities of the first label rank, in one forward pass; so they do for a model that
            was trained for that.
        bypass_reasoning: Whether prompts end in the tags of an empty trace; so they do for a model that was trained
            for that.
    """

    rows: Sequence[RankingRow]
    catalogue: Catalogue | None = None
    constrained: bool = False
    one_token: bool = False
    bypass_reasoning: bool = False


@dataclass(frozen=True)
class Answer:
    """One parsed completion: its `order` (positions into the candidates, best first), or the `failure`."""

    order: list[int] | None
    failure: str | None
    trace: str | None
    text: str
    num_tokens: int
    truncated: bool


def read_answer(text: str, num_tokens: int, truncated: bool, labels: Sequence[str], top_k: int = 0) -> Answer:
    """Parse one completion, whose row has these labels and asks for the best `top_k` (0: all)."""
    parsed = parse_completion(text, labels, top_k)
    return Answer(parsed.order, parsed.failure, parsed.trace, text, num_tokens, truncated)


def generate_answers(
    model: RankingModel, rows: Sequence[RankingRow], constrained: bool = False, one_token: bool = False
) -> tuple[list[Answer], float]:
    """A greedy completion of each row's prompt, and the seconds that it took without the engine's start.

    Args:
        model: A folder's.
        rows: Of any lengths.
        constrained: Whether every answer is made a ranking: after the trace only labels that are not written yet.
        one_token: Whether the probabilities of the first label rank, and nothing is generated.
    """
    return generate_batches(model, [Batch(rows, constrained=constrained, one_token=one_token)])[0]


def generate_batches(
    model: RankingModel, batches: Sequence[Batch], tensor_parallel_size: int = 1
) -> list[tuple[list[Answer], float]]:
    """`generate_answers` of each batch, one after the other by one engine; none is started for one-token batches."""
    tokenizer = model.load_tokenizer()
    asked = [ask(model, batch, tokenizer) for batch in batches]
    max_length = _check_positions(model, [row for rows in asked for row in rows], tokenizer)
    by_token = [batch.one_token or model.one_token for batch in batches]
    free = [(batch, rows) for batch, rows, is_by in zip(batches, asked, by_token, strict=True) if not is_by]
    written = iter(_generate(model, free, tokenizer, max_length, tensor_parallel_size) if free else [])
    ranked = iter(_rank_by_one_token(model, list(itertools.compress(asked, by_token)), tokenizer))
    return [next(ranked if is_by else written) for is_by in by_token]


def _rank_by_one_token(
    model: RankingModel, asked: Sequence[Sequence[PromptedRow]], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[Answer], float]]:
    """Answers of each batch by the probabilities of the first label, and the seconds that they took."""
    from rerank.models import one_token

    if not asked:
        return []
    rank, found = one_token.load_folder(model.folder, tokenizer), []
    for rows in asked:
        began = time.perf_counter()
        orders = rank(rows)
        seconds = time.perf_counter() - began
        texts = [completion(None, order, row.labels) for order, row in zip(orders, rows, strict=True)]
        answers = [Answer(order, None, "", text, 1, False) for order, text in zip(orders, texts, strict=True)]
        found.append((answers, seconds))
    del rank  # the next model's engine needs the memory
    one_token.free_memory()
    return found


def _generate(
    model: RankingModel,
    batches: Sequence[tuple[Batch, list[PromptedRow]]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    tensor_parallel_size: int,
) -> list[tuple[list[Answer], float]]:
    """Answers that an engine writes, and the seconds that they took, of each batch and its rows as they are asked."""
    from rerank.models import engine as vllm_engine

    grammars = [grammars_of(model, rows, tokenizer) if batch.constrained else None for batch, rows in batches]
    is_constrained = any(batch.constrained for batch, _ in batches)
    engine = vllm_engine.open_engine(
        model.folder, max_length, constrained=is_constrained, tensor_parallel_size=tensor_parallel_size
    )
    found = []
    try:
        for (_, rows), rules in zip(batches, grammars, strict=True):
            began = time.perf_counter()
            texts, limit = [row.prompt for row in rows], model.max_completion_tokens
            completions = vllm_engine.generate(engine, texts, limit, grammars=rules) if texts else []
            seconds = time.perf_counter() - began
            answers = [
                read_answer(
                    row.begun + (completion.text if rules is None else last_tag_alone(completion.text)),
                    len(completion.token_ids), completion.truncated, row.labels, row.top_k,
                )
                for row, (completion,) in zip(rows, completions, strict=True)
            ]  # fmt: skip
            found.append((answers, seconds))
    finally:
        engine.llm_engine.engine_core.shutdown()  # the next model's engine needs the memory
        del engine
        gc.collect()
    return found


def ask(model: RankingModel, batch: Batch, tokenizer: "PreTrainedTokenizerBase") -> list[PromptedRow]:
    """The rows of a batch with the prompts that the model answers."""
    bypasses = batch.bypass_reasoning or model.prompter.bypass_reasoning
    catalogue = batch.catalogue or model.prompter.catalogue
    prompter = replace(model.prompter, tokenizer=tokenizer, catalogue=catalogue, bypass_reasoning=bypasses)
    return [prompter.ask(row, model.max_completion_tokens) for row in batch.rows]


def grammars_of(
    model: RankingModel, rows: Sequence[PromptedRow], tokenizer: "PreTrainedTokenizerBase"
) -> list[RankingGrammar]:
    """The rules of each row's answer; rows of the same labels share them.

    Raises:
        ValueError: For a row whose answer cannot be made a ranking.
    """
    path, ends = model.folder / "generation_config.json", set[int]()
    if path.is_file():  # vLLM ends a completion at each of its tokens, whatever it is asked for
        named = json.loads(path.read_text()).get("eos_token_id")
        ends = set(named if isinstance(named, list) else [] if named is None else [named])
    made: dict[tuple[tuple[str, ...], int, str], RankingGrammar] = {}
    for row in rows:
        key = tuple(row.labels), row.top_k, row.begun
        if key not in made:
            rules = tokenizer, *key[:2], model.max_completion_tokens, ends, bool(row.begun)
            try:
                made[key] = RankingGrammar.of_labels(*rules)
            except ValueError as error:
                raise ValueError(f"row {row.row.row_id}: {error}") from None
    return [made[tuple(row.labels), row.top_k, row.begun] for row in rows]


def last_tag_alone(text: str) -> str:
    """A constrained completion without closing tags that its trace spells in other tokens; the last one is whole."""
    trace, tag, answer = text.rpartition(THINK_END)
    return trace.replace(THINK_END, "") + tag + answer


def _check_positions(model: RankingModel, asked: Sequence[PromptedRow], tokenizer: "PreTrainedTokenizerBase") -> int:
    """Tokens of the longest prompt and its completion; refuses prompts that do not fit into the model's context."""
    lengths, limit = prompt_lengths(tokenizer, asked), model.max_completion_tokens
    name, context = f"the context of {model.folder}", context_length(read_config(model.folder))
    check_context(replace(model.prompter, tokenizer=tokenizer), asked, lengths, name, context, limit)
    return max(lengths) + limit


def rows_at_once(model: "PreTrainedModel", length: int) -> int:
    """Rows of `length` tokens that are completed at once: their keys and values take at most `CACHE_BYTES`."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * length
    return min(MOST_ROWS_AT_ONCE, max(1, CACHE_BYTES // row))


def complete_greedily(trainer: "Trainer", prompts: Sequence[str], max_tokens: int) -> list[str]:
    """The most probable completion of each prompt by a model in training, through transformers.

    Nothing is inherited from the model's generation_config. Prompts of like length share a batch.
    """
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase
    from trl.models.utils import unwrap_model_for_generation

    tokenizer = trainer.processing_class
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    ids = prompt_ids(tokenizer, prompts)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, **ends)
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    texts = [""] * len(ids)
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model, torch.no_grad():
        longest = torch.tensor([max(map(len, ids), default=0)], device=trainer.accelerator.device)
        longest = trainer.accelerator.gather(longest).max()  # processes that share weights take equally many batches
        batch_size = rows_at_once(model, int(longest) + max_tokens)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            padded = tokenizer.pad(
                {"input_ids": [ids[place] for place in places]}, padding_side="left", return_tensors="pt"
            ).to(trainer.accelerator.device)
            made = model.generate(**padded, generation_config=config)[:, padded.input_ids.shape[1] :]
            for place, tokens in zip(places, made.tolist(), strict=True):
                texts[place] = completion_text(tokenizer, tokens)
    return texts
