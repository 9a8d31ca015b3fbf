PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := .venv/installed

.PHONY: test machines interpreted compiled ahead bench check gpu hopper lint clean

# Triton is either interpreted or compiled for the life of a process, so the suite takes two at once,
# and a third, after the shorter of them, for what only compiles and what runs for long.
LAST := $(addprefix tests/test_,ahead_of_time.py benchmarks.py)

test: $(INSTALLED)
	@$(MAKE) --jobs=2 --output-sync=target interpreted compiled ahead
	@echo "make test: all three processes passed"

interpreted: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted

compiled: $(INSTALLED)
	$(BIN)/python -m pytest tests --ignore=tests/interpreted $(LAST:%=--ignore=%)

ahead: $(INSTALLED)
	$(BIN)/python -m pytest $(LAST)

# What follows from the processor: the suite with less of this one, other threads, and as a job in the
# background, a line of counts each. A few files: make machines TESTS=tests/test_qformer.py; kernels
# in the interpreter: TRITON_INTERPRET=1 make machines TESTS=tests/interpreted
TESTS ?= tests

machines: $(INSTALLED)
	$(BIN)/python -m tests.machines $(TESTS)

# Peers that are missing are left out; for xformers and Liger: pip install -e '.[bench]'.
bench: $(INSTALLED)
	$(BIN)/vlm-fast bench --section all

check: $(INSTALLED)
	$(BIN)/vlm-fast check

# No environment of its own: a GPU machine comes with its torch, perhaps without a network.
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

# The optional Hopper GEMMs: built (a minute and 4 GB a kernel, two at once; MAX_JOBS), and held to
# their registers. Of the wheel only the headers are wanted, none of its dependencies.
hopper: $(INSTALLED)
	$(PIP) --no-deps nvidia-cutlass
	VLM_FAST_CUTLASS=1 VLM_FAST_BUILD_EXT=0 $(BIN)/python setup.py build_ext --inplace
	$(BIN)/python -m benchmarks.hopper

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-triton-newest build dist *.egg-info vlm_fast/_C*.so vlm_fast/_hopper.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[hf,dev]'
	@touch $@
