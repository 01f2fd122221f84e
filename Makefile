# `make` alone lists the commands.

SHELL := bash
BIN := .venv/bin
# Processes that run tests side by side.
WORKERS ?= 2
# Tests of a file that start processes stay together (see tests/conftest.py).
PYTEST := $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup
# What touches the libraries whose ranges have ends: Megatron's patches and torch's collectives,
# checkpoints, the exported folder in transformers, the server, plots.
RANGE_TESTS := tests/unit/patches tests/unit/platform tests/unit/checkpoint/test_writer.py \
	tests/unit/inference/test_against_megatron.py tests/unit/training/loss/test_exit_loss.py \
	tests/unit/checkpoint/huggingface tests/unit/data/test_tokenizer.py \
	tests/unit/planner/test_drawing.py tests/functional/test_huggingface_exits.py \
	tests/functional/test_server.py tests/distributed/test_stock_training.py

.DEFAULT_GOAL := help
.PHONY: help setup lock demo docs test test-fast test-oldest test-newest check lint types imports
.PHONY: format clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: ## Install everything into .venv (PYTHON=/path/to/python chooses the interpreter)
	@PYTHON='$(PYTHON)' bash tools/setup/make_venv.sh

lock: ## Raise every dependency to the newest release in its range (requirements.lock)
	@bash tools/setup/make_lock.sh

demo: setup ## Train a small early-exit model on this machine's own text and generate with it
	@$(BIN)/python examples/quickstart/run.py

docs: setup ## Build the documentation's site in build/site; a link that leads nowhere is an error
	@$(BIN)/python -W ignore::UserWarning -m tools.docs_site

test: setup ## Run every check and test (tests/unit/test_project.py runs lint, types and imports)
	@# Without a browser the tests of the server's page say so.
	@bash tools/setup/install_browser.sh >/dev/null || true
	@$(PYTEST) tests

test-fast: setup ## Run the checks and the unit tests (four minutes on two fast cores, nine on slow ones)
	@$(PYTEST) tests/unit

test-oldest test-newest: test-%:
	@bash tools/setup/make_range_venv.sh $*
	@.venv-$*/bin/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup $(RANGE_TESTS)

test-oldest: ## Try the oldest releases that the ranges in pyproject.toml allow
test-newest: ## Try the newest

check: lint types imports ## Run the checks alone

lint: setup ## Check style, formatting and spelling
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --diff .
	@$(BIN)/codespell

types: setup ## Check the package's types, strictly
	@$(BIN)/mypy

imports: setup ## Check that imports in the package run one way
	@$(BIN)/lint-imports --no-logo

format: setup ## Rewrite files in the project's format
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean: ## Delete .venv, caches and build products
	@rm -rf .venv .venv-* build dist *.egg-info
	@rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
