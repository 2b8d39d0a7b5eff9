"""`rerank serve` with vLLM's real server and engine: the README's lines, real clients, the key, reload and SIGTERM."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from served import BODY, make_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTION = re.search(r"^## Serving\n(.*?)^## ", README, re.M | re.S)[1]
BASH, PYTHON = (re.search(rf"```{language}\n(.*?)```", SECTION, re.S)[1] for language in ("bash", "python"))
KEY = re.search(r"RERANK_API_KEY=(\w+)", BASH)[1]
FOLDER, PORT, START = "runs/mine/dapo/model", "8000", 500  # of the README, and seconds to start on a busy machine
HEADERS = {"Authorization": f"Bearer {KEY}"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Live:
    """A server that the README's line has started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.log = folder, free_port(), folder.with_name("log")
        self.url = f"http://127.0.0.1:{self.port}"
        (line,) = [line for line in BASH.splitlines() if line.startswith("rerank serve")]
        words = shlex.split(line, comments=True)[1:]
        words = [sys.executable, "-m", "rerank.cli", *(str(folder) if word == FOLDER else word for word in words)]
        environment = {**os.environ, "RERANK_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "INFO"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*words, "--port", str(self.port)], stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-3000:])

    def post(self, path="/v1/rerank", body=BODY, **headers) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers={**HEADERS, **headers}, timeout=120)

    def here(self, text: str) -> str:
        """Lines of the README with this server's port."""
        return text.replace(f"localhost:{PORT}", f"localhost:{self.port}")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    server = Live(make_folder(tmp_path_factory.mktemp("live") / "model", max_tokens=128))
    try:
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def test_the_lines_of_the_readme_are_answered(live, capsys):
    commands = "\n".join(line for line in live.here(BASH).splitlines() if not line.startswith("rerank serve"))
    done = subprocess.run(["bash", "-e", "-c", commands], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ranked, reloaded = map(json.loads, re.sub(r"\}\{", "}\n{", done.stdout).splitlines())
    assert sorted(result["index"] for result in ranked["results"]) == [0, 1, 2] and "History" in ranked["trace"]
    assert reloaded["items"] == reloaded["items_before"] == 12
    assert len(SECTION.strip().splitlines()) + 1 <= 25  # with its heading
    pytest.importorskip("cohere", reason="the extra serve-test is not installed")
    exec(live.here(PYTHON), {})
    assert re.fullmatch(r"\[\(\d, 1.0\), \(\d, 0.5\)\]\n", capsys.readouterr().out)


def test_clients_of_cohere_and_litellm_parse_answers_and_errors(live, monkeypatch):
    cohere = pytest.importorskip("cohere", reason="the extra serve-test is not installed")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its import asks GitHub otherwise
    litellm = pytest.importorskip("litellm", reason="the extra serve-test is not installed")
    order = [result["index"] for result in live.post().json()["results"]]
    for client in (cohere.Client(api_key=KEY, base_url=live.url), cohere.ClientV2(api_key=KEY, base_url=live.url)):
        found = client.rerank(model="mine", **BODY)
        assert [result.index for result in found.results] == order and found.meta.tokens.output_tokens > 4
        with pytest.raises(cohere.errors.UnprocessableEntityError, match="give each once"):
            client.rerank(model="mine", query="", documents=["m2", "m2"])
    found = cohere.Client(api_key=KEY, base_url=live.url).rerank(model="mine", **BODY, return_documents=True, top_n=1)
    assert found.results[0].document.text == BODY["documents"][order[0]]
    options = {"model": "hosted_vllm/mine", "api_base": live.url, "api_key": KEY}
    found = litellm.rerank(**BODY, **options)
    assert [result["index"] for result in found.results] == order
    assert found.meta["tokens"]["input_tokens"] > 20
    with pytest.raises(litellm.BadRequestError, match="there is nothing to rank"):
        litellm.rerank(query="", documents=["m2"], **options)


def test_the_key_guards_every_route_of_vllm_too(live):
    routes = re.findall(r"Route: (\S+), Methods: (\w+)", live.log.read_text())
    assert {"/v1/rerank", "/rerank", "/v1/reload", "/metrics", "/invocations", "/v1/completions"} <= dict(
        routes
    ).keys()
    with httpx.Client(base_url=live.url) as client:
        answers = {path: client.request(method, path).status_code for path, method in routes}
    assert answers.pop("/health") == 200 and set(answers.values()) == {401}
    metrics = httpx.get(f"{live.url}/metrics", headers=HEADERS).text
    assert 'http_requests_total{handler="/v1/rerank"' in metrics
    (model,) = httpx.get(f"{live.url}/v1/models", headers=HEADERS).json()["data"]
    assert model["id"] == "mine" and model["max_model_len"] == 1024
    assert model["labels"] == "number" and model["items"] == 12 and model["max_documents"] > 20


def test_a_client_that_leaves_is_noticed(live):
    body = json.dumps(BODY).encode()
    head = f"POST /rerank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nX-Request-Id: left-early\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_for(lambda: "left-early POST /rerank 499" in live.log.read_text())
    wait_for(lambda: running(live) == 0)


def test_sighup_takes_up_new_items(live, tmp_path):
    from rerank.rank.model_folder import add_items

    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "n1", "name": "Brand new"}))
    body = {"query": "m0", "documents": ["m2", {"id": "n1"}, "m3"]}
    assert live.post(body=body).json()["meta"]["warnings"]
    add_items(live.folder, tmp_path / "items.jsonl", None, None)
    os.kill(live.process.pid, signal.SIGHUP)
    wait_for(lambda: "13 items" in live.log.read_text())
    assert "warnings" not in live.post(body=body).json()["meta"]


def test_sigterm_answers_what_was_accepted(live):
    answers, start = [], threading.Barrier(9)

    def ask():
        with httpx.Client(base_url=live.url, headers=HEADERS, timeout=120) as client:
            client.get("/health")  # connects
            start.wait()
            answer = client.post("/v1/rerank", json=BODY)
            answers.append((answer.status_code, len(answer.json().get("results", []))))

    threads = [threading.Thread(target=ask) for _ in range(start.parties - 1)]
    for thread in threads:
        thread.start()
    start.wait()
    wait_for(lambda: running(live) > 0 or answers)
    os.kill(live.process.pid, signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert len(answers) == len(threads) and set(answers) <= {(200, 4), (503, 0)} and (200, 4) in answers
    assert live.process.wait(60) == 0
    log = live.log.read_text()
    assert "unexpected error" not in log and "are dropped" not in log


def running(live):
    """Requests in the engine."""
    metrics = httpx.get(f"{live.url}/metrics", headers=HEADERS).text
    return float(re.search(r"^vllm:num_requests_running\{.*\} (.*)$", metrics, re.M)[1])


def wait_for(condition, seconds=60):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
