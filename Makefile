# `make demo` and `make test` do all the set-up there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEWEST := .venv-newest
# The time of the files that pyright has last found right; a folder is newer once a file in it is gone.
TYPES := $(VENV)/.types
CHECKED := src tests benchmarks pyproject.toml $(STAMP)
CHANGED = find $(CHECKED) '(' -name '*.py' -o -type d ! -name __pycache__ -o -name pyproject.toml -o -path $(STAMP) ')' -newer $(TYPES)
# Processes that run tests at once: one more than cores of a small machine, since tests often wait.
JOBS ?= 3
# Torch for processors alone; its package at PyPI brings gigabytes for graphics cards.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: setup tools demo test fuzz test-newest lint types results demo-model clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "flowspec needs Python >= 3.11; set PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	@touch $@

demo: setup
	@$(BIN)/flowspec demo

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: setup
	@touch $(TYPES).new
	$(BIN)/pyright
	@mv $(TYPES).new $(TYPES)

# The dashboard's tests want a browser, those of real networks iproute2; without them they are skipped.
tools:
	@missing=; \
	command -v chromium chromium-browser google-chrome >/dev/null || missing="chromium"; \
	command -v ip >/dev/null && command -v tc >/dev/null || missing="$$missing iproute2"; \
	test -z "$$missing" || \
	  { command -v apt-get >/dev/null && echo "installing for the tests: $$missing" && \
	    if [ "$$(id -u)" = 0 ]; then asroot=; else asroot="sudo -n"; fi && \
	    { $$asroot apt-get -qq update; \
	      $$asroot env DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $$missing >/dev/null; }; } || \
	  echo "not here, and not to be installed: $$missing" >&2

# Processes that the tests start are forked from one that has all imported; FLOWSPEC_FRESH_PROCESSES=1 starts each anew.
# Types are checked meanwhile where files have changed: what pyright says comes as one piece, among the tests' dots.
test: lint tools
	@{ test -e $(TYPES) && test -z "$$($(CHANGED))" && exit; touch $(TYPES).new; \
	  said=$$($(BIN)/pyright 2>&1); code=$$?; printf '\n$(BIN)/pyright: %s\n' "$$said"; \
	  test $$code != 0 || mv $(TYPES).new $(TYPES); exit $$code; } & types=$$!; \
	trap 'kill $$types; exit 130' INT TERM; \
	echo '$(BIN)/python -m pytest -n $(JOBS) --dist worksteal'; \
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal; code=$$?; \
	wait $$types || { echo "types do not fit: pyright says above where; make types says it again" >&2; exit 1; }; \
	exit $$code

# Random tokens through the detokeniser: a million sequences, some minutes.
fuzz: setup
	FLOWSPEC_FUZZ=1000000 $(BIN)/python -m pytest tests/test_text.py -k random

# The tests once more, with the newest version of everything that pyproject.toml allows.
test-newest: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --extra-index-url $(TORCH_INDEX) \
	  --upgrade --upgrade-strategy eager -e '.[cpu,dev]'
	$(NEWEST)/bin/python -m pip list --disable-pip-version-check
	$(NEWEST)/bin/python -m pytest $(TESTS)

# Simulates everything that docs/RESULTS.md shows of clusters, and writes it there.
results: setup
	$(BIN)/python benchmarks/results.py

# Trains the demo target and its draft head again (hours on two cores) and writes them into src/flowspec/demo.
demo-model: setup
	$(BIN)/python -m flowspec.train.demo

clean:
	rm -rf $(VENV) $(NEWEST) .pytest_cache .ruff_cache build src/*.egg-info
