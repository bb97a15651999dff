# On a machine with Python 3.10 or later, pip, a C++ compiler and make:
#
#   make bench    the environment, the build, and the microbenchmarks (quick form)
#   make test     the environment, the build, and everything that CI runs
#
# PYTHON chooses the interpreter, TORCH what pip installs as torch (TORCH=torch for the newest build); WERROR=1 makes
# compiler warnings errors.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WERROR ?= 0

PIP := $(VENV)/bin/python -m pip
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/cpp/*.h tests/cpp/*.cpp tests/cpp/*/*.h)
PY := fused_reg tests benchmarks examples docs/conf.py setup.py build_backend.py build_config.py cuda_toolkit.py scripts

.PHONY: build lint format types pytest ctest cuda-compile cuda-on-host docs docs-links test bench bench-full clean

$(VENV)/.environment: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" ninja pybind11 numpy
	touch $@

$(VENV)/.build: $(VENV)/.environment setup.py build_backend.py build_config.py cuda_toolkit.py $(wildcard csrc/sources.txt csrc/*/sources.txt) $(filter csrc/%,$(CPP))
	FUSED_REG_WERROR=$(WERROR) $(PIP) install --quiet --disable-pip-version-check --no-build-isolation --editable ".[dev]"
	touch $@

build: $(VENV)/.build

lint: build
	$(RUN) ruff check $(PY)
	$(RUN) ruff format --check $(PY)
	$(RUN) clang-format --dry-run -Werror $(CPP)

format: build
	$(RUN) ruff check --fix $(PY)
	$(RUN) ruff format $(PY)
	$(RUN) clang-format -i $(CPP)

types: build
	$(RUN) mypy

pytest: build
	$(RUN) python -m pytest

ctest: build
	$(RUN) cmake -S . -B build/cmake -G Ninja -DFUSED_REG_WERROR=$(WERROR) -DPython3_EXECUTABLE="$(abspath $(VENV))/bin/python"
	$(RUN) cmake --build build/cmake
	$(RUN) ctest --test-dir build/cmake -j 2 --output-on-failure

# The CUDA backend, for every architecture and without a GPU; skipped without nvcc, unless FUSED_REG_REQUIRE_NVCC=1.
cuda-compile: build
	$(RUN) python -m scripts.check_cuda_compile

cuda-on-host: build
	$(RUN) python -m scripts.check_cuda_on_host

# The pages, in build/docs. A warning is an error: a link within them that leads nowhere, a name that is not documented.
docs: build
	$(RUN) sphinx-build --fail-on-warning --keep-going --quiet --fresh-env -b html -d build/doctrees docs build/docs

# The links that lead out, which need a network.
docs-links: build
	$(RUN) sphinx-build --quiet -b linkcheck -d build/doctrees docs build/docs-links

test: lint types ctest cuda-compile cuda-on-host docs pytest

bench: build
	$(RUN) python -m benchmarks --quick

bench-full: build
	$(RUN) python -m benchmarks

clean:
	rm -rf build dist *.egg-info fused_reg/*.so $(VENV)
