# Needs make and Python 3.11 or newer with venv; everything else is installed into .venv from pinned versions.
#
# On Linux, pip takes PyTorch with CUDA, some gigabytes. A machine without a GPU saves them by pointing
# PIP_EXTRA_INDEX_URL at PyTorch's index of CPU wheels before the first `make`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo install test test-all test-vision check proto bench bench-adapters clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(STAMP)  ## federate a pre-trained model over non-IID sites, offline, in under a minute
	$(BIN)/fedelta demo

install: $(STAMP)  ## create .venv with the pinned dependencies

test: $(STAMP)  ## the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-all: $(STAMP)  ## all tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "slow or not slow"

# Beside the environment: torchvision as PyPI has it does not load with a PyTorch for CPUs, and nor does transformers where
# it finds such a torchvision. The tests know a way round.
test-vision: $(STAMP)  ## the tests with the models of torchvision and timm
	$(PIP) install -q -c constraints.txt --no-deps --upgrade --target $(VENV)/vision torchvision timm
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/vision $(BIN)/python -m pytest tests/learning/test_vision.py -m "slow or not slow"

check: $(STAMP)  ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_direction.py

# The compiler is not among what anybody needs: it is installed for this, and removed.
proto:  ## generate fleet/frames_pb2.py from frames.proto
	"$(PYTHON)" -m venv build/protoc
	build/protoc/bin/python -m pip --disable-pip-version-check install -q grpcio-tools==1.85.1
	build/protoc/bin/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src src/fedelta/fleet/frames.proto
	rm -rf build/protoc

# BENCH="--docs" also rewrites docs/benchmarks.md; docs/benchmarks.md tells how peers take part.
bench: $(STAMP)  ## the simulation beside a bare PyTorch loop, and the exact mean beside add_
	$(BIN)/python -m benchmarks.simulation $(BENCH)
	$(BIN)/python benchmarks/mean.py

# BENCH="--data FOLDER" names the folder of the data; it takes an hour or two, and a second call continues.
bench-adapters: $(STAMP)  ## all ways to federate LoRA, on real models and data
	$(BIN)/python -m benchmarks.adapters $(BENCH)

clean:  ## remove .venv and caches
	rm -rf $(VENV) build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch comes first and alone: it is the largest, and a failure to get it shows at once and by name.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON) was not found; install Python 3.11 or newer, or run: make PYTHON=/path/to/python3.12"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fedelta needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1); run: make PYTHON=python3.12"; \
	  exit 2; }
	@"$(PYTHON)" -c 'import venv, ensurepip' || { \
	  echo "$(PYTHON) has no venv; on Debian and Ubuntu install the package python3-venv"; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[test,dev]'
	@touch $@
