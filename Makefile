# One environment, made once and made again when pyproject.toml or constraints.txt change.
#
#   make demo            the demonstration, on real digits, offline once the environment exists
#   make test            the tests;     make test PYTEST_ARGS="-k detach -x"
#   make lint            ruff and mypy
#   make wheel-check     build, install into an empty environment, look inside, uninstall
#   make bench           costs at import, of an idle detach, of a guarded step
#   make clean           remove all that was made here

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN = $(VENV)/bin
STAMP = $(VENV)/.complete
# The last Opacus whose DP optimizer copies attributes instead of forwarding them; for the tests.
OLD_OPACUS = $(VENV)/opacus-1.5.1
OLD_OPACUS_STAMP = $(OLD_OPACUS)/.complete

.PHONY: demo test lint wheel-check bench clean

demo: $(STAMP)
	$(BIN)/dpguard demo

test: $(STAMP) $(OLD_OPACUS_STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel-check: $(STAMP)
	PYTHON="$(BIN)/python" .ci/wheel-check

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_import.py
	$(BIN)/python benchmarks/bench_detach.py
	$(BIN)/python benchmarks/bench_step.py

clean:
	rm -rf .venv .ci/venv .ci/work build dist .coverage htmlcov
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One pip command for everything: torch and opacus must be pinned in the same resolution as what
# depends on them, or pip may fetch another torch of several gigabytes first. The stamp comes last,
# so an interrupted installation is made again from scratch.
$(STAMP): pyproject.toml constraints.txt
	rm -rf "$(VENV)"
	$(PYTHON) -m venv "$(VENV)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
		torch==2.13.0 opacus==1.6.0 -e ".[demo,test,dev]"
	touch "$@"

# Beside the environment's own Opacus, out of reach of it: a test puts it first on the search path
# of an interpreter of its own.
$(OLD_OPACUS_STAMP): $(STAMP)
	rm -rf "$(OLD_OPACUS)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps \
		--target "$(OLD_OPACUS)" opacus==1.5.1
	touch "$@"
