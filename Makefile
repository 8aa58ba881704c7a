# From a fresh checkout to a trained model on a CPU. `make` lists the targets.
#
# The CPU set-up needs the CPU build of torch; where pip finds only CUDA builds, give it PyTorch's CPU
# index through PIP_EXTRA_INDEX_URL. On a GPU: pip install 'torch>=2.13,<2.14' cmake ninja,
# then pip install --no-build-isolation '.[gpu]'.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
PIP    := $(VENV)/bin/python -m pip -qq
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Some containers set this; every process would then spend half a minute on compiling what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test long chaos fast lint types bench clean mutants matrix

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

setup: $(VENV)/packages $(VENV)/kernels  ## make .venv with everything that a training on a CPU needs

# DeepSpeed comes as source and looks at torch while it builds: hence torch first, and no isolation.
# No byte-code in advance: most of these modules are never imported. The doctor imports the others once.
$(VENV)/packages: pyproject.toml constraints.txt tools/match_torch.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt pip
	$(PIP) install --no-compile -c constraints.txt setuptools cmake ninja torch
	$(PIP) install --no-compile -c constraints.txt --no-build-isolation -e '.[cpu,dev]'
	$(VENV)/bin/python tools/match_torch.py
	$(VENV)/bin/python -m vogue.doctor
	touch $@

$(VENV)/kernels: $(VENV)/packages kernels/setup.py kernels/CMakeLists.txt $(wildcard kernels/csrc/*)
	$(VENV)/bin/python setup.py --quiet build_ext --inplace
	touch $@

demo: setup  ## warm-start a small Qwen2.5-VL, train it with VOGUE, evaluate before and after
	bash examples/digits/demo.sh

# A file's tests stay together: some share a trained model. Two at a time, since many wait for one another's ranks, and
# in the order of tests/conftest.py.
test: setup  ## the test suite
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 12

long: setup  ## further cases of what is slow, several ranks and families: half an hour
	python -m pytest -m long

MINUTES := 60
chaos: setup  ## runs that are killed, starved, stopped and damaged, and a table of what became of them; an hour, or MINUTES=5
	CHAOS_MINUTES=$(MINUTES) $(shell unshare -rm true 2>&1 && echo unshare -rm) python -m pytest tests/chaos -m chaos -rs

fast: setup  ## the tests that take less than ten seconds each
	python -m pytest -m "not slow"

lint: setup  ## ruff
	ruff check . && ruff format --check .

types: setup  ## pyright, in basic mode
	pyright

mutants: setup  ## single mistakes in a copy of the code: which does no test see?
	python tools/mutants.py

matrix:  ## vogue_kernels alone, installed and tested on the oldest, a middle and the newest torch; 15 GB, not kept
	$(PYTHON) tools/matrix.py

bench: setup  ## the head against PyTorch and Liger on this machine, in two minutes; see bench/kernels.py for more
	python bench/kernels.py --quick

clean:  ## remove .venv and what was built
	rm -rf $(VENV) build kernels/build *.egg-info kernels/*.egg-info kernels/vogue_kernels/cpu/_C.so
