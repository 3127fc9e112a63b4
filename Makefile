# Every target works from a fresh clone: it creates or reuses .venv and installs its requirements.
#   make quickstart [ARGS=...]   PYTHON=python3.12 make test   make help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Large pages for malloc: a fifth less processor time for training on Linux CPUs, where XLA's
# buffers otherwise cost a page fault for every 4 KiB in each step. Other systems ignore it.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

# The first interpreter that is new enough; PYTHON=... decides otherwise.
PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11,$(shell \
  command -v $(python) >/dev/null 2>&1 && $(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  2>/dev/null && echo $(python))))

# Distributes whole files over as many workers as memory allows (tests/session.py).
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: tpu help quickstart test test-slow parity parity-packages lint clean

help:
	@echo "make quickstart [ARGS=...]  trains GiVE's adapters on a small CLIP and writes a report"
	@echo "                            ARGS=--config=configs/quickstart.py:short takes about a minute"
	@echo "make test [ARGS=...]        all tests except the slow ones; ARGS go to pytest. Tests against PyTorch are"
	@echo "                            skipped by name where its packages are absent"
	@echo "make test-slow [ARGS=...]   slow tests: every block of the README, full notebooks, long runs"
	@echo "make parity [ARGS=...]      comparison with PyTorch (installs torch, transformers, timm, open_clip)"
	@echo "make parity-packages        installs these packages only"
	@echo "make tpu                    compiles for a TPU slice without TPU hardware (installs libtpu separately)"
	@echo "make lint                   style, formatting, import contracts and shell scripts"
	@echo "make clean                  removes caches and build outputs; keeps .venv and runs/"

quickstart: $(VENV)/.stamp-base
	@$(BIN)/python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart $(ARGS)

test: $(VENV)/.stamp-test
	@$(PYTEST) -m "not slow" --durations=25 --limit $(ARGS)

test-slow: $(VENV)/.stamp-test
	@$(PYTEST) -m slow --durations=25 $(ARGS)

# With LLVM's optimisation, as users run it; `make test` disables it (tests/session.py).
parity: export XLA_FLAGS := --xla_backend_optimization_level=3 $(XLA_FLAGS)
parity: $(VENV)/.stamp-parity
	@$(PYTEST) tests/parity --parity $(ARGS)

parity-packages: $(VENV)/.stamp-parity

# Not installed into site-packages: JAX would search for a TPU at every start.
tpu: $(VENV)/.stamp-test | $(VENV)/libtpu
	@$(BIN)/python -m pytest -m tpu_compile $(ARGS)

$(VENV)/libtpu: | $(BIN)/python
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $@ libtpu==0.0.52

lint: $(VENV)/.stamp-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/shellcheck .ci/run launch/cloud/*.sh

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(BIN)/python:
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "Python 3.11 or newer is needed, found $$($(or $(PYTHON),python3) --version 2>&1 || true)." \
	    "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; fi
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# $(call install,EXTRAS): pip with one line per large download, and its full output on failure.
define install
set -o pipefail; echo "Installing perception_jax$(1) into $(VENV) (some minutes the first time)"; \
$(BIN)/python -m pip install --disable-pip-version-check -e '.$(1)' 2>&1 | tee $(VENV)/install.log \
  | awk '/Downloading .* MB\)/ {print "  " $$2, $$3, $$4; fflush()}' \
  || { cat $(VENV)/install.log >&2; exit 1; }
endef

$(VENV)/.stamp-base: pyproject.toml | $(BIN)/python
	@$(call install,)
	@touch $@

$(VENV)/.stamp-test: pyproject.toml | $(BIN)/python
	@$(call install,[test])
	@touch $@ $(VENV)/.stamp-base

$(VENV)/.stamp-parity: pyproject.toml tests/parity/packages.txt | $(BIN)/python
	@$(call install,[test$(comma)parity])
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r tests/parity/packages.txt
	@touch $@ $(VENV)/.stamp-test $(VENV)/.stamp-base

comma := ,
