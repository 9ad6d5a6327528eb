# Octant. `make` alone lists the targets.

PYTHON ?= python3
# More options for `make train`, as on the command line: make train ARGS="train.steps=20 zero=z0"
ARGS ?=

# Test files at a time. Ranks of one file share the cores with those of another.
JOBS ?= 2

# With eight ranks at a time, these tests need the machine for themselves.
EIGHT := tests/docs tests/ranks/test_parity.py

# Unit tests have run by then; Triton decides for a whole process whether it interprets.
ALONE := tests/unit tests/kernels

# One round of the step benchmarks in their smallest size; the second case has two ranks.
BENCH = --quick --rounds 1 --commit $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)

# Tests and libraries call programs of the environment, such as torchrun, deepspeed and ninja, by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup train check test test-slurm slurm chaos bench-cpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## install the pinned packages and Octant into .venv

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
	  echo "Octant needs Python 3.11 or 3.12, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.ready-*
	@echo "setup: installing the pinned packages into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m engine.runtime.extensions
	@touch $@

train: $(READY) ## train a small GPT on 8 CPU ranks, PP2 x TP2 x DP2 (more options: ARGS="...")
	@echo "train: a GPT of 1 M parameters learns Python's standard library on 8 CPU ranks, PP2 x TP2 x DP2"
	@echo "train: about 3 minutes on two cores; results go to runs/first_light/; Ctrl-C stops all ranks"
	@$(BIN)/python -m engine.train experiment=first_light run.overwrite=true $(ARGS)

check: $(READY) ## lint, types, import rules, unit tests
	@set -e; start=$$(date +%s); \
	echo "check: ruff"; $(BIN)/ruff check --quiet --output-format concise .; $(BIN)/ruff format --check --quiet . || { \
	  echo "Not formatted (mend with '$(BIN)/ruff format'):"; $(BIN)/ruff format --check .; exit 1; }; \
	echo "check: mypy"; $(BIN)/mypy --no-error-summary; \
	echo "check: imports"; $(BIN)/lint-imports --no-logo >$(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }; \
	echo "check: unit tests"; $(BIN)/python -m pytest tests/unit -q -n $(JOBS); \
	echo "check: all passed in $$(($$(date +%s) - start)) s"

test: check slurm ## check, then the tests that start ranks and the documentation's commands
	@$(BIN)/python -m pytest tests/kernels -q -n $(JOBS) --dist loadfile
	@$(BIN)/python -m pytest tests -q -m "not gpu" $(ALONE:%=--ignore=%) $(EIGHT:%=--ignore=%) -n $(JOBS) --dist loadfile
	@$(BIN)/python -m pytest $(EIGHT) -q

test-slurm: $(READY) slurm ## run the batch scripts on a Slurm of this machine (needs root; installs Debian's)
	@$(BIN)/python -m pytest tests/launch/test_slurm.py -q -rs

slurm:
	@{ command -v slurmd && command -v slurmctld; } >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "slurm: installing slurm-wlm" && \
	  timeout 300 sh -c 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y slurm-wlm' \
	    >$(VENV)/slurm.log 2>&1; } || echo "slurm: not here, and it cannot be installed: its tests are skipped"

chaos: $(READY) slurm ## SIGTERM at 20 random moments under each launcher (about an hour)
	@OCTANT_CHAOS=20 $(BIN)/python -m pytest tests/ranks/test_signals.py -q -n $(JOBS) --dist load

bench-cpu: $(READY) ## run the harness of step times end to end on tiny shapes: that all runs, not how fast
	@rm -rf runs/bench_cpu
	@$(BIN)/python -m benchmarks.step.run runs/bench_cpu $(BENCH) --case gpt_1_3b_accum8 --systems octant,plain,hf
	@$(BIN)/python -m benchmarks.step.run runs/bench_cpu $(BENCH) --case tp2_llama_8b --systems octant,hf_deepspeed,megatron
	@$(BIN)/python -m benchmarks.step.report runs/bench_cpu

clean: ## remove runs, caches and build results (ALL=1: .venv too)
	@rm -rf runs multirun build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	@find . \( -name .git -o -name $(VENV) \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@if [ "$(ALL)" = 1 ]; then rm -rf $(VENV); fi
