# `make help` lists the targets. Each target makes .venv first where it needs it and fails when what it runs fails.
PYTHON ?= python3
GPU_PYTHON ?= 3.12
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# mkdocs-material advertises its successor on every build otherwise.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow gpu gpu-wheels check docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv and install everything, if it is missing or out of date

quickstart: $(INSTALLED) ## the main job on CPU: data, three training stages, evaluation, report
	$(BIN)/neo quickstart

test: $(INSTALLED) ## run the tests, a process for each core (at most 4)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: $(INSTALLED) ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

# Without .venv, as on a bare machine, by $(PYTHON): see docs/results/gpu.md.
gpu: ## tests, speed and training on this machine's GPU: make gpu GPU_OPTIONS="--wheels FOLDER --parts 1"
	PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.sh --output outputs/gpu $(GPU_OPTIONS)

gpu-wheels: $(INSTALLED) ## fetch what a GPU machine without network lacks: make gpu-wheels GPU_PYTHON=3.12
	$(BIN)/python benchmarks/gpu_wheels.py outputs/wheels --python $(GPU_PYTHON)

check: $(INSTALLED) ## formatting, lint, types, import layers, documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py
	$(BIN)/mkdocs build --strict

docs: $(INSTALLED) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## remove what was built and cached; .venv and outputs/ stay
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Rebuilt only when the two files that say what to install have changed.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name one: make PYTHON=python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,docs,quickstart]'
	@touch $@
