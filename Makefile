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

# Builds the wheel and merges two models with it, in a clean environment of every Python at hand.
wheel: setup
	$(RUN) $(ROOT)tests/clean_install.py

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
