# Everything a fresh machine needs is set up here: Python >= 3.11, git and make are enough.
.DEFAULT_GOAL := help
.PHONY: help setup demo dev test check evals bench format lock clean

PYTHON ?= python3
SHELL  := /bin/sh
BIN    := .venv/bin

# uv from PATH, else one of the project's own
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## set up the environment (the other targets do it by themselves)

demo: .venv/.ready ## the patterns on a real server, a worker killed in the middle (PATTERN=routing: one; KEEP=1 leaves it running)
	@$(BIN)/python -m services.demo $(if $(KEEP),--keep) $(PATTERN)

dev: .venv/.ready ## serve the patterns with reload on a persistent server
	@$(BIN)/durable dev services:app

test: .venv/.ready ## run all tests: unit, live (real restate-server), types, lint
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

check: .venv/.ready ## lint, format and types only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

evals: .venv/.ready ## measure how good the agents are, pattern by pattern (ARGS='routing --repeat 3')
	@$(BIN)/python -m evals $(ARGS)

bench: .venv/.ready ## measure what durability costs, beside the plain agent and others (ARGS=--instructions: with valgrind)
	@$(BIN)/python -m tests.bench $(ARGS)

format: .venv/.ready ## format the code and apply safe fixes
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

lock: .venv/.ready ## pin the newest versions that the ranges in pyproject.toml allow
	@$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --group dev --extra server pyproject.toml -o requirements/dev.txt
	@$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-deps --group local -o requirements/local.txt

clean: ## remove the environment, the tools and the data that the targets made
	@rm -rf .venv .tools .durable .pytest_cache .ruff_cache .hypothesis dist

.tools/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python >= 3.11 is needed; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "uv is not on PATH: installing it into .tools/"
	@$(PYTHON) -m venv .tools 2>/dev/null && .tools/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1' \
	  || { rm -rf .tools; echo "could not install uv: see https://docs.astral.sh/uv/, or install Python's venv module" >&2; exit 1; }

.venv/.ready: pyproject.toml requirements/dev.txt requirements/local.txt | $(filter .tools/bin/uv,$(UV))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python >= 3.11 is needed; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setting up .venv"
	@test -x $(BIN)/python || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
	@$(UV) pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements/dev.txt
	@$(UV) pip install --python $(BIN)/python --quiet --no-deps --editable .
	@$(UV) pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements/local.txt \
	  || echo "the local model cannot be installed here: set OPENAI_API_KEY or ANTHROPIC_API_KEY instead"
	@touch $@
