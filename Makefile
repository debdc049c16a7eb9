# Needs make and Python >= 3.11, nothing else: everything is installed into .venv.
#   make demo                      an urgent request overtakes a long prefill
#   make test                      lint, types, layers, tests
#   make demo PYTHON=python3.12 ARGS="--policy fcfs"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Test processes, each with one torch thread; 0 runs the tests in one process with all of torch's threads.
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
TESTS := tests/pure tests/cpu
ifeq ($(WORKERS),0)
PYTEST := $(BIN)/python -m pytest
else
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
endif

.PHONY: help demo install dev hooks lint fmt test coverage line-coverage bench gpu clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 22

demo: $(VENV)/.installed ## run the demonstration; options in ARGS
	$(BIN)/fpcompile demo $(ARGS)

install: $(VENV)/.installed ## .venv with the package

dev: $(VENV)/.installed-dev ## .venv with the package and all tools

hooks: dev ## check every commit with ruff, mypy and the layers
	$(BIN)/pre-commit install

lint: dev ## ruff, mypy, import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fmt: dev ## format, and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: lint ## lint, then the tests that need no accelerator
	$(PYTEST) $(TESTS) $(PYTEST_ARGS)

coverage: install ## every architecture compiled and compared with itself: docs/coverage.md
	OMP_NUM_THREADS=1 $(BIN)/fpcompile coverage $(ARGS)

line-coverage: dev ## tests with a line and branch report
	$(BIN)/coverage run -m pytest $(TESTS) $(PYTEST_ARGS)
	$(BIN)/coverage report

bench: dev ## all benchmarks, one after the other; options in ARGS
	PYTHON=$(abspath $(BIN))/python bash benchmarks/all.sh $(ARGS)

gpu: dev ## equality, overhead and blocking on a CUDA device
	PYTHON=$(abspath $(BIN))/python bash benchmarks/gpu.sh $(ARGS)

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fpcompile needs Python 3.11 or newer, got %s: try `make PYTHON=python3.11`" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev,serve,bench]'
	@touch $(VENV)/.installed $@
