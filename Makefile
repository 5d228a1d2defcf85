# `make` alone says what there is. Every target sets up what it needs, once: the second time is fast.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadgroup
QUICK ?=
BASE ?= main

BIN := $(VENV)/bin
READY := $(VENV)/.lamella-ready
DEVELOP := $(VENV)/.lamella-develop
QUICKLY := $(if $(QUICK),--quick)

# Waiting threads of OpenMP sleep instead of spinning, as in the command line: the machine may have other work.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 3000

# mkdocs-material prints a notice about the future of MkDocs on every build; the versions here are settled.
export NO_MKDOCS_2_WARNING := 1

# The programs of benchmarks/peers.py, quantize.py and outside.py take minutes to install, so they have a target of their own;
# gpu.py needs a GPU.
INSTALLING := benchmarks/peers.py benchmarks/quantize.py benchmarks/outside.py
BENCHMARKS := $(filter-out $(INSTALLING) benchmarks/gpu.py,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-ci test-all lint format lists architectures docs reproduce bench peers clean

help: ## This list
	@echo "Lamella: decide, layer by layer, what a trained model computes."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Start with 'make demo': a minute to install, a few to run, and a report to look at."
	@echo "Variables: PYTHON (the interpreter, now $(PYTHON)), VENV (now $(VENV)), PYTEST_ARGS (such as"
	@echo "\"-n 4 -k plan\"), BASE (a branch, now $(BASE)), QUICK=1."

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

# A new pyproject.toml installs again. Interrupted, the stamp is missing and the next run goes on.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[quantize]'
	@touch $@

$(DEVELOP): $(READY)
	$(INSTALL) '.[dev]'
	@touch $@

venv: $(DEVELOP) ## Install Lamella with all of its extras and the development tools into VENV

# SmolLM2 has 163 MB with 8-bit weights; 142 MB needs a cut as well.
demo: $(READY) ## Compress the embedded model to 142 MB, heal it for a minute; the result and its report are in demo/
	$(BIN)/lamella compress smollm2 --size 142 --heal-minutes 1 -o demo --overwrite
	@echo
	@echo "The smaller model is in demo/. It was healed for a minute; --heal-minutes 8, the default, brings more back."
	@echo "Open its report: file://$(CURDIR)/demo/report.html"

# Two processes of one thread each are twice as fast as one of two: most models in the tests are small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test: $(DEVELOP) ## Run the tests that your changes since BASE can reach; without changes, all but the slow ones
	$(PYTEST) -m "not slow and not exhaustive" --changed=$(BASE)

test-slow: $(DEVELOP) ## Run the tests that start processes or run whole commands
	$(PYTEST) -m "slow and not exhaustive"

test-ci: $(DEVELOP) ## Run what CI runs: all tests but the exhaustive ones, whatever has changed
	HYPOTHESIS_PROFILE=ci $(PYTEST) -m "not exhaustive"

test-all: $(DEVELOP) ## Run the exhaustive tests too: all families, thousands of fuzzed inputs, killed processes
	HYPOTHESIS_PROFILE=all $(PYTEST)

lint: $(DEVELOP) ## Style, formatting, import layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(DEVELOP) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lists: $(DEVELOP) ## Write the table of methods into README.md and the lines of changes/ into CHANGELOG.md
	$(BIN)/python scripts/readme.py
	$(BIN)/python scripts/changelog.py

architectures: $(DEVELOP) ## Build every causal type of transformers small, check it, and write the table of the documentation
	OMP_NUM_THREADS=1 $(BIN)/python scripts/architectures.py

docs: $(DEVELOP) ## Build the documentation into site/, every warning an error
	$(BIN)/mkdocs build --strict

reproduce: $(DEVELOP) ## Re-run every paper's experiment (QUICK=1 for the short ones); fails if a claim does
	@failed=; for script in reproductions/*.py; do \
		echo "== $$script"; $(BIN)/python $$script $(QUICKLY) || failed="$$failed $$script"; \
	done; \
	if [ -n "$$failed" ]; then echo "Did not hold:$$failed"; exit 1; fi

bench: $(DEVELOP) ## Measure planners, runtime and methods, some hours; results go to benchmarks/results/
	@failed=; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || failed="$$failed $$script"; done; \
	test -z "$$failed" || { echo "not all claims hold:$$failed"; exit 1; }

peers: $(DEVELOP) ## Measure against other tools, which are installed into a place of their own
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/quantize.py
	$(BIN)/python benchmarks/outside.py

clean: ## Remove VENV and everything that the other targets wrote, except downloaded models
	rm -rf $(VENV) demo site .ci-output .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache
	find src tests reproductions benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
