"""Serve a re-ranker: `rerank serve MODEL_DIR` starts vLLM's API server with the rerank API in it.

`POST /v1/rerank` (also `/rerank` and `/v2/rerank`) takes the requests of Cohere, LiteLLM and vLLM clients, and answers
with a ranking always: decoding is constrained. `protocol` has the wire format, `documents` turns a request into a row
of `rerank rank`, `service` ranks it, `routes` and `guard` are the HTTP side, `plugin` is vLLM's.
"""

import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from rerank.launch.recipe import ENVIRONMENT
from rerank.models.engine import PROCESSOR, engine_dtype, engine_options
from rerank.rank.serve.settings import KEY, ServeSettings
from rerank.rank.serve.snapshot import Snapshot

PLUGIN, ENDPOINTS = "rerank", "vllm.endpoint_plugins"
OTHER_PLUGINS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
OF_SERVER = ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND",
             "TOKENIZERS_PARALLELISM")  # fmt: skip
OURS = ("--logits-processors", "--api-server-count", "--headless", "--middleware", "--uds", "--api-key")  # not taken
DEFAULTS = {"--max-model-len": "auto", "--shutdown-timeout": "30", "--uvicorn-log-level": "warning"}
FLAGS = ("--disable-uvicorn-access-log", "--disable-fastapi-docs")
MODULE = "vllm.entrypoints.cli.main"  # of the command `vllm`
SHARING = ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp")
GPU_SHARE = 0.9  # of a GPU's memory that vLLM takes


def check(model_dir: str | Path, settings: ServeSettings, options: Sequence[str] = ()) -> None:
    """Refuse what could not be served, before vLLM starts.

    Args:
        model_dir: Of the model.
        settings: Of the server.
        options: Of vLLM's own.

    Raises:
        FileNotFoundError, ValueError: In one line: vLLM or its entry point is missing, the folder is not a re-ranker's
            or is of another version, or its weights do not fit into the GPUs.
    """
    if find_spec("vllm") is None:
        raise ValueError("vLLM is not installed; pip install 'rerank[cpu]', or 'rerank[gpu]' on a machine with GPUs")
    if not entry_points(group=ENDPOINTS, name=PLUGIN):
        raise ValueError("the installed rerank has no entry point for vLLM; install it again with pip")
    snapshot = Snapshot.load(model_dir, settings.unknown, settings.one_token)
    check_memory(snapshot.folder, options)


def check_memory(folder: Path, options: Sequence[str] = ()) -> None:
    """Refuse weights that the GPUs which share them cannot hold; a machine without GPUs holds what it can."""
    import torch

    if not torch.cuda.is_available():
        return
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    if (config.get("dtype") or config.get("torch_dtype")) == "float32":
        size //= 2  # vLLM loads it as bfloat16
    number, there = num_gpus(options), torch.cuda.device_count()
    if number > there:
        raise ValueError(
            f"the options share the model among {number} GPUs but there are {there}; share it among fewer"
        )
    room = GPU_SHARE * sum(torch.cuda.get_device_properties(device).total_memory for device in range(number))
    if size > room:
        raise ValueError(
            f"the weights of {folder} take {size / 1e9:.1f} GB but {number} of {there} GPUs leave "
            f"{room / 1e9:.1f} GB; serve it on larger ones, or on several with --tensor-parallel-size"
        )


def num_gpus(options: Sequence[str]) -> int:
    """GPUs among which vLLM's options share a model; what is no number is vLLM's to refuse."""
    words, number = [part for word in options for part in word.split("=", 1)], 1
    for name, value in zip(words, words[1:], strict=False):
        if name.replace("_", "-") in SHARING and value.isdecimal():
            number *= int(value)
    return max(1, number)


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} of {host} is in use; choose another by --port") from None
            raise ValueError(f"{host}:{port} cannot be bound ({error}); choose another --host or --port") from None


def launch_line(
    model_dir: str | Path, host: str, port: int, options: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Variables to add to an environment, and the words behind `vllm`.

    Args:
        model_dir: Of the model.
        host, port: To bind.
        options: Of vLLM's own; they go before ours.
        environment: That there is.
    """
    given = {word.partition("=")[0].replace("_", "-") for word in options if word.startswith("--")}
    for name in OURS:
        if name in given:
            raise ValueError(f"{name} cannot be given, as `rerank serve` sets it or needs it as it is; leave it out")
    words = ["serve", str(model_dir), "--host", host, "--port", str(port), "--logits-processors", PROCESSOR]
    defaults = {**DEFAULTS, "--dtype": engine_dtype()}
    flags = list(FLAGS)
    for name, value in engine_options().items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        else:
            defaults[f"--{option}"] = str(value)
    words += [word for name, value in defaults.items() if name not in given for word in (name, value)]
    words += ["--api-server-count", "1"]  # or a reload would reach one of several
    words += [flag for flag in flags if not {flag, flag.replace("--no-", "--"), f"--no-{flag[2:]}"} & given]
    added = {name: ENVIRONMENT[name] for name in OF_SERVER if name not in environment}
    added |= {"VLLM_PLUGINS": plugins(environment.get("VLLM_PLUGINS")), "VLLM_USE_V2_MODEL_RUNNER": "0"}
    added |= {} if "VLLM_LOGGING_LEVEL" in environment else {"VLLM_LOGGING_LEVEL": "WARNING"}
    return added, [*words, *options]


def plugins(allowed: str | None) -> str:
    """vLLM's plugins that are allowed, ours among them.

    Once VLLM_PLUGINS is set, vLLM loads no other plugin of any group: those that it loads without are named too.
    """
    if allowed is None:
        names = [found.name for group in OTHER_PLUGINS for found in entry_points(group=group)]
    else:
        names = [name for name in allowed.split(",") if name]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def shown(added: Mapping[str, str], words: Sequence[str]) -> str:
    """The line in a shell; a key stays in its variable, without which the shell refuses the line."""
    of_shell = f'{KEY}="${{{KEY}:?is the key of the server; set it}}"'
    variables = [of_shell if name == KEY else f"{name}={shlex.quote(text)}" for name, text in added.items()]
    return " ".join([*variables, "vllm", shlex.join(words)])


def start(environment: Mapping[str, str], words: Sequence[str]) -> None:
    """Become the server: this process is replaced, so that signals reach it."""
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", MODULE, *words], environment)
