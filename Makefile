# `make demo` and `make test` do all the set-up there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint types results demo-model clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "flowspec needs Python >= 3.10; set PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/flowspec demo

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: setup
	$(BIN)/pyright

test: lint types
	$(BIN)/python -m pytest

# Simulates everything that docs/RESULTS.md shows of clusters, and writes it there.
results: setup
	$(BIN)/python benchmarks/results.py

# Trains the demo target and its draft head again (hours on two cores) and writes them into src/flowspec/demo.
demo-model: setup
	$(BIN)/python -m flowspec.train.demo

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build src/*.egg-info
