"""The GPU check: on a CPU, with none of the packages that it must not need, and that it can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rerank.models import group_kernels
from tests.benchmarks import gpu_core

WITHOUT = ("vllm", "ibis", "duckdb", "deepspeed", "lightgbm", "faiss", "sentence_transformers", "textual", "openai")
# As on a machine that does not have them: a library that asks whether they are there is told so.
BLOCKED = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_others(name, *where):
    return None if name.partition(".")[0] in {WITHOUT} else find(name, *where)
PathFinder.find_spec = staticmethod(find_others)
sys.argv = ["gpu_core", "--rounds", "1"]
from tests.benchmarks import gpu_core
try:
    gpu_core.main()
finally:
    print(*sorted({{name.partition(".")[0] for name in sys.modules}} & {{*{WITHOUT}}}), file=sys.stderr)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU: make gpu-core")
def test_it_runs_without_engine_and_data_on_a_cpu_and_says_so():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == ""  # none of the modules was there
    said, *_, last = done.stdout.splitlines()
    assert said.startswith("no CUDA here: a tiny model on the CPU")
    found = json.loads(last)
    assert (found["cuda"], found["passes"], found["left_out"]) == (False, True, [])
    assert [case["format"] for case in found["cases"]] == ["float32", "float32, bf16 autocast", "bfloat16"]
    for case in found["cases"]:
        assert 0 < case["logp_error"] < 0.01 and 0 < case["gradient_error"] < 0.1
        assert (case["logp_error_trl"] == 0) == (case["format"] == "float32")


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_kernel_with_other_numbers_fails_in_values_or_gradients(monkeypatch, broken):
    right = getattr(group_kernels.CPU, broken)

    def wrong(*tensors):
        first, *others = right(*tensors)
        return 1.01 * first, *others

    kernel = group_kernels.Kernel(
        "broken", **{"forward": group_kernels.CPU.forward, "backward": group_kernels.CPU.backward, broken: wrong}
    )
    monkeypatch.setattr(group_kernels, "kernel_of", lambda *given: kernel)
    case = gpu_core.measure("tiny", gpu_core.FORMATS[0], gpu_core.Sizes(24, 6, 2), "cpu", rounds=1)
    assert not case["passes"] and case["kernel"] == "broken"
    assert (case["logp_error"] < gpu_core.FLOAT32_LOGP) == (broken == "backward")


def test_what_does_not_fit_into_the_time_is_left_out_and_named():
    said = []
    found = gpu_core.run("cpu", 1, 0.0, said.append)
    assert found["left_out"] and not found["passes"]  # nothing was checked
    assert said[-1].startswith("left out after 0.0 minutes: tiny, float32")


def test_make_starts_it_and_the_toy_on_one_gpu():
    done = subprocess.run(["make", "-n", "gpu-test", "PYTHON=python"], capture_output=True, text=True, check=True)
    words = done.stdout.replace("\\\n", " ").split()
    assert "tests.benchmarks.gpu_core" in words and "recipes/accelerate/one_gpu.yaml" in words
    assert all(Path(word).exists() for word in words if word.startswith(("tests/", "recipes/")))
