# The verbs of the project; everything happens in .venv, installed from constraints.txt.
PYTHON ?= python3
BIN    := .venv/bin
CXX    ?= g++
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort)
ARGS   ?=

.PHONY: setup test bench lint format fuzz sanitize clang clean counters check-cuda readme notebook sdist wheel matrix pair
.DELETE_ON_ERROR:

setup: .venv/.built
	@$(BIN)/python -c '' || \
	  { echo "mbperf: $(BIN)/python does not start (Python upgraded?); run: make clean setup"; exit 1; }

# .unfinished stays behind when an install is interrupted: what pip had half written cannot be trusted.
.venv/.installed: constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
	  { echo "mbperf: no $(PYTHON); install Python 3.10 or later, e.g. apt-get install python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mbperf: $(PYTHON) is older than 3.10; install a later one and run: make PYTHON=python3.X"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "mbperf: $(PYTHON) has no venv module; install it, e.g. apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "mbperf: $(PYTHON) has no C headers; install them, e.g. apt-get install python3-dev"; exit 1; }
	@command -v $(CXX) >/dev/null || \
	  { echo "mbperf: no C++ compiler ($(CXX)); install one, e.g. apt-get install g++"; exit 1; }
	@if [ -e .venv/.unfinished ]; then \
	  echo "mbperf: the last install was interrupted; making .venv again"; rm -rf .venv; fi
	@[ -d .venv ] || $(PYTHON) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < 4e9)' || \
	  { echo "mbperf: less than 4 GB free on this disk; free some (torch with CUDA is the largest part)"; exit 1; }
	@mkdir -p .venv && touch .venv/.unfinished
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy setuptools wheel ninja pybind11 || \
	  { echo "mbperf: pip failed (above): no network, a full disk, or no torch for this Python?"; exit 1; }
	@why=$$($(BIN)/python -c 'import torch' 2>&1) || \
	  { echo "mbperf: torch does not import ($$(echo "$$why" | tail -n 1)); install what it names," \
	         "or run: make setup PYTHON=python3.X"; exit 1; }
	@rm .venv/.unfinished && touch $@

.venv/.built: .venv/.installed setup.py $(SOURCES)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]' || \
	  { echo "mbperf: the extension does not build; the compiler says why, above, after 'error:'"; exit 1; }
	@touch $@

# Two workers, see tests/conftest.py; pytest-benchmark's part is off in them, as what they test starts its own.
test: setup
	$(BIN)/python -m pytest tests/ -n 2 --dist loadgroup --no-loadscope-reorder --benchmark-disable $(ARGS)

bench: setup
	$(BIN)/python -m pytest bench/ --benchmark-compare $(ARGS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python -m mypy

format: setup
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 $(BIN)/clang-format -i

fuzz: setup
	$(BIN)/python -m pytest tests/ -k fuzz --hypothesis-profile=fuzz --timeout=0 $(ARGS)

# A second copy of the package under build/sanitize; the ordinary build stays as it is. libasan has to come
# first in the process, and dies at the first C++ exception unless libstdc++ is loaded with it.
SANITIZED := build/sanitize/lib
SANITIZERS := MBPERF_SANITIZE=address,undefined
SANITIZED_TESTS ?= tests/test_build.py::test_the_build_that_runs_is_the_one_asked_for \
                   $(wildcard tests/ops/test_*.py) tests/test_memory.py
sanitize: setup
	rm -rf $(SANITIZED)
	$(SANITIZERS) $(BIN)/python setup.py -q build --build-lib $(SANITIZED) \
	  --build-temp build/sanitize/temp
	cd $(SANITIZED) && env $(SANITIZERS) LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(CURDIR)/$(BIN)/python -m pytest -c $(CURDIR)/pyproject.toml $(addprefix $(CURDIR)/,$(SANITIZED_TESTS)) $(ARGS)

# A third copy, by clang (apt-get install clang libomp-dev), under the operators' tests; first whether it is that
# copy which runs.
BY_CLANG := build/clang/lib
clang: setup
	rm -rf $(BY_CLANG)
	CXX=clang++ MBPERF_CUDA=0 $(BIN)/python setup.py -q build --build-lib $(BY_CLANG) --build-temp build/clang/temp
	cd $(BY_CLANG) && $(CURDIR)/$(BIN)/python -c 'import mbperf; \
	  assert mbperf.__file__.startswith("$(CURDIR)/$(BY_CLANG)"), mbperf.__file__'
	cd $(BY_CLANG) && $(CURDIR)/$(BIN)/python -m pytest -c $(CURDIR)/pyproject.toml $(CURDIR)/tests/ops $(ARGS)

# Instructions of the row kernels under callgrind, against csrc/counters/expected.json; exit 13 if they moved.
counters: setup
	$(BIN)/python tools/counters.py $(ARGS)

# Every CUDA kernel compiled for several chips, no GPU needed: registers, spills, machine code.
check-cuda: setup
	$(BIN)/python tools/check_kernels.py $(ARGS)

# README's figures, from the newest complete run under results/.
readme: setup
	$(BIN)/python tools/readme.py $(ARGS)

# The lesson's notebook, run again, and its page.
notebook: setup
	$(BIN)/python tools/notebook.py $(ARGS)

# The sdist, built from in a fresh environment; the wheel for the torch in .venv, installed where there is no
# compiler. Both end up in build/dist.
sdist wheel: setup
	$(BIN)/python tools/distribution.py $@ $(ARGS)

# Pairs of Python and torch, built and tested: make matrix ARGS="3.12:2.13.0 3.11:2.15.0"
matrix: setup
	$(BIN)/python tools/matrix.py $(ARGS)

# One pair beside the main one, briefly; where it cannot be had here the table says so, and that is no fault.
PAIR ?= 3.12:2.13.0
pair: setup
	$(BIN)/python tools/matrix.py --quick $(PAIR) || [ $$? -eq 3 ]

clean:
	rm -rf .venv build *.egg-info mbperf/_C*.so mbperf/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
