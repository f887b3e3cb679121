# make setup | demo | test | lint | wheel | bench | docs | clean
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
PYTHON ?= python3
VENV := $(ROOT).venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.fusechat-installed
PIP := PIP_CONSTRAINT=$(ROOT)constraints.txt $(RUN) -m pip --disable-pip-version-check
SOURCES := $(shell find $(ROOT)csrc -name '*.?pp') $(ROOT)CMakeLists.txt $(ROOT)pyproject.toml $(ROOT)constraints.txt

.PHONY: setup demo test lint wheel bench docs readme-table clean

setup: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch
	$(PIP) install --quiet --editable "$(ROOT)[dev]"
	touch $@

demo: setup
	cd $(ROOT) && $(RUN) -m fusechat demo

test: setup
	cd $(ROOT) && FUSECHAT_NATIVE=require $(RUN) -m pytest -q -m "not peer and not vllm and not gpu"

lint: setup
	cd $(ROOT) && $(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

# Builds the wheel and imports it from a virtual environment that knows nothing of this folder.
wheel: setup
	rm -rf $(ROOT)dist && cd $(ROOT) && $(PIP) wheel --quiet --no-deps --wheel-dir dist .
	cd $(ROOT)dist && rm -rf unpacked && $(RUN) -m zipfile -e fusechat-*.whl unpacked
	cd $(ROOT)dist/unpacked && $(RUN) -P -c "import sys; sys.path.insert(0, '.'); sys.meta_path = [f for f in \
	sys.meta_path if 'ScikitBuild' not in type(f).__name__]; import fusechat._native, fusechat.kernels; \
	print('wheel imports from', fusechat.__file__)"

bench: setup
	cd $(ROOT) && $(RUN) -m fusechat bench all

# The site of docs/ in build/site; a broken link is an error.
docs: setup
	$(PIP) install --quiet --editable "$(ROOT)[docs]"
	cd $(ROOT) && NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# README's table and docs/performance.md, from bench/results/*.json.
readme-table: setup
	cd $(ROOT) && $(RUN) -m fusechat.bench.tables

clean:
	rm -rf $(VENV) $(ROOT)build $(ROOT)dist
