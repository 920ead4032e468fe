# make demo    trains a small language model on this machine and adapts it to its power (about 4 minutes)
# make test    style, types, layers and tests
# make lint    style, types and layers only
# make bench   the benchmarks, about 40 minutes on a quiet machine; results go to benchmarks/results/
# make docs    what is made from the code: docs/configuration.md and docs/ledger.md
# make clean   removes what tools left behind; 'make clean-all' also the environment and the runs
#
# The first call of any of them makes the environment .venv. PYTHON=/path/to/python3.12 chooses the Python.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
# What another environment, or a running cluster, would bring in from outside stays outside.
CLEAN_ENV := env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV -u CONDA_PREFIX -u PIP_TARGET -u PIP_PREFIX PIP_USER=0
NO_CLUSTER := env -u RAY_ADDRESS -u PYTHONPATH -u PYTHONHOME
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help environment demo test lint bench docs clean clean-all

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

environment:
	@$(CLEAN_ENV) PYTHON="$(PYTHON)" bash scripts/make_environment.sh

demo: environment
	@echo "[demo] Training a small GPT-NeoX on the Python standard library's sources: up to 4 minutes on 2 cores."
	@$(NO_CLUSTER) $(BIN)/eadt run configs/quickstart.yaml --name demo --fresh

lint: environment
	@echo "[lint] ruff: style, then format"
	@$(NO_CLUSTER) $(BIN)/ruff check .
	@$(NO_CLUSTER) $(BIN)/ruff format --check .
	@echo "[lint] mypy: types (about a minute the first time)"
	@$(NO_CLUSTER) $(BIN)/mypy
	@echo "[lint] import-linter: layers"
	@$(NO_CLUSTER) $(BIN)/lint-imports

test: lint
	@echo "[test] pytest: unit, contract and integration tests; the last ones start local Ray clusters (minutes)"
	@$(NO_CLUSTER) $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: environment
	@for name in metering overhead resize; do \
	  echo "[bench] benchmarks/$$name.py, to benchmarks/results/$$name.json"; \
	  $(NO_CLUSTER) $(BIN)/python "benchmarks/$$name.py" --save $(BENCH_ARGS); \
	done

docs: environment
	@$(NO_CLUSTER) $(BIN)/python scripts/make_docs.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find eadt tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean
	rm -rf .venv runs *.egg-info
