# Every command of the project. `make train` and `make test` work on a fresh machine with Python >= 3.12 and nothing else.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
GPU := $(wildcard /dev/nvidiactl /dev/dxg)
EXTRA := $(if $(GPU),cuda)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEVICELESS = $(shell $(BIN)/python -c "import shlex, tomllib; print(shlex.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['deviceless']))")

.PHONY: help train test test-all record lint format docs gpu tune wheel wheelhouse clean

help:
	@echo "make train    install, train on handwritten digits, sample, evaluate: runs/digits/"
	@echo "make test     install, the tests that need no GPU, but those recorded as passed with the same code"
	@echo "make test-all all tests that need no GPU; every kernel is compiled for H200 and A100 again; writes tests/recorded.json"
	@echo "make record   the recorded tests whose code changed; writes tests/recorded.json"
	@echo "make lint     formatting, lint, types"
	@echo "make format   write the formatting"
	@echo "make docs     install, regenerate docs/architecture.md and docs/results.md, build the site: build/site/"
	@echo "make gpu PYTHON=python3   on a GPU host, nothing installed: GPU tests, then benchmarks"
	@echo "make tune PYTHON=python3  the same, before it: measures tile sizes, minutes a kernel and case"
	@echo "make wheel    the wheel of this checkout: dist/"
	@echo "make wheelhouse PLATFORM=manylinux_2_28_x86_64 PYTHON_VERSION=3.12 [EXTRA=cuda]"
	@echo "              all wheels that an air-gapped host installs: wheelhouse/"
	@echo "make clean    remove .venv and runs/"

train: .venv/installed
	$(BIN)/python train.py configs/digits.py

test: .venv/installed-dev
	-$(BIN)/python -m kernels_pallas.build  # custom calls, with nvcc also CUDA's: minutes, once; without, their tests are skipped
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" --durations=10 --skip-recorded

test-all: .venv/installed-dev
	-$(BIN)/python -m kernels_pallas.build
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" --durations=10 --everything --record

record: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "recorded and not gpu" --skip-recorded --record

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

wheel:
	@rm -rf dist
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

PLATFORM ?= manylinux_2_28_x86_64
PYTHON_VERSION ?= 3.12
# A host that runs wheels of manylinux_2_28 runs those of older versions too, and pip wants each named.
PLATFORMS = $(shell $(PYTHON) -c "import re; version, machine = re.fullmatch(r'manylinux_2_(\d+)_(\w+)', '$(PLATFORM)').groups(); \
	print(*(f'manylinux_2_{v}_{machine}' for v in range(int(version), 4, -1)), *(f'manylinux{v}_{machine}' for v in (2014, 2010, 1)))")
wheelhouse: wheel
	@rm -rf wheelhouse
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --constraint constraints.txt --only-binary=:all: \
		$(foreach p,$(PLATFORMS),--platform $(p)) --python-version $(PYTHON_VERSION) --implementation cp \
		--dest wheelhouse "$$(echo dist/dito_jax-*.whl)$(if $(EXTRA),[$(EXTRA)])"
	@echo "$$(ls wheelhouse | wc -l) wheels in wheelhouse/ for Python $(PYTHON_VERSION) on $(PLATFORM); on the host:"
	@echo "pip install --no-index --find-links wheelhouse 'dito_jax$(if $(EXTRA),[$(EXTRA)])'"

clean:
	rm -rf .venv runs dist wheelhouse

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
