"""Rollouts from a vLLM server: its launch line, the check of its vocabulary, and retries while it is away."""

import contextlib
import itertools
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import numpy as np
import requests
import tenacity
from requests.adapters import HTTPAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOConfig
    from trl.generation.vllm_client import VLLMClient

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_TRIES = 6
MOST_REQUESTS = 64  # at a time; the server batches them
LONGEST_ANSWER = 1800.0  # seconds without a byte; TRL's client would wait for ever
NO_ANSWER: dict[str, list[object]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}


def launch_line(model_dir: str | Path, url: str, max_length: int | None = None, device: str | None = None) -> str:
    """The shell line that serves a policy the way TRL's server mode needs it (weights arrive over NCCL).

    The server listens on the host of its address alone: its development endpoints are for nobody else.

    Args:
        model_dir: Of the sft stage.
        url: Address of the server, as the recipe names it.
        max_length: Tokens of prompt and completion.
        device: The GPU that training leaves free, where both share a machine.
    """
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"the rollout server is {url}, which is no address; write http://HOST:PORT")
    port = address.port or (443 if address.scheme == "https" else 80)
    words = ["vllm", "serve", str(model_dir), "--host", str(address.hostname), "--port", str(port)]
    if max_length is not None:
        words += ["--max-model-len", str(max_length)]
    words += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    words += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--enable-scale-out"]
    own_gpu = "" if device is None else f"CUDA_VISIBLE_DEVICES={device} "
    return f"{own_gpu}VLLM_SERVER_DEV_MODE=1 {shlex.join(words)}"


def base_url(keys: Mapping[str, Any]) -> str:
    """Address of the server that the keys of a recipe, or all of a GRPOConfig, name; by default this machine's."""
    host, port = keys.get("vllm_server_host", "localhost"), keys.get("vllm_server_port", 8000)
    return keys.get("vllm_server_base_url") or f"http://{host}:{port}"


def is_local(url: str) -> bool:
    """Whether an address is of the machine itself."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "0.0.0.0", "::1")  # noqa: S104


def check_vocabulary(config: "GRPOConfig", tokenizer: "PreTrainedTokenizerBase", semantic_ids: Sequence[str]) -> None:
    """Refuse a server whose tokenizer reads the catalogue's semantic ids otherwise than the policy's, or none."""
    url, text = base_url(vars(config)), "".join(dict.fromkeys(semantic_ids))
    try:
        served = retry(_tokenize, config.vllm_server_timeout)(url, text)
    except requests.RequestException as error:
        raise ValueError(f"no vLLM server answers at {url} ({type(error).__name__}); start it with the line that "
                         "`rerank run --dry-run` prints") from None  # fmt: skip
    own = tokenizer(text, add_special_tokens=False).input_ids
    if served != own:
        pairs = itertools.zip_longest(served, own, fillvalue=None)
        theirs, ours = next(pair for pair in pairs if pair[0] != pair[1])
        token = "the end" if ours is None else tokenizer.convert_ids_to_tokens(ours)
        raise ValueError(
            f"the vLLM server at {url} serves another vocabulary: it reads {token} as id {theirs}, the policy as "
            f"{ours}; serve the sft stage's model folder"
        )


def _tokenize(url: str, text: str) -> list[int]:
    """Token ids of a text by the server's tokenizer."""
    answer = requests.post(f"{url}/tokenize", json={"prompt": text, "add_special_tokens": False}, timeout=60)
    answer.raise_for_status()
    return answer.json()["tokens"]


def retry(call: Callable[P, T], seconds: float) -> Callable[P, T]:
    """The call, tried again with growing pauses while the server is away, MAX_TRIES times and `seconds` at most."""
    return tenacity.retry(
        retry=tenacity.retry_if_exception(_is_away),
        wait=tenacity.wait_exponential(multiplier=min(1.0, seconds / 60), max=30),
        stop=tenacity.stop_after_attempt(MAX_TRIES) | tenacity.stop_after_delay(seconds),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )(call)


