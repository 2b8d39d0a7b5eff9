"""Teachers that are language models: vLLM's offline engine, and any server that speaks OpenAI's chat completions."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rerank import prompts
from rerank.models import configs, names
from rerank.models.base import load_tokenizer
from rerank.models.checks import check_files, check_tokenizer, has_vocabulary
from rerank.models.configs import context_length, load_config, read_config
from rerank.prompts.facts import UNKNOWN, fact_words
from rerank.rows import PromptedRow, Prompter, RankingRow
from rerank.rows.checks import check_context, prompt_lengths
from rerank.traces.attempts import Draft

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessage

    from rerank.traces import TracesArguments

KEYS = ("seed", "max_completion_tokens")  # of a request, which some gateways refuse
_TOLD = (
    "The item taken next is {label}. Put it first and explain from the history and the candidates why it fits best, "
    "but reason as if you did not know: never say that you were told."
)
_TOLD_SEVERAL = _TOLD.replace("item taken next is", "items taken next are").replace("it first", "them first")
_TOLD_SEVERAL = _TOLD_SEVERAL.replace("it fits", "they fit")


class PromptWriter:
    """Rows to a teacher's user messages.

    A teacher reads the student's prompt with the full task text, also where the student's is short, and with the
    meaning of code words; `told` adds the candidates of the highest grade.
    """

    def __init__(self, prompter: Prompter, told: bool) -> None:
        self.prompter, self.told = replace(prompter, settings=replace(prompter.settings, task="full")), told

    def __call__(self, row: RankingRow) -> str:
        parts = [self.prompter.message(row)]
        if self.prompter.settings.evidence == "codes":
            parts.append(explain_codes(self.prompter))
        if self.told and row.best:
            labels = self.prompter.labels(row)
            told = _TOLD if len(row.best) == 1 else _TOLD_SEVERAL
            parts.append(told.format(label=", ".join(labels[place] for place in row.best)))
        return "\n".join(parts)


def explain_codes(prompter: Prompter) -> str:
    """A sentence on the meaning of the words of `evidence: codes`."""
    names = prompter.settings.evidence_names
    facts, most = [fact_words(name) for name in names], len(prompter.edges[names[0]])
    meanings = ", ".join(f"{word} ({re.sub('{[^}]*}', 'N', phrase)})" for word, phrase in facts)
    unknown = "" if set(names) <= set(prompts.FACTS) else f", {UNKNOWN} where it is not known"
    steps = "ten" if most == 9 else str(most + 1)
    example = f"{facts[-1][0]}:{min(7, most)}"
    return f"Words such as {example} are facts in {steps} steps from 0, the least, to {most}{unknown}: {meanings}."


def check_teacher(args: "TracesArguments") -> None:
    """Refuse an offline teacher that is not there, cannot be prompted, or has no room for a completion.

    A name on the hub is not asked; what Hugging Face's cache holds of it is read.
    """
    model, most = find_model(str(args.teacher_model)), args.max_completion_tokens
    limits = {"teacher_max_length": args.teacher_max_length}
    folder = names.local(model, "teacher_model", files=("config.json",))
    if folder is not None:
        if has_vocabulary(folder) or Path(model).is_dir():
            check_tokenizer(folder)
        if Path(model).is_dir():
            check_files(folder)
        limits[f"the context of {model}"] = context_length(config := read_config(folder))
        configs.check_context(config, model, "teacher_max_length", args.teacher_max_length)
    for name, limit in limits.items():
        if limit is not None and limit <= most:
            raise ValueError(
                f"max_completion_tokens is {most} but {name} is {limit}, which leaves no room for a prompt; lower "
                "max_completion_tokens"
            )


def check_prompts(args: "TracesArguments", write_prompt: PromptWriter, rows: Sequence[RankingRow]) -> None:
    """Refuse prompts that the offline engine could not read, before it starts."""
    model = find_model(str(args.teacher_model))
    tokenizer, context = load_tokenizer(model), args.teacher_max_length or context_length(load_config(model))
    limit = "teacher_max_length" if args.teacher_max_length else f"the context of {model}"
    most = args.max_completion_tokens
    asked = [PromptedRow(row, prompts.render(tokenizer, write_prompt(row), open_tag=True), [], most) for row in rows]
    prompter = replace(write_prompt.prompter, tokenizer=tokenizer)
    check_context(prompter, asked, prompt_lengths(tokenizer, asked), limit, context, most)


def draft_seed(seed: int, row_id: int, attempt: int) -> int:
    """The seed of a draft, of 31 bits: the same whatever other rows are asked beside it."""
    return int(np.random.SeedSequence([seed, row_id, attempt]).generate_state(1)[0]) >> 1


class VllmTeacher:
    """Drafts by an offline engine."""

    def __init__(self, args: "TracesArguments", write_prompt: PromptWriter) -> None:
        from rerank.models import engine

        model = find_model(str(args.teacher_model))
        self.tokenizer = load_tokenizer(model)
        self.engine = engine.open_engine(
            model, args.teacher_max_length, args.seed, args.teacher_dtype,
            tensor_parallel_size=args.tensor_parallel_size,
        )  # fmt: skip
        self.args, self.write_prompt = args, write_prompt

    def __call__(self, rows: Sequence[RankingRow], attempt: int) -> list[Draft]:
        from rerank.models import engine

        texts = [prompts.render(self.tokenizer, self.write_prompt(row), open_tag=True) for row in rows]
        limits = self.args.max_completion_tokens, self.args.temperature
        seeds = [draft_seed(self.args.seed, row.row_id, attempt) for row in rows]
        outputs = engine.generate(self.engine, texts, *limits, seeds=seeds)
        return [Draft(with_opening_tag(completion.text), completion.truncated) for (completion,) in outputs]


def open_client(base_url: str, max_retries: int) -> "OpenAI":
    """OpenAI's client for a server; the key is OPENAI_API_KEY, or "none" for servers that want none."""
    from openai import OpenAI

    return OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=max_retries)


