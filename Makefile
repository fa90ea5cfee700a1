.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint cudf fmt cov bench sharding chaos clean
MAKEFLAGS += --no-print-directory

PYTHON_VENV := .venv/bin/python
ARGS ?=

# Any Python from 3.6 on can run the set-up, which then looks for a 3.11 or 3.12 itself; the first that
# really runs is taken. -S: the set-up needs no installed packages, and starts faster without.
define RUN_SETUP
for python in $(PYTHON_VENV) "$$PYTHON" python3 python python3.11 python3.12; do \
    if "$$python" -S -c 'import sys; sys.exit(sys.version_info < (3, 6))' 2>/dev/null; then \
        exec "$$python" -S scripts/setup.py; \
    fi; \
done; \
echo "set-up: no Python that runs, wanted Python 3.11 or 3.12: install one, or: make setup PYTHON=/path/to/it" >&2; \
exit 2
endef

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup:  ## make .venv with everything in it (skipped when current)
	@$(RUN_SETUP)

demo: setup  ## raw rows to a running model server, on the adult data, in a few minutes
	@scripts/demo.sh

test: setup  ## run the tests; make test ARGS="-k word -x"
	@$(PYTHON_VENV) -m pytest -m "not long" $(ARGS)

test-long: setup  ## run the tests that compile native code for every model
	@$(PYTHON_VENV) -m pytest -m long $(ARGS)

lint: setup  ## check style, types, import directions and budgets
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m ruff format --check .
	@$(PYTHON_VENV) -m mypy
	@.venv/bin/lint-imports --no-logo
	@$(PYTHON_VENV) -m pytest -q tests/test_architecture.py

cudf:  ## check that cudf-polars knows the ETL's queries: an environment of its own, 2 GB, no GPU needed
	@[ -x .venv-cudf/bin/pytest ] || { $${PYTHON:-python3.11} -m venv .venv-cudf && \
	    .venv-cudf/bin/pip install -q --disable-pip-version-check --no-deps --require-hashes \
	    -r requirements/cudf-polars.lock; }
	@.venv-cudf/bin/python -m pytest $(ARGS) tests/etl/test_device.py

fmt: setup  ## format, and mend what can be mended
	@$(PYTHON_VENV) -m ruff check --fix .
	@$(PYTHON_VENV) -m ruff format .

cov: setup  ## run the tests and show the lines they do not reach
	@$(PYTHON_VENV) -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

bench: setup  ## run every benchmark in its quick form
	@found=; for script in benchmarks/*.py; do \
	    [ -f "$$script" ] || continue; \
	    found=yes; echo "== $$script"; \
	    $(PYTHON_VENV) "$$script" --quick || exit 1; \
	done; \
	[ -n "$$found" ] || echo "benchmarks/: no scripts yet, nothing to run"

sharding: setup  ## losses of every sharding on 1, 2 and 4 ranks against one process, and what two ranks cost
	@$(PYTHON_VENV) benchmarks/sharding.py $(ARGS)

chaos: setup  ## kill training 100 times at random: the same end each time, and nothing hangs (about 15 minutes)
	@$(PYTHON_VENV) benchmarks/chaos.py $(ARGS)

clean:  ## remove .venv, out/ and caches
	rm -rf .venv .venv-cudf .setup.lock out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage recsys/parallel/_kernels*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
