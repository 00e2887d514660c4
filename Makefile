# Each target sets up .venv and builds the extension by itself; a second run does neither again.
#
#   PYTHON=python3.12            which Python makes .venv
#   TORCH=torch==2.11.0          which torch goes into it: any pip requirement, or the path of a wheel
#   ARGS="-k lstm"               arguments for the command behind demo, train, test and bench
#   RECIPE=text                  what `make train` trains
#   CXX, MAX_JOBS, CNNRNN_*, …   reach the build (setup.py lists them)

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
RECIPE ?= video

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Stamps remember what is done. The one of torch carries the requirement: another TORCH installs anew.
STAMPS := $(VENV)/stamps
HAVE_TORCH := $(STAMPS)/torch-$(subst /,-,$(subst =,-,$(subst $() ,-,$(TORCH))))
HAVE_DEV := $(STAMPS)/dev
HAVE_BENCH := $(STAMPS)/bench
HAVE_LINT := $(STAMPS)/lint
BUILT := $(STAMPS)/built
INSTALLED := $(STAMPS)/installed

C_FILES := $(shell find csrc cuda tests benchmarks -name '*.c' -o -name '*.cpp' -o -name '*.h' \
  -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
METADATA := setup.py pyproject.toml cnnrnn_ext/_version.py
BUILD_INPUTS := $(METADATA) cnnrnn_ext/operators.schema $(shell find csrc cuda -type f 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo train test bench lint format cuda abi-check clean clean-all

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## train a CNN→LSTM on moving digits; pictures and metrics in out/demo
	$(BIN)/python -m cnnrnn_ext demo $(ARGS)

train: $(INSTALLED) ## train a recipe, RECIPE=video by default; figures and pictures in out/<recipe>
	$(BIN)/python -m cnnrnn_ext train $(RECIPE) $(ARGS)

test: $(INSTALLED) ## the whole test suite
	$(BIN)/python -m pytest $(ARGS)

bench: $(INSTALLED) $(HAVE_BENCH) ## measure against the peers; ARGS=--quick, --scaling, --family lstm, …
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(HAVE_LINT) ## ruff and clang-format, as checks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(HAVE_LINT) ## ruff and clang-format, in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(C_FILES)

cuda: $(INSTALLED) ## compile the CUDA library (needs nvcc; no GPU, no CUDA torch) and list its resources
	CNNRNN_CUDA=1 CNNRNN_REQUIRE_EXT=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python cuda/resources.py $(ARGS)
	$(BIN)/python tests/cuda_emulation/launches.py

abi-check: $(INSTALLED) ## the library built here, under another torch; ARGS="--torch torch==2.12.0"
	$(BIN)/python tests/abi_check.py $(ARGS)

clean: ## remove what was built; .venv and out stay
	rm -rf build dist *.egg-info cnnrnn_ext/*.so cnnrnn_ext/_build.json $(BUILT) $(INSTALLED)

clean-all: clean ## remove .venv and out too
	rm -rf $(VENV) out

# ---- set-up ----

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python >= 3.10 is needed; choose one with: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "==> virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)

# torch comes first and alone: what follows finds it there and asks for no other.
$(HAVE_TORCH): | $(BIN)/python
	@echo "==> $(TORCH)"
	@$(PIP) install $(TORCH)
	@rm -f $(STAMPS)/torch-* $(BUILT)
	@touch $@

$(HAVE_DEV): requirements/dev.txt $(HAVE_TORCH)
	@echo "==> $<"
	@$(PIP) install -q -r $<
	@touch $@

$(HAVE_BENCH): requirements/bench.txt $(HAVE_DEV)
	@echo "==> $<"
	@$(PIP) install -q -r $<
	@touch $@

$(HAVE_LINT): requirements/lint.txt | $(BIN)/python
	@echo "==> $<"
	@$(PIP) install -q -r $<
	@touch $@

$(BUILT): $(BUILD_INPUTS) $(HAVE_DEV)
	@echo "==> compiled libraries"
	@CNNRNN_REQUIRE_EXT=1 $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# The libraries stand already: this only makes the package importable from everywhere.
$(INSTALLED): $(METADATA) $(HAVE_DEV) | $(BUILT)
	@echo "==> cnnrnn_ext, editable"
	@CNNRNN_REQUIRE_EXT=1 $(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@
