# Two commands for a newcomer: `make demo` and `make test`. Everything runs in .venv, made on first use.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
RESULTS ?= build/benchmarks
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-check gpu wheel clean help

help:
	@echo "make demo   draw a data set, train baseline and MPANet, evaluate, report (runs/demo)"
	@echo "            METHODS=\"lba mcja aligngan\" trains others and adds their rows"
	@echo "make test   all tests and one round of every benchmark"
	@echo "make lint   ruff, clang-format, mypy --strict"
	@echo "make bench  benchmarks on this machine, and their table (JSON in RESULTS=$(RESULTS))"
	@echo "make bench-check   ratios against the committed baseline of this device class"
	@echo "make gpu    everything that needs a GPU, in nine minutes; uses the python3 that holds PyTorch"
	@echo "            ONLY=ceilings,alignment  some sections or families; SANITIZER=0; DRY_RUN=1 without a GPU"

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
	$(BIN)/python -m pytest -q -rs -p no:cacheprovider --durations=25 -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder tests
	$(BIN)/python -m pytest -q -p no:cacheprovider --benchmark-disable -k "not compiled" benchmarks

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cu' 'tests/*.cpp')

# Every row, then the table; the file can be kept: python benchmarks/report.py --keep FILE, then --readme.
bench: $(VENV)/.test
	mkdir -p $(RESULTS)
	$(BIN)/python -m pytest -q -p no:cacheprovider benchmarks --benchmark-only --benchmark-quiet --benchmark-json=$(RESULTS)/cpu.json; \
	  status=$$?; $(BIN)/python benchmarks/report.py $(RESULTS)/cpu.json && exit $$status

# Ratios against tidy eager PyTorch, held to benchmarks/baselines/<class>.json.
bench-check: $(VENV)/.test
	$(BIN)/python -m benchmarks.gate check

# A GPU machine brings its own PyTorch; nothing is downloaded there. DRY_RUN=1 needs no GPU.
GPU_PYTHON ?= $(if $(DRY_RUN),$(BIN)/python,python3)
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.test)
	@$(GPU_PYTHON) -c "import torch" || { echo "make gpu: $(GPU_PYTHON) does not load PyTorch; nothing was run"; exit 1; }
	$(GPU_PYTHON) -m benchmarks.gpu_run $(if $(DRY_RUN),--dry-run) $(if $(filter 0,$(SANITIZER)),--no-sanitizer) \
	  --only "$(ONLY)" $(if $(filter command environment,$(origin RESULTS)),--results "$(RESULTS)")

wheel: $(VENV)/.test
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info fastreid_vi/*.so runs
