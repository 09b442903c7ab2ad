# For everybody: `make demo`, `make test` and `make docs`. The rest is for who works on the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Minutes of `make fuzz`, seeds of `make sim`.
FUZZ_MINUTES ?= 10
SEEDS ?= 500
# Minutes of each module of `make chaos`.
CHAOS_MINUTES ?= 20
# Anything: `make sim` and `make chaos` on Dask without dask-gpurt, to compare.
STOCK ?=

.PHONY: setup demo test check format bench fuzz sim chaos gpu-bench gpu-test clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dask-gpurt needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/dask gpurt demo --report demo-report.html

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks overhead --json benchmarks/results/overhead.json

.PHONY: docs docs-links

# Any warning is an error, a reference to what does not exist is one.
SPHINX := $(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky
DOCS_STAMP := $(VENV)/.docs-installed

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(DOCS_STAMP)
	$(BIN)/python -m docs
	$(SPHINX) --builder html docs build/docs
	@echo 'build/docs/index.html'

# Asks every server that is linked to. What can be told of links without a network is among the tests.
docs-links: $(DOCS_STAMP)
	$(SPHINX) --builder linkcheck docs build/docs-links

# Where there is a GPU. cuDF wants other versions than the pinned ones, so that this is an environment of its own.
GPU_VENV := .venv-gpu
GPU_EXTRAS ?= cudf
GPU_STAMP := $(GPU_VENV)/.installed
GPU_RESULTS ?= benchmarks/results/gpu/gpu.json

$(GPU_STAMP): pyproject.toml
	@nvidia-smi --list-gpus > /dev/null 2>&1 || { echo 'nothing was run: there is no GPU (nvidia-smi lists none)'; exit 77; }
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --editable '.[dev,$(GPU_EXTRAS)]'
	touch $@

# Fails where nothing can be run: a green line would say that it was.
gpu-bench: $(GPU_STAMP)
	mkdir -p $(dir $(GPU_RESULTS))
	$(GPU_VENV)/bin/python -m benchmarks gpu --json $(GPU_RESULTS)

gpu-test: $(GPU_STAMP)
	$(GPU_VENV)/bin/python -m pytest -m gpu

fuzz: setup
	$(BIN)/python -m pytest -p no:cacheprovider tests/property/test_fuzz.py --fuzz-minutes=$(FUZZ_MINUTES)

# Faults on simulated processes: seeds 0 to SEEDS, about one a second and core.
sim: setup
	$(BIN)/python -m benchmarks.world --seeds $(SEEDS) $(if $(STOCK),--stock)

# Faults on real processes, all cases, so many minutes a module at most.
chaos: setup
	$(BIN)/python tests/chaos.py --minutes $(CHAOS_MINUTES) $(if $(STOCK),--stock)

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist *.egg-info
