"""The start of `rerank serve`: its line, its errors, and vLLM's plugin around a scripted engine client."""

import asyncio
import json
import logging
import os
import shutil
import socket
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastapi import FastAPI
from served import ScriptedEngine, Server, make_folder

from rerank import cli
from rerank.launch.files import write_json
from rerank.models.engine import GRAMMAR
from rerank.rank import serve
from rerank.rank.serve import plugin
from rerank.rank.serve.protocol import Refusal
from rerank.rank.serve.settings import ServeSettings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture
def environment(monkeypatch):
    """Without variables of vLLM, put back afterwards; no server takes the place of the tests."""
    for name in [*os.environ]:
        if name.startswith(("VLLM_", "RERANK_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(os, "execve", None)
    return os.environ


@pytest.fixture
def entry_points(monkeypatch):
    """The plugins of an environment: two of vLLM's, one of another group, and ours."""
    of_group = {"vllm.general_plugins": ["lora"], "vllm.platform_plugins": ["npu"], serve.ENDPOINTS: ["rerank", "web"]}

    def found(group, name=None):
        return [SimpleNamespace(name=one) for one in of_group.get(group, []) if name in (None, one)]

    monkeypatch.setattr(serve, "entry_points", found)
    return of_group


def line_of(capsys, *words):
    """The words of a dry run, and its variables."""
    assert cli.main(["serve", *map(str, words), "--dry-run"]) == 0
    before, _, words = capsys.readouterr().out.partition(" vllm serve ")
    return words.split(), before


def test_a_dry_run_prints_the_line(folder, environment, entry_points, capsys):
    words, variables = line_of(capsys, folder, "--max-num-seqs", "64", "--served-model-name", "mine", "--port", 81)
    assert words[0] == str(folder) and words[-4:] == ["--max-num-seqs", "64", "--served-model-name", "mine"]
    options = dict(zip(words[1:], words[2:], strict=False))
    assert options["--host"] == "127.0.0.1" and options["--port"] == "81"
    assert options["--logits-processors"] == "rerank.models.ranking_processor:RankingProcessor"
    assert options["--shutdown-timeout"] == "30" and options["--api-server-count"] == "1"
    assert "VLLM_PLUGINS=lora,npu,rerank " in variables and "VLLM_USE_V2_MODEL_RUNNER=0" in variables
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in variables  # of training
    assert ("--enforce-eager" in words) == (not torch.cuda.is_available())


def test_what_is_given_goes_before_what_is_set(folder, environment, entry_points, capsys):
    environment |= {"VLLM_PLUGINS": "lora", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_API_KEY": "secret"}
    given = ["--max_model_len=512", "--no-enforce-eager", "--dtype", "float32", "--shutdown-timeout", "5"]
    words, variables = line_of(capsys, folder, *given, "--max-queue", 7)
    assert "VLLM_PLUGINS=lora,rerank " in variables and "VLLM_CPU_KVCACHE_SPACE" not in variables
    assert '"max_queue": 7' in variables and 'RERANK_API_KEY="${RERANK_API_KEY:?' in variables
    assert "secret" not in variables + " ".join(words)
    for name in ("--max-model-len", "--enforce-eager"):
        assert name not in words
    assert words.count("--dtype") == words.count("--shutdown-timeout") == 1


@pytest.mark.parametrize("source", ["option", "RERANK_API_KEY", "VLLM_API_KEY"])
def test_the_printed_line_starts_no_open_server(folder, tmp_path, environment, entry_points, capsys, source):
    if source != "option":
        environment[source] = "secret"
    words = ["--api-key", "secret"] if source == "option" else []
    assert cli.main(["serve", str(folder), *words, "--dry-run"]) == 0
    line = capsys.readouterr().out
    command = tmp_path / "vllm"
    command.write_text('#!/bin/sh\necho "key $RERANK_API_KEY"')
    command.chmod(0o755)

    def run(**variables):
        variables |= {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        return subprocess.run(["sh", "-c", line], env=variables, capture_output=True, text=True)

    assert "secret" not in line and run(RERANK_API_KEY="other").stdout == "key other\n"
    refused = run()
    assert refused.returncode and not refused.stdout and "is the key of the server; set it" in refused.stderr


def test_the_key_of_vllm_guards_all_routes_or_none_is_served(folder, environment, monkeypatch, entry_points, capsys):
    assert ServeSettings.of_environment({"VLLM_API_KEY": "secret"}).api_key == "secret"
    assert ServeSettings.of_environment({"VLLM_API_KEY": "one", "RERANK_API_KEY": "two"}).api_key == "two"
    assert "--api-key cannot be given" in error_of(capsys, folder, "--api_key", "secret")
    args = SimpleNamespace(model=str(folder), served_model_name=None, api_key=["secret"])
    with pytest.raises(ValueError, match="leaves /rerank open; give the key by the variable RERANK_API_KEY"):
        asyncio.run(plugin.RerankPlugin().init_state(Client(), FastAPI().state, args))


def test_the_server_takes_the_place_of_the_command(folder, environment, entry_points, monkeypatch, capsys):
    environment |= {"VLLM_API_KEY": "secret", "HERE": "1"}
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    assert cli.main(["serve", str(folder), "--port", "0", "--unknown", "drop"]) == 0
    assert not capsys.readouterr().err
    ((path, words, variables),) = started
    assert words[:4] == [path, "-m", "vllm.entrypoints.cli.main", "serve"] and variables["HERE"] == "1"
    assert "VLLM_API_KEY" not in variables and "VLLM_ENABLE_V1_MULTIPROCESSING" not in variables
    assert ServeSettings.of_environment(variables) == ServeSettings("drop", api_key="secret")
    environment.pop("VLLM_API_KEY", None)
    assert cli.main(["serve", str(folder), "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "whoever reaches 0.0.0.0 can use the server; set RERANK_API_KEY" in capsys.readouterr().err


# --- errors


def error_of(capsys, *words):
    assert cli.main(["serve", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_served_is_refused_in_one_line(
    folder, tmp_path, environment, entry_points, capsys, monkeypatch
):
    assert "does not exist; give a model folder" in error_of(capsys, tmp_path / "nowhere")
    assert "generation.json is missing" in error_of(capsys, changed(folder, tmp_path, "generation.json", None))
    assert "evidence.npz is missing" in error_of(capsys, changed(make_folder(tmp_path / "facts", evidence="words",
        evidence_names=["popularity"]), tmp_path, "evidence.npz", None))  # fmt: skip
    newer = {**json.loads((folder / "prompt.json").read_text()), "tone": "kind"}
    assert "is of another version of rerank" in error_of(capsys, changed(folder, tmp_path, "prompt.json", newer))
    error = error_of(capsys, changed(folder, tmp_path, "generation.json", {"trace": True}))
    assert "is of another version of rerank ('max_completion_tokens')" in error
    short = {"max_completion_tokens": 4}
    assert "cannot be served: a ranking of 2 of 2" in error_of(
        capsys, changed(folder, tmp_path, "generation.json", short)
    )
    facts = make_folder(tmp_path / "half", evidence="words", evidence_names=["popularity"])
    (facts / "evidence.npz").write_bytes((facts / "evidence.npz").read_bytes()[:999])
    assert "evidence.npz is not whole (File is not a zip file); copy it again" in error_of(capsys, facts)
    half = changed(folder, tmp_path, "items.json", None)
    (half / "items.json").write_text("{")
    assert "is not whole (Expecting property name" in error_of(capsys, half)
    assert "is a model of next items" in error_of(capsys, changed(folder, tmp_path, "next_item.json", {}))
    assert "--logits-processors cannot be given" in error_of(capsys, folder, "--logits-processors", "x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use; choose another by --port" in error_of(
            capsys, folder, "--port", port
        )
    assert "cannot be bound" in error_of(capsys, folder, "--port", 99999)
    entry_points[serve.ENDPOINTS] = []
    assert "has no entry point for vLLM; install it again" in error_of(capsys, folder)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert "vLLM is not installed; pip install 'rerank[cpu]'" in error_of(capsys, folder)


def changed(folder, tmp_path, name, content):
    """A copy of a folder with another content of a file, or without it."""
    copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, copy)
    (copy / name).unlink(missing_ok=True)
    if content is not None:
        write_json(copy / name, content)
    return copy


def test_a_gpu_that_is_too_small_is_refused(folder, monkeypatch):
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memory = [0.3 * size, 0.35 * size]  # of which 90 % are taken: neither holds half of it (bfloat16), both do
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory[device])
    )
    small = "take 0.0 GB but 1 of 2 GPUs leave 0.0 GB; serve it on larger ones, or on several with --tensor"
    for options in ([], ["--tensor-parallel-size", "1"], ["--max-num-seqs", "2"]):
        with pytest.raises(ValueError, match=small):
            serve.check_memory(folder, options)
    for options in (["--tensor-parallel-size", "2"], ["--tensor_parallel_size=2"], ["-pp", "2"], ["-tp=2"]):
        serve.check_memory(folder, options)
    with pytest.raises(ValueError, match="among 4 GPUs but there are 2; share it among fewer"):
        serve.check_memory(folder, ["-tp", "2", "-pp", "2"])
    memory[0] = 2 * size
    serve.check_memory(folder, [])


# --- the plugin


def test_vllm_finds_the_plugin_by_an_entry_point_of_no_other_group():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups == {serve.ENDPOINTS: {serve.PLUGIN: "rerank.rank.serve.plugin:RerankPlugin"}}
    assert plugin.RerankPlugin.name == serve.PLUGIN and plugin.RerankPlugin.required_tasks == ("generate",)


class Client:
    """vLLM's engine client: one output, or an error."""

    errored = False
    model_config = SimpleNamespace(max_model_len=300)
    vllm_config = SimpleNamespace(shutdown_timeout=5)

    def __init__(self, reason="stop", error=None):
        self.reason, self.error, self.asked, self.stopped = reason, error, [], []

    async def generate(self, prompt, params, request_id):
        self.asked.append((prompt["prompt_token_ids"], params, request_id))
        if self.error:
            raise self.error
        logprobs = [{token: SimpleNamespace(logprob=-token) for token in params.logprob_token_ids or ()}]
        output = SimpleNamespace(text="text", token_ids=[1, 2], finish_reason=self.reason, logprobs=logprobs)
        yield SimpleNamespace(outputs=[output], finished=True)

    def shutdown(self, timeout=None):
        self.stopped.append(timeout)


def test_the_engine_is_asked_greedily_and_by_rules(folder):
    from vllm.exceptions import QueueOverflowError

    server = Server(folder)
    server.ask({"query": "", "documents": ["m1", "m2"]})
    grammar, client = server.engine.asked[0][1], Client()
    written = asyncio.run(plugin.VllmEngine(client).write([5, 6], grammar, 9, "id"))
    ((tokens, params, request_id),) = client.asked
    assert (tokens, request_id, params.max_tokens, params.temperature) == ([5, 6], "id", 9, 0)
    assert params.extra_args == {GRAMMAR: grammar.as_options()} and not params.skip_special_tokens
    assert (written.text, written.num_tokens, written.truncated) == ("text", 2, False)
    assert list(asyncio.run(plugin.VllmEngine(client).compare([5], [3, 4], "id")).logps) == [-3, -4]
    assert client.asked[1][1].max_tokens == 1
    for client, status in ((Client("abort"), 503), (Client(error=QueueOverflowError()), 429)):
        with pytest.raises(Refusal) as refusal:
            asyncio.run(plugin.VllmEngine(client).write([5, 6], grammar, 9, "id"))
        assert refusal.value.status == status and refusal.value.retry_after


def test_the_plugin_serves_the_folder_and_waits_for_requests_before_the_engine_stops(folder, environment, monkeypatch):
    environment |= ServeSettings(max_queue=3, api_key="secret").as_environment()
    made, app, client = plugin.RerankPlugin(), FastAPI(), Client()
    monkeypatch.setattr(plugin, "log_to_stderr", lambda: None)
    monkeypatch.setattr(plugin, "VllmEngine", lambda client: ScriptedEngine(folder))
    made.attach_router(app)

    async def start():
        await made.init_state(
            client, app.state, SimpleNamespace(model=str(folder), served_model_name=None, api_key=None)
        )
        service = app.state.rerank
        assert service.names == [str(folder)] and service.settings.max_queue == 3
        assert service.snapshot.encoder.context == 300
        service.engine.is_open.clear()
        body = json.dumps({"query": "", "documents": ["m1", "m2"]}).encode()
        early = asyncio.ensure_future(service.rerank(body, "id"))
        stopped = asyncio.ensure_future(asyncio.to_thread(client.shutdown, timeout=20))
        await asyncio.sleep(0.1)
        assert not client.stopped and service.is_draining
        service.engine.is_open.set()
        assert len((await early)["results"]) == 2
        await stopped
        client.shutdown(timeout=20)  # as vLLM does, from the event loop
        assert client.stopped == [20, 20]

    asyncio.run(start())


def test_a_reload_that_fails_is_said_in_the_log(folder, tmp_path, caplog, monkeypatch):
    place = make_folder(tmp_path / "model", evidence="words", evidence_names=["popularity"])
    server, path = Server(place), place / "evidence.npz"
    whole = path.read_bytes()

    async def reload():
        plugin.start_reload(server.service)
        while plugin._tasks:
            await asyncio.sleep(0.01)

    for content in (b"", whole[: len(whole) // 2]):
        path.write_bytes(content)
        caplog.clear()
        asyncio.run(reload())
        (record,) = caplog.records
        assert "reload: nothing is changed: " in record.getMessage() and record.exc_info is None
        assert "evidence.npz is not whole" in record.getMessage()
        assert "evidence.npz is not whole" in server.ask({}, path="/v1/reload").json()["message"]
    caplog.clear()
    monkeypatch.setattr(type(server.service.snapshot), "renewed", lambda self: 1 / 0)
    asyncio.run(reload())
    (record,) = caplog.records
    assert record.getMessage() == "reload: unexpected error" and record.exc_info[0] is ZeroDivisionError


def test_a_line_of_the_log_holds_no_control_character():
    record = logging.LogRecord("rerank", logging.INFO, "", 0, "%s: %s", ("id", "\x1b[31mred\n\u202eé"), None)
    assert plugin.OneLine("%(levelname)s %(message)s").format(record) == "INFO id: \\x1b[31mred\\n\\u202eé"
