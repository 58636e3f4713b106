# Two commands for a newcomer: `make demo` and `make test`. Everything runs in .venv, made on first use.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
RESULTS ?= build/benchmarks
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench gpu wheel clean help

help:
	@echo "make demo   draw a data set, train baseline and MPANet, evaluate, report (runs/demo)"
	@echo "            METHODS=\"lba mcja aligngan\" trains others and adds their rows"
	@echo "make test   all tests and one round of every benchmark"
	@echo "make lint   ruff, clang-format, mypy --strict"
	@echo "make bench  benchmarks on this machine"
	@echo "make gpu    every GPU test, then the benchmarks (JSON in RESULTS=$(RESULTS)); uses the python3 that holds PyTorch"

# PyTorch comes before the dependencies of the project, so that its version stays the one named above.
$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77,<82" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet ninja pybind11
	@touch $@

SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

$(VENV)/.demo: $(VENV)/.base $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[report]"
	@touch $@

$(VENV)/.test: $(VENV)/.base $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py $(METHODS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -rs -p no:cacheprovider --durations=25 -n auto --maxprocesses 8 --dist loadgroup tests
	$(BIN)/python -m pytest -q -p no:cacheprovider --benchmark-disable -k "not compiled" benchmarks

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cu' 'tests/*.cpp')

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# A GPU machine brings its own PyTorch; nothing is downloaded there.
gpu:
	@python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null \
	  || { echo "make gpu: python3 sees no CUDA device (torch.cuda.is_available() is False); nothing was run"; exit 1; }
	python3 -m pip install --quiet --no-deps --no-build-isolation -e .
	python3 -m pytest -q -p no:cacheprovider tests/ops tests/test_dispatch.py tests/train/test_on_device.py
	mkdir -p $(RESULTS)
	python3 -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name --benchmark-json=$(RESULTS)/gpu.json
	python3 benchmarks/report.py $(RESULTS)/gpu.json

wheel: $(VENV)/.test
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info fastreid_vi/*.so runs
