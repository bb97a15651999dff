# On a machine with Python 3.10 or later, pip, a C++ compiler and make:
#
#   make bench       the environment, the build, and the microbenchmarks (quick form)
#   make test        the environment, the build, and tests that prove every promise once: minutes
#   make test-rest   what they leave out: more combinations, sanitizers, aarch64, CUDA for every architecture, examples,
#                    trainers
#   make test-all    both, as CI runs them
#
# PYTHON chooses the interpreter, TORCH what pip installs as torch (TORCH=torch for the newest), CONSTRAINTS the versions of
# the tools (CONSTRAINTS= for the newest); WERROR=1 makes compiler warnings errors.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
WERROR ?= 0

WORKERS := --numprocesses 2 --dist loadfile
PIP := $(VENV)/bin/python -m pip install --no-compile --disable-pip-version-check $(addprefix --constraint=,$(CONSTRAINTS))
# make's job server reaches no process of a recipe, and ninja complains of it.
RUN := MAKEFLAGS= PATH="$(abspath $(VENV))/bin:$$PATH"
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/cpp/*.h tests/cpp/*.cpp tests/cpp/*/*.h tests/cpp/*/*.cpp)
SETUP := pyproject.toml setup.py build_backend.py build_config.py cuda_toolkit.py
PY := fused_reg tests benchmarks examples docs/conf.py $(filter %.py,$(SETUP)) scripts

.PHONY: build lint format types docs docs-links pytest pytest-long configure ctest ctest-long aarch64 cuda-compile \
	cuda-on-host cuda-build oldest test test-rest test-all bench bench-full constraints clean

$(VENV)/.environment:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet "$(TORCH)" "setuptools>=77" ninja
	touch $@

# The compiled part, once: the tools below come beside it. Without a GPU, CUDA kernels would only take their time here.
$(VENV)/.build: $(VENV)/.environment $(SETUP) $(wildcard csrc/sources.txt csrc/*/sources.txt) $(filter csrc/%,$(CPP))
	@echo "compiling the extension, which takes a minute or two: $(VENV)/build.log"
	@if [ -z "$$FORCE_CUDA$$FUSED_REG_CUDA" ] && $(VENV)/bin/python -W ignore -c \
		"import torch; raise SystemExit(not torch.version.cuda or torch.cuda.is_available())"; then \
		echo "no GPU is here, so the CUDA kernels are left out: FUSED_REG_CUDA=1 builds them"; \
		export FUSED_REG_CUDA=0; \
	fi; \
	MAKEFLAGS= FUSED_REG_WERROR=$(WERROR) $(PIP) --verbose --no-build-isolation --no-deps --editable . >$(VENV)/build.log 2>&1 \
		|| { cat $(VENV)/build.log; exit 1; }
	@sed -n 's/^ *fused_reg: /fused_reg: /p' $(VENV)/build.log | sort -u
	@touch $@

$(VENV)/.bench: EXTRAS := bench
$(VENV)/.dev: EXTRAS := dev
$(VENV)/.all: EXTRAS := dev,examples,integrations,pat
$(VENV)/.bench $(VENV)/.dev $(VENV)/.all: $(VENV)/.build $(CONSTRAINTS)
	$(PIP) --quiet "fused_reg[$(EXTRAS)]"
	touch $@

build: $(VENV)/.dev

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
	$(RUN) python -m pytest $(WORKERS)

pytest-long: $(VENV)/.all
	$(RUN) python -m pytest $(WORKERS) --long -m long

configure: build
	$(RUN) cmake -S . -B build/cmake -G Ninja -DFUSED_REG_WERROR=$(WERROR) -DPython3_EXECUTABLE="$(abspath $(VENV))/bin/python"

ctest: configure
	$(RUN) cmake --build build/cmake --target quick_tests
	$(RUN) ctest --test-dir build/cmake -j 2 --output-on-failure -L quick

ctest-long: configure
	$(RUN) cmake --build build/cmake
	$(RUN) ctest --test-dir build/cmake -j 2 --output-on-failure -LE quick

# The CPU backend on aarch64, in an emulator. root gets the tools by apt-get; skipped where they cannot be had, unless
# FUSED_REG_REQUIRE_AARCH64=1.
aarch64: build
	$(RUN) python -m scripts.check_aarch64

# The CUDA backend and its machine code, for every architecture and without a GPU; skipped without nvcc, unless
# FUSED_REG_REQUIRE_NVCC=1.
cuda-compile: build
	$(RUN) python -m scripts.check_cuda_compile

cuda-on-host: build
	$(RUN) python -m scripts.check_cuda_on_host

# A whole build and import, with the CUDA torch of the registry.
cuda-build:
	$(PYTHON) -m scripts.check_cuda_build

# The callbacks with the oldest trainers that pyproject.toml names, which pip installs in build/oldest.
oldest: $(VENV)/.all
	$(RUN) python -m scripts.check_oldest_trainers

# The pages, in build/docs. A warning is an error: a link within them that leads nowhere, a name that is not documented.
docs: build
	$(RUN) sphinx-build --fail-on-warning --keep-going --quiet --fresh-env -b html -d build/doctrees docs build/docs

# The links that lead out, which need a network.
docs-links: build
	$(RUN) sphinx-build --quiet -b linkcheck -d build/doctrees docs build/docs-links

test:
	$(MAKE) --jobs 2 --output-sync lint types docs ctest
	$(MAKE) pytest

test-rest: $(VENV)/.all
	$(MAKE) --jobs 2 --output-sync ctest-long aarch64 cuda-compile cuda-on-host cuda-build oldest pytest-long

test-all: test test-rest

bench: $(VENV)/.bench
	$(RUN) python -m benchmarks --quick

bench-full: $(VENV)/.bench
	$(RUN) python -m benchmarks

# The newest versions of the tools, as the tested ones: constraints.txt. torch, and what it alone brings, is TORCH.
constraints: $(VENV)/.environment
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	{ head -1 constraints.txt; $(VENV)/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 \
		--system-certs --no-annotate --no-header --quiet \
		| grep -v -P '^(torch|triton|nvidia-(?!cuda-nvdisasm)[a-z0-9-]+|cuda-[a-z]+)=='; } >$(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:
	rm -rf build dist *.egg-info fused_reg/*.so $(VENV)
