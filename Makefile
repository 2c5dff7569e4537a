# Every command of the project. `make train` and `make test` work on a fresh machine with Python >= 3.12 and nothing else.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
GPU := $(wildcard /dev/nvidiactl /dev/dxg)
EXTRA := $(if $(GPU),cuda)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEVICELESS = $(shell $(BIN)/python -c "import shlex, tomllib; print(shlex.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['deviceless']))")

.PHONY: help train test test-all lint format docs gpu tune clean

help:
	@echo "make train    install, train on handwritten digits, sample, evaluate: runs/digits/"
	@echo "make test     install, all tests that need no GPU; kernels are compiled for an H200 too"
	@echo "make lint     formatting, lint, types"
	@echo "make format   write the formatting"
	@echo "make docs     install, regenerate docs/architecture.md and docs/results.md, build the site: build/site/"
	@echo "make gpu PYTHON=python3   on a GPU host, nothing installed: GPU tests, then benchmarks"
	@echo "make tune PYTHON=python3  the same, before it: measures tile sizes, minutes a kernel and case"
	@echo "make clean    remove .venv and runs/"

train: .venv/installed
	$(BIN)/python train.py configs/digits.py

test: .venv/installed-dev
	-$(BIN)/python -m kernels_pallas.build  # custom calls, with nvcc also CUDA's: minutes, once; without, their tests are skipped
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" --durations=10

test-all: .venv/installed-dev
	-$(BIN)/python -m kernels_pallas.build
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" --durations=10 --everything

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed-docs
	$(BIN)/python docs/scripts/architecture.py
	$(BIN)/python docs/scripts/results.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml
	@echo build/site/index.html

gpu:
	-$(PYTHON) -m kernels_pallas.build cuda
	-$(PYTHON) -m kernels_pallas.build cutlass  # to compare with; minutes, and needs CUTLASS's headers
	JAX_PLATFORMS=cuda $(PYTHON) -m pytest -m gpu tests/kernels_pallas
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest tests/kernels_pallas/test_torch.py || [ $$? -eq 5 ]  # 5: no PyTorch
	JAX_PLATFORMS=cuda $(PYTHON) -m kernels_pallas.bench

tune:
	JAX_PLATFORMS=cuda $(PYTHON) -m kernels_pallas.tune --ship

clean:
	rm -rf .venv runs

.venv/installed: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "dito_jax needs Python 3.12 or newer; found $$(python3 --version 2>&1). Install it, or: make train PYTHON=/path/to/python3.12"; \
		exit 2; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 12) else f"dito_jax needs Python 3.12 or newer; $(PYTHON) is {v[0]}.{v[1]}.")'
	$(PYTHON) -m venv .venv
	$(PIP) --editable "$(if $(EXTRA),.[$(EXTRA)],.)"
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable ".[$(if $(EXTRA),$(EXTRA)$(comma))dev]"
	$(PIP) --no-deps $(DEVICELESS)
	@touch $@

.venv/installed-docs: .venv/installed
	$(PIP) --editable ".[docs]"
	@touch $@

comma := ,
