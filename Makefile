# Everything a fresh machine needs: `make demo`, `make test`.
VENV ?= .venv
BIN := $(VENV)/bin
# Test files are shared out to as many processes, each of one thread: thread pools would fight over the cores.
WORKERS ?= 2

.PHONY: demo test test-slow check lint types clean

$(BIN)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.ready
	$(BIN)/dspark demo

test: $(BIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(BIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile -m slow

lint: $(BIN)/.ready
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench

types: $(BIN)/.ready
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV)
