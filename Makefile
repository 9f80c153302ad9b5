# `make demo` and `make test` work on a fresh Debian or Ubuntu with Python 3.11 to 3.13; nothing else is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/poa
# kept outside of the checkout, since the same versions need no second download
OLDEST := $(CACHE)/oldest-$(shell sha256sum tests/oldest.txt | cut -c-12)
# of pytest: more than two cores, since many a test waits for Slurm, or for what must take its time
WORKERS := 3

.PHONY: demo test check lint test-oldest install clean

demo: $(VENV)/.installed
	$(BIN)/poa demo

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

# for the inner loop: what trains in processes of its own, or wants more than the package, is left to `make test`
check: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not slow and not slurm and not prometheus and not runs and not wide"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# kernels, steps and the first steps of the demo under the oldest versions that setup.py admits; wants Python 3.11, the
# newest for which all of them have wheels
test-oldest: export PYTHONPATH = $(CURDIR)
test-oldest: export OMP_NUM_THREADS = 1
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -p no:cacheprovider \
		tests/kernels/test_interpreter.py tests/engine/test_three_steps.py
	directory=$$(mktemp -d) && $(OLDEST)/bin/python -c "import sys; from pathlib import Path; \
	from pipeline.demo import run_demo; sys.exit(run_demo(Path('$$directory'), ('run.max_steps=4',)))" && rm -r $$directory

$(OLDEST)/.installed:
	rm -rf $(CACHE)/oldest-*
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --requirement tests/oldest.txt
	touch $@

install: $(VENV)/.installed

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: setup.py | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
