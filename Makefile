# One environment, made once and made again when pyproject.toml or constraints.txt change.
#
#   make demo            the demonstration, on real digits, offline once the environment exists
#   make test            the tests;     make test PYTEST_ARGS="-k detach -x"
#   make test-slow       those that take minutes: thousands of random programs, other Lightnings
#   make test-releases   exactness on the oldest and other releases of Opacus (half an hour and more;
#                        test-releases-of-ci: on those between a part of the tests each)
#   make test-opacus     Opacus's own tests with and without dpguard (all: an hour;
#                        test-opacus-of-ci: all but those that take minutes each)
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
ALIASING = 1.5.1
OLDEST = 1.0.2
OLDER = $(VENV)/opacus-$(OLDEST)/.complete $(VENV)/opacus-$(ALIASING)/.complete
# Releases on which exactness is tested, besides the pinned one.
RELEASES = 1.0.2 1.4.1 1.5.1 1.5.3 1.5.4
# What these depend on is the release; the other tests are the same on each.
RELEASE_TESTS = grad_sample ghost ghost_gradient ghost_models ghost_by_hand late_layers replay \
	one_batch regressions control_flow right_today random_programs other_modes audit attributes \
	protocol facades mechanism amp lean distributed layers conditioning check_accounting check_clip \
	check_noise check_applied check_moved check_oracle check_oracle_ghost check_passes check_people \
	check_rows check_scaling check_untouched check_update faults poisson shape stored time_steps \
	due_sigma wrappers foreign_steps check_loss turns wrapper_writes expanded by_hand check_inputs \
	check_ghost_gradients oracle_autocast ranks reduced stream orderly divided \
	passes_differ pickles dry_runs samplers_dropped losses_in_ghost outside bystanders \
	means_over_people internal_errors loss_function loaders_of_others copied_together \
	left_out idle_optimizers
# Releases of Lightning that stand for an optimizer in other ways than the pinned one.
LIGHTNING = 1.9.5 2.0.9 2.1.4
OPACUS_TESTS ?=
OPACUS_ARGS ?=
# All but those that train for minutes to see how much noise there is.
OPACUS_ARGS_OF_CI = -k "not (ConvNet and test_noise_level) and not overshoot"
# One process and one thread for each core: the tensors of the tests are too small to share. Some
# tests take minutes, so who is done takes over from the other.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
PIP = $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test test-slow test-releases test-releases-of-ci test-opacus test-opacus-of-ci lint \
	wheel-check bench clean

demo: $(STAMP)
	$(BIN)/dpguard demo

test: $(STAMP) $(OLDER)
	$(PYTEST) -m "not slow and not long" $(PYTEST_ARGS)

test-slow: $(STAMP) $(OLDER) $(LIGHTNING:%=$(VENV)/lightning-%/.complete)
	$(PYTEST) -m "slow or long" $(PYTEST_ARGS)

test-releases: $(RELEASES:%=test-release-%)

test-release-%: $(VENV)/opacus-%/.complete
	PYTHONPATH="$(VENV)/opacus-$*" $(PYTEST) -q -W default -m "not slow" $(PYTEST_ARGS) \
		$(RELEASE_TESTS:%=tests/test_%.py) tests/integrations

# All tests on the oldest release. Those between differ little from it or from the pinned one: each
# test runs on one of them.
BETWEEN = $(filter-out $(OLDEST),$(RELEASES))
test-releases-of-ci: test-release-$(OLDEST)
	set -e; part=0; for release in $(BETWEEN); do \
		part=$$((part + 1)); \
		$(MAKE) "test-release-$$release" PYTEST_ARGS="--splits $(words $(BETWEEN)) --group $$part \
			--splitting-algorithm least_duration"; \
	done

test-opacus: $(STAMP) $(VENV)/torchvision/.complete
	OMP_NUM_THREADS=1 PYTHONPATH="tests:$(VENV)/torchvision" $(BIN)/python -m opacus_suite \
		--workers $(WORKERS) $(OPACUS_ARGS) -- $(OPACUS_TESTS)

test-opacus-of-ci:
	$(MAKE) test-opacus OPACUS_ARGS='$(OPACUS_ARGS_OF_CI)'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel-check: $(STAMP)
	PYTHON="$(BIN)/python" .ci/wheel-check

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_import.py
	$(BIN)/python benchmarks/bench_detach.py
	$(BIN)/python benchmarks/bench_attributes.py
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
	$(PIP) -c constraints.txt torch==2.13.0 opacus==1.6.0 -e ".[demo,test,dev]"
	touch "$@"

# Beside the environment's own Opacus, out of reach of it: whoever wants one of these puts it
# first on the search path of an interpreter of its own.
$(VENV)/opacus-%/.complete: $(STAMP)
	rm -rf "$(@D)"
	$(PIP) --no-deps --target "$(@D)" opacus==$*
	touch "$@"

# Lightning before 2.2 asks for pkg_resources, which later releases of setuptools no longer have.
$(VENV)/lightning-%/.complete: $(STAMP)
	rm -rf "$(@D)"
	$(PIP) --no-deps --target "$(@D)" pytorch-lightning==$* lightning-utilities torchmetrics \
		"setuptools<80"
	touch "$@"

# Opacus's tests want torchvision's transforms, whose Python parts any build of it has.
$(VENV)/torchvision/.complete: $(STAMP)
	rm -rf "$(@D)"
	$(PIP) --no-deps --target "$(@D)" torchvision pillow
	touch "$@"
