# `make demo` and `make test` do all of their own set-up: they need Python 3.11 or newer and a network, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
TORCH ?= .venv-torch
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: demo test lint parity bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[report]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.run ## install, fetch SmolLM2-135M, train and compare three objectives, write a report
	$(BIN)/aif models fetch smollm2-135m
	$(BIN)/aif compare configs/quickstart.yaml --out $(OUT) --resume
	@echo "open $(OUT)/report.html"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint ## formatting, lint, types, tests, and the built wheel
	$(BIN)/python -m pytest -n 2
	$(BIN)/python tests/wheel.py

$(TORCH)/.done: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/requirements.txt
	touch $@

parity: $(VENV)/.dev $(TORCH)/.done ## logits and losses against torch, transformers and TRL, made afresh
	$(BIN)/python benchmarks/parity.py --torch $(TORCH)/bin/python

bench: $(VENV)/.dev $(TORCH)/.done ## step time and decoding beside torch, peft, TRL, Tunix and transformers
	$(BIN)/python benchmarks/step_time.py --torch $(TORCH)/bin/python
	$(BIN)/python benchmarks/decode.py --torch $(TORCH)/bin/python
	$(BIN)/python benchmarks/beside.py --trl $(TORCH)

clean: ## remove the environments, not the runs
	rm -rf $(VENV) $(TORCH)
