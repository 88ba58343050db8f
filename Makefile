# Each target does its own set-up: a virtual environment in .venv, nothing to activate.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test check unit bench stubs wheel clean

help: ## Say what can be made
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create the virtual environment with all development tools

# PyTorch first, by its pin, so that nothing pulls a build with gigabytes of GPU libraries.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "engram needs Python 3.11 or later; call make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV), once; about two minutes"
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "cannot create a virtual environment; on Debian: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet torch==2.13.0
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## Real text, a real table, a sidecar and a model: every byte checked
	@$(BIN)/engram demo

test: check unit ## Formatting, lint, types, generated files, tests

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy engram benchmarks examples
	$(BIN)/python -m engram.proto.generate --check

unit: $(STAMP)
	$(BIN)/pytest

bench: $(STAMP) ## Print the benchmark table (minutes)
	$(BIN)/python benchmarks/run.py

stubs: $(STAMP) ## Regenerate the gRPC stubs from the schema
	$(BIN)/python -m engram.proto.generate

wheel: $(STAMP) ## Build dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove everything that was made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
