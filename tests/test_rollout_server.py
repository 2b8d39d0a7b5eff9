"""Server mode without the weight transfer, against a small server on loopback."""

import json
import shlex
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import requests
from tiny_model import ID_TOKENS, tiny_tokenizer
from trl.generation.vllm_client import VLLMClient

from rerank.models import server as rollout_server

SEMANTIC_IDS = ["<s_a_0><s_b_0>", "<s_a_1><s_b_1>"]


def tokenizer_with(tokens):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(tokens)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(ID_TOKENS)


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serve():
    """Start a server whose answers are given: status codes of the first requests, then token ids by a tokenizer."""
    servers = []

    def start(served, first_codes=(), port=0):
        codes, seen = list(first_codes), []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):  # noqa: N802  (the name is http.server's)
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.path, question))
                code = codes.pop(0) if codes else 200
                tokens = served(question["prompt"], add_special_tokens=question["add_special_tokens"]).input_ids
                answer = json.dumps({"tokens": tokens}).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def config(url, timeout=12.0):
    """Of a GRPOConfig what the module reads; pauses grow from timeout/60 seconds."""
    return SimpleNamespace(vllm_server_base_url=url, vllm_server_timeout=timeout)


def test_the_launch_line_serves_the_model_for_weight_transfer():
    words = shlex.split(rollout_server.launch_line("runs/my toy/sft/model", "http://localhost:8001", 512))
    assert words[:4] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", "runs/my toy/sft/model"]
    assert words[4:10] == ["--host", "localhost", "--port", "8001", "--max-model-len", "512"]
    assert json.loads(words[words.index("--weight-transfer-config") + 1]) == {"backend": "nccl"}
    assert words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert "--max-model-len" not in rollout_server.launch_line("model", "http://localhost:8000")


def test_the_address_is_the_url_or_host_and_port():
    named = {"vllm_server_base_url": None, "vllm_server_host": "gpu1", "vllm_server_port": 8003}
    assert rollout_server.base_url(named) == "http://gpu1:8003"
    assert rollout_server.base_url(vars(config("http://gpu2:1"))) == "http://gpu2:1"
    assert rollout_server.base_url({}) == "http://localhost:8000"


@pytest.mark.parametrize("first_codes", [[], [503, 502]], ids=["ready", "loading"])
def test_a_server_of_the_same_vocabulary_is_asked_until_it_answers(serve, tokenizer, first_codes):
    url, seen = serve(tokenizer, first_codes)
    rollout_server.check_vocabulary(config(url), tokenizer, SEMANTIC_IDS)
    question = {"prompt": "".join(SEMANTIC_IDS), "add_special_tokens": False}
    assert seen == [("/tokenize", question)] * (len(first_codes) + 1)


def test_a_server_that_refuses_connections_at_first_is_waited_for(serve, tokenizer, free_port):
    served = []
    later = threading.Timer(0.5, lambda: served.append(serve(tokenizer, port=free_port)))
    later.start()
    rollout_server.check_vocabulary(config(f"http://127.0.0.1:{free_port}"), tokenizer, SEMANTIC_IDS)
    later.join()
    [(_, seen)] = served
    assert len(seen) == 1  # the requests before that met no server


def test_a_server_that_never_answers_is_named(tokenizer, free_port):
    url = f"http://127.0.0.1:{free_port}"
    with pytest.raises(ValueError, match=rf"no vLLM server answers at {url} \(ConnectionError\); start it with"):
        rollout_server.check_vocabulary(config(url, timeout=0.3), tokenizer, SEMANTIC_IDS)


def test_a_server_that_takes_requests_and_never_answers_does_not_hang_the_start():
    request = requests.Session.request
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        message = rf"the vLLM server at {url} does not answer within 0.2 seconds; start it again with the line that"
        with pytest.raises(ValueError, match=message), rollout_server.answers_within(0.2, url):
            VLLMClient(base_url=url)
        client = VLLMClient.__new__(VLLMClient)
        client.session, client.base_url = requests.Session(), url
        retries = requests.adapters.Retry(total=5, read=5, backoff_factor=9, allowed_methods=["POST", "GET"])
        client.session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retries))  # as TRL has it
        with pytest.raises(ValueError, match=message), rollout_server.answers_within(0.2, url):
            client.init_communicator(device="cpu")
    assert requests.Session.request is request


def test_a_server_that_does_not_know_the_question_is_not_asked_again(serve, tokenizer):
    url, seen = serve(tokenizer, first_codes=[404] * 9)
    with pytest.raises(ValueError, match=r"no vLLM server answers at .* \(HTTPError\)"):
        rollout_server.check_vocabulary(config(url), tokenizer, SEMANTIC_IDS)
    assert len(seen) == 1


