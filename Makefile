# make help says what there is. A fresh machine needs Python 3.11 or later, a C++ compiler and pip.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# The first Python that is new enough, unless one is given: make PYTHON=/path/to/python test
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
# Put here what your package index needs, e.g. PIP_FLAGS="--extra-index-url ..."
PIP_FLAGS ?=
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c $(CONSTRAINTS) $(PIP_FLAGS)
# Here a missing compiler is an error; for a user's `pip install` it is not (setup.py).
export FASTBERT_BUILD_EXTENSION ?= 1
TESTS ?= tests
PYTEST_ARGS ?= -m "not slow and not kernels"
# Processes that share the tests file by file: most tests keep one core busy. 0 runs them in this one. Their OpenMP threads
# wait passively: one that spins holds up those of the other process.
WORKERS ?= 2
# A test that hangs ends the run, with the stacks of all threads, instead of holding it until somebody looks.
PYTEST_LIMIT := -o faulthandler_exit_on_timeout=true -o faulthandler_timeout

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: build  ## fine-tune a real BERT on real text, predict, compare with Hugging Face (under 10 minutes)
	@$(BIN)/python examples/demo.py

.PHONY: test
test: build  ## run the tests (TESTS=path PYTEST_ARGS=... to choose)
	@OMP_WAIT_POLICY=passive $(BIN)/pytest $(PYTEST_LIMIT)=900 -n $(WORKERS) --dist loadfile $(PYTEST_ARGS) $(TESTS)

.PHONY: floor
floor:  ## the same of ops and models, with the oldest torch and transformers that are supported, in .venv-floor
	@$(MAKE) test VENV=.venv-floor CONSTRAINTS=requirements/floor.txt TESTS="tests/ops tests/model"

.PHONY: kernels
kernels: build  ## compile every Triton kernel without a GPU; check registers, spills, shared memory
	@$(BIN)/pytest $(PYTEST_LIMIT)=3600 -m kernels tests/kernels

.PHONY: kernel-tables
kernel-tables: build  ## write what the GPU kernels compile to: bench/results/kernels-*.json
	@$(BIN)/fastbert bench kernels
	@$(BIN)/python bench/cuda_resources.py

.PHONY: build
build: $(VENV)/.stamp-install  ## environment and extension, up to date
	@$(BIN)/python setup.py -q build_ext --inplace

.PHONY: env
env: $(VENV)/.stamp-install  ## the environment .venv with pinned dependencies and fastbert, editable

$(VENV)/.stamp-venv:
	@if [ -z "$(PYTHON)" ]; then \
		echo "fastbert needs Python 3.11 or later, and none was found; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; print(f"Python {v}: {sys.executable}"); sys.exit(None if sys.version_info >= (3, 11) else \
		f"fastbert needs Python 3.11 or later, and $(PYTHON) is {v}; name another: make PYTHON=/path/to/python3.11 ...")'
	@if [ "$$FASTBERT_BUILD_EXTENSION" = 1 ] && ! command -v $${CXX:-c++} >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then \
		echo "no C++ compiler found (c++, g++, clang++): install one, or set CXX; FASTBERT_BUILD_EXTENSION=0 does without the kernels" >&2; exit 1; fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -m venv $(VENV) || { echo "python -m venv failed (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }; fi
	@touch $@

# torch comes first and by exact version, so that nothing else gets to choose its build.
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv $(CONSTRAINTS)
	@echo "installing torch"
	@$(PIP_INSTALL) "$$(grep '^torch==' $(CONSTRAINTS))" 'setuptools>=77' wheel
	@touch $@

$(VENV)/.stamp-install: $(VENV)/.stamp-torch pyproject.toml setup.py
	@echo "installing fastbert (editable) and what its tests need"
	@$(PIP_INSTALL) --no-build-isolation -e '.[train,dev]'
# Of CUTLASS the headers alone: its Python has requirements of its own, some of them for Linux only.
	@$(PIP_INSTALL) --no-deps nvidia-cutlass
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-install
	@echo "installing the benchmark's peers"
	@$(PIP_INSTALL) --no-build-isolation -e '.[bench]'
	@touch $@

.PHONY: lint
lint: env  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

.PHONY: bench
bench: build $(VENV)/.stamp-bench  ## the benchmarks; results go to bench/results
	@$(BIN)/fastbert bench $(BENCH_ARGS)

.PHONY: gpu
gpu:  ## tests and benchmarks on an NVIDIA GPU, on the Python that is there (GPU_STEPS="build tests sanitize bench")
	@if [ -z "$(PYTHON)" ]; then echo "make gpu: needs Python 3.11 or later, and none was found" >&2; exit 1; fi
	@$(PYTHON) .ci/gpu $(GPU_STEPS)

.PHONY: results
results: env  ## write the benchmark table of README.md from bench/results
	@$(BIN)/python docs/results.py

# GCC's sanitizer libraries have to be there before Python; libstdc++ with them, for exceptions to be intercepted.
SANITIZE := build/sanitize/lib
.PHONY: sanitize
sanitize: env  ## the C++ under AddressSanitizer and UndefinedBehaviorSanitizer (TESTS=path to choose)
	@FASTBERT_SANITIZE=address,undefined CXX=g++ $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZE)
	@export LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
		PYTHONPATH=$(SANITIZE) PYTHONMALLOC=malloc; \
	$(BIN)/python -P -c 'import fastbert, pathlib, sys; p = pathlib.Path(fastbert.__file__); sys.exit(None if "sanitize" in p.parts else f"{p} is not the sanitized build")'; \
	$(BIN)/pytest -p no:cacheprovider -p no:faulthandler --capture=sys $(PYTEST_ARGS) $(if $(filter tests,$(TESTS)),tests/ops,$(TESTS))

.PHONY: dist
dist: env  ## source archive and wheel, in dist/
	@$(BIN)/python -m build --no-isolation

.PHONY: constraints
constraints: $(VENV)/.stamp-bench  ## write requirements/constraints.txt from what is installed
	@{ sed -n '/^#/p' $(CONSTRAINTS); $(BIN)/python -m pip freeze --all --exclude-editable | grep -vE '^(pip|fastbert)==| @ ' | sed 's/+.*//' | tr A-Z_ a-z- | sort; } > $(CONSTRAINTS).new
	@mv $(CONSTRAINTS).new $(CONSTRAINTS)

.PHONY: clean
clean:  ## remove what was built; the environment and the downloads stay
	@rm -rf build dist *.egg-info fastbert/_C.* fastbert/_C_cuda.* fastbert/_build.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find fastbert bench tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
