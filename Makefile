# The verbs of the project; everything happens in .venv, installed from constraints.txt.
PYTHON ?= python3
BIN    := .venv/bin
CXX    ?= g++
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' | sort)
ARGS   ?=

.PHONY: setup test bench lint format fuzz clean
.DELETE_ON_ERROR:

setup: .venv/.built

.venv/.installed: constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "mbperf: no $(PYTHON); install Python 3.10 or later"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mbperf: $(PYTHON) is older than 3.10; run: make PYTHON=python3.X"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "mbperf: $(PYTHON) has no venv module; install it, e.g. apt-get install python3-venv"; exit 1; }
	@command -v $(CXX) >/dev/null || \
	  { echo "mbperf: no C++ compiler ($(CXX)); install one, e.g. apt-get install g++"; exit 1; }
	@$(PYTHON) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < 4e9)' || \
	  { echo "mbperf: less than 4 GB free on this disk; free some, torch alone takes 1-3 GB"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch numpy setuptools wheel ninja pybind11
	@$(BIN)/python -c 'import torch' || \
	  { echo "mbperf: torch is installed but cannot be imported (see above); run: make clean setup"; exit 1; }
	@touch $@

.venv/.built: .venv/.installed setup.py $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

test: setup
	$(BIN)/python -m pytest tests/ $(ARGS)

bench: setup
	$(BIN)/python -m pytest bench/ --benchmark-compare $(ARGS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	find csrc \( -name '*.cpp' -o -name '*.h' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	find csrc \( -name '*.cpp' -o -name '*.h' \) -print0 | xargs -0 $(BIN)/clang-format -i

fuzz: setup
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/ -k fuzz $(ARGS)

clean:
	rm -rf .venv build *.egg-info mbperf/_C*.so mbperf/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
