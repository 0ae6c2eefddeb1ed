# Everything here works on a machine that has nothing but Python 3.11 or newer: each target first makes the virtual
# environment in .venv and installs into it, once, and again only when pyproject.toml changes.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint format clean

help:
	@echo "make demo    a three-node cluster trains a policy, the simulator scales it to 256 CPUs (two minutes)"
	@echo "make test    all tests"
	@echo "make lint    ruff and strict type checks over the whole package"
	@echo "make format  let ruff sort imports and mend what it can"
	@echo "make clean   remove the environment, build products and results"

demo: $(VENV)/.installed-rl
	$(BIN)/trio-ray demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist results *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# PYTHON=… chooses the interpreter; else the first of the usual names that runs, is new enough and can make environments.
$(BIN)/python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
		fi; \
	done; \
	echo "No Python 3.11 or newer with its venv module was found; install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

$(VENV)/.installed-rl: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[rl]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[rl,dev]'
	@touch $@ $(VENV)/.installed-rl