@contextlib.contextmanager
def answers_within(seconds: float, url: str) -> Iterator[None]:
    """Within it no request waits longer for a byte: TRL meets a server with requests that would wait for ever.

    Raises:
        ValueError: When the server does not answer.
    """
    request = requests.Session.request

    def limited(session: requests.Session, *args: Any, **kwargs: Any) -> requests.Response:
        _ask_once(session)
        return request(session, *args, **{"timeout": seconds, **kwargs})

    requests.Session.request = limited  # type: ignore[assignment, method-assign]
    try:
        yield
    except (requests.ConnectionError, requests.Timeout, ConnectionError):
        raise ValueError(
            f"the vLLM server at {url} does not answer within {seconds:g} seconds; start it again with the line that "
            "`rerank run --dry-run` prints, or raise vllm_server_timeout"
        ) from None
    finally:
        requests.Session.request = request  # type: ignore[method-assign]


def _ask_once(session: requests.Session) -> None:
    """Let a session not ask again where an answer did not come in time: it would wait six times."""
    for adapter in session.adapters.values():
        if isinstance(adapter, HTTPAdapter):
            adapter.max_retries = adapter.max_retries.new(read=0)


def add_retries(client: "VLLMClient", seconds: float) -> None:
    """Let TRL's client ask again while the server is away, and in the end answer nothing.

    Other processes wait for the answer; an exception here would leave them waiting. Once a call has failed for good,
    no later one is tried: a server that comes back serves other weights. A server that takes LONGEST_ANSWER seconds
    counts as away.
    """
    session = client.session
    session.request = partial(session.request, timeout=LONGEST_ANSWER)
    _ask_once(session)
    generate, update, reset = retry(client.generate, seconds), client.update_named_params, client.reset_prefix_cache
    is_gone = False

    def attempt(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        nonlocal is_gone
        try:
            return None if is_gone else call(*args, **kwargs)
        except Exception as error:
            if not _is_away(error):
                raise
            logger.error("the vLLM server does not answer: %s: %s", type(error).__name__, error)
            is_gone = True
            return None

    def update_if_there(metadata: object, weights: Iterable[object]) -> None:
        attempt(update, metadata, weights)
        for _ in weights:  # which are gathered from all processes, each taking part
            pass

    client.generate = lambda *args, **kwargs: attempt(generate, *args, **kwargs) or NO_ANSWER
    client.update_named_params = update_if_there
    client.reset_prefix_cache = lambda: attempt(reset)


def ask_one_by_one(client: "VLLMClient") -> None:
    """Let TRL's client send each prompt as a request of its own, many at a time, with a seed of its own.

    In one request the completions of all prompts are drawn with the same few seeds, one a member of a group, so that
    they share their noise.
    """
    generate = client.generate

    def ask(prompts: Sequence[Sequence[int]], **options: Any) -> dict[str, Any]:
        given = options.pop("generation_kwargs", None) or {}

        seeds = prompt_seeds(given["seed"], prompts) if "seed" in given else [None] * len(prompts)

        def send(prompt: Sequence[int], seed: int | None) -> dict[str, Any]:
            seeded = given if seed is None else {**given, "seed": seed}
            return generate(prompts=[prompt], generation_kwargs=seeded, **options)

        with ThreadPoolExecutor(MOST_REQUESTS) as pool:
            answers = list(pool.map(send, prompts, seeds))
        return {
            name: None if answers[0][name] is None else [value for answer in answers for value in answer[name]]
            for name in answers[0]
        }

    client.generate = ask


def prompt_seeds(seed: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The seed of each prompt's first completion, also of equal prompts; that of each further one is larger by one."""
    before: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in map(tuple, prompts):
        seeds.append(int(np.random.SeedSequence([seed, before[prompt], *prompt]).generate_state(1)[0]) >> 1)
        before[prompt] += 1
    return seeds


def _is_away(error: BaseException) -> bool:
    """Whether an error means that the server is not there yet: no answer, or a 502 to 504.

    TRL's session asks again by itself after a 500, 502 or 503, and in the end raises RetryError.
    """
    if type(error) is Exception:  # what TRL's client raises for every answer but 200
        return re.match(r"Request failed: 50[234]\b", str(error)) is not None
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code in (502, 503, 504)
    return isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.RetryError)
