"""Teachers that are language models: vLLM's offline engine, and any server that speaks OpenAI's chat completions."""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rerank import prompts
from rerank.catalogue import Catalogue
from rerank.prompts import PromptSettings
from rerank.traces.attempts import Draft
from rerank.traces.rows import Row, best_position

_TOLD = (
    "The item taken next is {label}. Put it first and explain from the history and the candidates why it fits best, "
    "but reason as if you did not know: never say that you were told."
)


class PromptWriter:
    """Rows to a teacher's user messages.

    A teacher reads the student's prompt with the full task text, also where the student's is short, and with the
    meaning of code words; `told` adds the most relevant candidate.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        settings: PromptSettings,
        edges: Mapping[str, Sequence[float]],
        feature_names: Sequence[str],
        told: bool,
    ) -> None:
        self.catalogue, self.settings = catalogue, replace(settings, task="full")
        self.edges, self.feature_names, self.told = edges, feature_names, told

    def __call__(self, row: Row) -> str:
        settings = self.settings
        parts = [prompts.rerank_prompt(row, self.catalogue, settings, self.edges, self.feature_names)]
        if settings.evidence == "codes":
            parts.append(explain_codes(settings))
        if self.told:
            label = prompts.candidate_labels(row, self.catalogue, settings)[best_position(row)]
            parts.append(_TOLD.format(label=label))
        return "\n".join(parts)


def explain_codes(settings: PromptSettings) -> str:
    """What the words of `evidence: codes` mean."""
    meanings = []
    for name in settings.evidence_names:
        word, phrase = prompts.FACTS[name]
        meanings.append(f"{word} ({re.sub('{[^}]*}', 'N', phrase)})")
    return f"Words such as {word}:7 are facts in ten steps from 0, the least, to 9: {', '.join(meanings)}."


class VllmTeacher:
    """Drafts by an offline engine; with a seed a batch can be repeated."""

    def __init__(
        self,
        model: str,
        write_prompt: PromptWriter,
        temperature: float,
        max_completion_tokens: int,
        max_length: int | None,
        dtype: str,
        seed: int,
    ) -> None:
        from rerank import vllm_cpu

        self.engine = vllm_cpu.open_engine(model, max_length, seed, dtype)
        self.write_prompt, self.temperature, self.max_tokens = write_prompt, temperature, max_completion_tokens

    def __call__(self, rows: Sequence[Row], attempt: int, batch_seed: int) -> list[Draft]:
        from rerank import vllm_cpu

        tokenizer = self.engine.get_tokenizer()
        texts = [prompts.render(tokenizer, self.write_prompt(row)) for row in rows]
        outputs = vllm_cpu.generate(
            self.engine, texts, self.max_tokens, self.temperature, seed=batch_seed, progress=False
        )
        return [Draft(completion.text, completion.truncated) for (completion,) in outputs]


def open_client(base_url: str, max_retries: int) -> Any:
    """OpenAI's client for a server; the key is OPENAI_API_KEY, or "none" for servers that want none."""
    from openai import OpenAI

    return OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=max_retries)


def check_server(base_url: str, model: str) -> None:
    """Refuse a server that cannot be reached or does not list the model.

    Raises:
        ValueError: Naming the address, the model and what to start or write.
    """
    from openai import APIConnectionError, APIStatusError

    try:
        known = [entry.id for entry in open_client(base_url, max_retries=1).models.list()]
    except APIConnectionError:
        raise ValueError(
            f"base_url {base_url} cannot be reached; start its server, such as `vllm serve {model}`, or correct it."
        ) from None
    except APIStatusError as error:
        raise ValueError(
            f"base_url {base_url} answers {error.status_code} when asked for its models; "
            "check the address (it often ends in /v1) and OPENAI_API_KEY."
        ) from None
    if model not in known:
        raise ValueError(
            f"teacher_model {model} is not served at {base_url}; it serves {', '.join(known) or 'nothing'}."
        )


class OpenaiTeacher:
    """Drafts by a chat completions server, several requests at a time; the server applies its own chat template."""

    def __init__(
        self,
        model: str,
        base_url: str,
        write_prompt: PromptWriter,
        temperature: float,
        max_completion_tokens: int,
        max_concurrency: int,
        max_retries: int,
    ) -> None:
        self.client, self.model, self.write_prompt = open_client(base_url, max_retries), model, write_prompt
        self.options = {"temperature": temperature, "max_completion_tokens": max_completion_tokens}
        self.max_concurrency = max_concurrency

    def __call__(self, rows: Sequence[Row], attempt: int, batch_seed: int) -> list[Draft]:
        seeds = range(batch_seed, batch_seed + len(rows))
        with ThreadPoolExecutor(self.max_concurrency) as pool:
            return list(pool.map(self._draft, rows, seeds))

    def _draft(self, row: Row, seed: int) -> Draft:
        from openai import BadRequestError

        messages = [{"role": "user", "content": self.write_prompt(row)}]
        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=messages, seed=seed, **self.options
            )
        except BadRequestError as error:
            raise ValueError(
                f"the server refuses the prompt of row_id {row['row_id']}: {error.message}; "
                "lower max_history or max_completion_tokens, or serve the model with a larger --max-model-len."
            ) from None
        choice = answer.choices[0]
        return Draft(_with_reasoning(choice.message), choice.finish_reason == "length")


def _with_reasoning(message: Any) -> str:
    """The message's text; reasoning that the server has parted from it stands between the tags again."""
    extra, text = message.model_extra or {}, message.content or ""
    reasoning = extra.get("reasoning_content") or extra.get("reasoning")
    return f"{prompts.THINK}{reasoning}{prompts.THINK_END}{text}" if reasoning else text


def check_model_folder(model: str) -> None:
    """Refuse a teacher_model that is written like a folder and is none.

    Raises:
        FileNotFoundError: Naming it.
    """
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).is_dir()
    if is_path and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(
            f"teacher_model {model} is no model folder (it has no config.json); give a folder saved by "
            "save_pretrained, or a model's name on the hub."
        )