def test_a_server_of_another_vocabulary_is_refused_naming_the_token(serve, tokenizer):
    url, _ = serve(tokenizer_with([ID_TOKENS[0], ID_TOKENS[1], ID_TOKENS[3], ID_TOKENS[2]]))
    own, served = len(tiny_tokenizer()) + 2, len(tiny_tokenizer()) + 3
    message = rf"it reads <s_b_0> as id {served}, the policy as {own}; serve the sft stage's model folder"
    with pytest.raises(ValueError, match=message):
        rollout_server.check_vocabulary(config(url), tokenizer, SEMANTIC_IDS)


@pytest.mark.parametrize(
    ("error", "is_tried_again"),
    [
        (requests.ConnectionError("away"), True),
        (Exception("Request failed: 503, loading"), True),  # by TRL's client
        (Exception("Request failed: 400, n must be 1"), False),
        (RuntimeError("Request failed: 503, loading"), False),
        (KeyError("tokens"), False),
    ],
)
def test_a_call_is_tried_again_a_limited_number_of_times_while_the_server_is_away(error, is_tried_again):
    tries = []

    def call():
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        rollout_server.retry(call, 0.2)()
    assert 1 < len(tries) <= rollout_server.MAX_TRIES if is_tried_again else len(tries) == 1


def test_the_server_has_a_gpu_of_its_own_and_listens_where_it_is_asked():
    line = rollout_server.launch_line("model", "http://localhost:8001", device=8)
    assert line.startswith(
        "CUDA_VISIBLE_DEVICES=8 VLLM_SERVER_DEV_MODE=1 vllm serve model --host localhost --port 8001 "
    )
    assert "--host gpu9 --port 80 " in rollout_server.launch_line("model", "http://gpu9")
    with pytest.raises(
        ValueError, match="the rollout server is gpu9:8000, which is no address; write http://HOST:PORT"
    ):
        rollout_server.launch_line("model", "gpu9:8000")
    assert "CUDA_VISIBLE_DEVICES" not in rollout_server.launch_line("model", "http://gpu9")  # a machine of its own
    assert "--port 443 " in rollout_server.launch_line("model", "https://gpu9/")


@pytest.fixture
def client_of(monkeypatch):
    """TRL's client of a server, without its own pauses and questions."""
    monkeypatch.setattr(VLLMClient, "check_server", lambda self, timeout: None)
    monkeypatch.setattr(VLLMClient, "_get", lambda self, url: {"data": [{"id": "model"}]})

    def make(url):
        client = VLLMClient(base_url=url)
        for adapter in client.session.adapters.values():
            adapter.max_retries = adapter.max_retries.new(backoff_factor=0)
        return client

    return make


@pytest.mark.parametrize("code", [500, 503])
def test_the_session_of_trls_client_is_waited_for_too(serve, tokenizer, client_of, code):
    url, seen = serve(tokenizer, first_codes=[code] * 5)
    client, question = client_of(url), {"prompt": "drama", "add_special_tokens": False}
    client.generate = lambda: client._post(f"{url}/tokenize", json=question)
    rollout_server.add_retries(client, 12.0)
    assert client.generate()["tokens"] and len(seen) == 6


def test_a_server_that_says_nothing_is_given_up(monkeypatch, client_of):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = client_of(url)
        client.generate = lambda: client._post(f"{url}/generate", json={})
        monkeypatch.setattr(rollout_server, "LONGEST_ANSWER", 0.2)
        rollout_server.add_retries(client, 0.5)
        assert client.generate() == rollout_server.NO_ANSWER


def test_each_prompt_is_a_request_with_a_seed_of_its_own():
    asked = []

    def generate(prompts, n, generation_kwargs):
        asked.append((prompts, generation_kwargs["seed"]))
        ids = [[*prompt, member] for prompt in prompts for member in range(n)]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None, "logprob_token_ids": None}

    client = SimpleNamespace(generate=generate)
    rollout_server.ask_one_by_one(client)
    prompts = [[1, 2], [3], [1, 2]]  # of the last one the next epoch's list is the same
    found = client.generate(prompts=prompts, n=2, generation_kwargs={"seed": 7})
    assert found["prompt_ids"] == prompts
    assert found["completion_ids"] == [[1, 2, 0], [1, 2, 1], [3, 0], [3, 1], [1, 2, 0], [1, 2, 1]]
    seeds = rollout_server.prompt_seeds(7, prompts)
    assert sorted(asked) == sorted(([prompt], seed) for prompt, seed in zip(prompts, seeds, strict=True))
    assert len({seed for _, seed in asked}) == 3
