# Two commands set everything up: `make demo` and `make test`. `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help demo test check clean
SHELL := /bin/bash

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# The CPU build where the package index has one under this name; override for another, e.g. TORCH="torch==2.13.0+cu126".
TORCH ?= torch==2.13.0
LLAMA := llama-cpp-python==0.3.36
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# GCC 12 miscompiles AMX code: the library would crash on any prompt. Build without AMX there, and never
# take a wheel from pip's cache that may have been built with it.
AMX := $(shell grep -q -m1 amx_tile /proc/cpuinfo 2>/dev/null && c++ --version 2>/dev/null | grep -qi -e gcc -e 'free software' && echo yes)
ifeq ($(AMX),yes)
NOAMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
BUILD := CFLAGS="$(CFLAGS) $(NOAMX)" CXXFLAGS="$(CXXFLAGS) $(NOAMX)"
FRESH := --no-cache-dir --no-binary llama-cpp-python
endif

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1	\2/'

demo: $(VENV)/.base ## install Loramix and its base, and answer one real prompt with the route shown
	$(BIN)/loramix run --show-route "Is this review positive or negative? The film starts slowly, but the last half hour is the best thing I have seen this year."

test: $(VENV)/.dev $(VENV)/.base ## install what tests need, and run them
	$(BIN)/python -m pytest

check: $(VENV)/.dev ## lint, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.venv:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not here; install Python 3.11, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is too old; Python 3.11 or newer is needed" >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt pip
	@touch $@

$(VENV)/.llama: $(VENV)/.venv constraints.txt
	@command -v c++ >/dev/null || { echo "error: no C++ compiler; install one (Debian: apt install g++), then make again" >&2; exit 1; }
	@echo "installing $(LLAMA), compiled for this machine$(if $(NOAMX), without AMX); this takes some minutes"
	@$(BUILD) $(PIP) install -c constraints.txt $(FRESH) $(LLAMA)
	@touch $@

$(VENV)/.runtime: $(VENV)/.llama pyproject.toml constraints.txt
	@echo "installing Loramix"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.base: $(VENV)/.runtime
	@echo "getting the default base"
	@$(BIN)/loramix pull smollm2-135m
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime pyproject.toml constraints.txt
	@echo "installing what training and tests need"
	@$(PIP) install -c constraints.txt "$(TORCH)"
	@$(PIP) install -c constraints.txt -e ".[train,dev]"
	@touch $@