def check_server(base_url: str, model: str) -> None:
    """Refuse a server that cannot be reached or does not list the model."""
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
    """Drafts by a chat completions server, `max_concurrency` requests at a time; the server applies its own chat
    template."""

    def __init__(self, args: "TracesArguments", write_prompt: PromptWriter) -> None:
        self.client = open_client(args.base_url, args.max_retries)
        self.args, self.write_prompt = args, write_prompt

    def __call__(self, rows: Sequence[RankingRow], attempt: int) -> list[Draft]:
        seeds = [draft_seed(self.args.seed, row.row_id, attempt) for row in rows]
        with ThreadPoolExecutor(self.args.max_concurrency) as pool:
            return list(pool.map(self._draft, rows, seeds))

    def _draft(self, row: RankingRow, seed: int) -> Draft:
        from openai import BadRequestError

        options: dict[str, Any] = {
            "seed": seed,
            "temperature": self.args.temperature,
            "max_completion_tokens": self.args.max_completion_tokens,
        }
        if "max_completion_tokens" in self.args.leave_out:  # the older name of it
            options["max_tokens"] = self.args.max_completion_tokens
        try:
            answer = self.client.chat.completions.create(
                model=str(self.args.teacher_model),
                messages=[{"role": "user", "content": self.write_prompt(row)}],
                **{name: value for name, value in options.items() if name not in self.args.leave_out},
            )
        except BadRequestError as error:
            if refused := [name for name in KEYS if _is_unknown(name, error.message)]:
                raise ValueError(
                    f"the server refuses {refused[0]}: {error.message}; set leave_out: "
                    f"[{', '.join([*self.args.leave_out, refused[0]])}]"
                ) from None
            raise ValueError(
                f"the server refuses the prompt of row_id {row.row_id}: {error.message}; "
                "lower max_history or max_completion_tokens, or serve the model with a larger --max-model-len."
            ) from None
        choice = answer.choices[0]
        return Draft(_with_reasoning(choice.message), choice.finish_reason == "length")


def _is_unknown(key: str, message: str) -> bool:
    """Whether a server's message says that it does not take a key, rather than its value."""
    reason = r"unrecogni[sz]ed|unsupported|not supported|unknown|unexpected|not permitted|forbidden|extra"
    return re.search(rf"\b{key}\b", message) is not None and re.search(reason, message, re.IGNORECASE) is not None


def _with_reasoning(message: "ChatCompletionMessage") -> str:
    """The message's text; reasoning that the server has parted from it stands between the tags again."""
    extra, text = message.model_extra or {}, message.content or ""
    reasoning = extra.get("reasoning_content") or extra.get("reasoning")
    return f"{prompts.THINK}{reasoning}{prompts.THINK_END}{text}" if reasoning else with_opening_tag(text)


def with_opening_tag(text: str) -> str:
    """An answer that holds the closing tag of a trace alone, as where the chat template opened it, with both."""
    return prompts.THINK + text if prompts.THINK_END in text and prompts.THINK not in text else text


def find_model(model: str) -> str:
    """The hub name or folder of a vLLM teacher; a folder without config.json is refused."""
    return names.resolve(model, "teacher_model", ("config.json",))
