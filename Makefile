PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := .venv/installed

# Which torch is installed: "cuda" is PyPI's own, on Linux some 2.7 GB with NVIDIA's libraries; "cpu"
# is the small build, which is taken from pip's own places or else from PyTorch's index.
TORCH ?= $(shell [ "$$(uname)" != Linux ] || nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
CPU_TORCH = torch==$(shell sed -n 's/^torch==//p' constraints.txt)+cpu

# Releases of transformers beside the pinned one, under which every family is run.
TRANSFORMERS := 4.57.6 5.8.1 5.24.0

.PHONY: test test-slow compile-all budgets released versions $(TRANSFORMERS:%=released-%) machines \
  bench bench-full docs check gpu hopper host lint clean torch-cpu

# The budgets of kernels are of one compiler, the oldest that is served; it lies beside .venv.
BUDGETS_TRITON := $(shell sed -n 's/^BUDGETS_TRITON = "\([^"]*\)".*/\1/p' vlm_fast/devtools/budgets.py)
OVERLAY := .venv-triton-$(BUDGETS_TRITON)
FAMILIES := tests/patching/test_released_families.py

# Two processes at once. A file stays in one of them, for what it prepares once; kernels in the
# interpreter prepare nothing.
WORKERS ?= 2
PYTEST := PYTHONPATH=$(CURDIR)/$(OVERLAY) $(BIN)/python -m pytest -n $(WORKERS) \
  --dist loadfile --no-loadscope-reorder
INTERPRETER := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --device interpreter

# All that a commit is held to within minutes.
test: $(INSTALLED) $(OVERLAY)/installed
	$(PYTEST) -m "not slow"
	$(INTERPRETER) -m "not slow"

# The rest: other shapes and models, full sizes, whole trainings, the wheel, all architectures,
# and the families under other releases of transformers.
test-slow: $(INSTALLED) $(OVERLAY)/installed
	$(PYTEST) -m slow
	$(INTERPRETER) -m slow
	$(MAKE) released

# Every kernel with every config for all architectures, within the budgets.
compile-all: $(INSTALLED) $(OVERLAY)/installed
	PYTHONPATH=$(CURDIR)/$(OVERLAY) $(BIN)/python -m pytest tests/devtools/test_ahead_of_time.py

# Rewrites vlm_fast/devtools/budgets.json and host_budgets.json of tests/ops and tests/patching, like
# lock files, with the compiler that they are for.
budgets: $(INSTALLED) $(OVERLAY)/installed
	PYTHONPATH=$(CURDIR)/$(OVERLAY):$(CURDIR) $(BIN)/python -m vlm_fast.devtools.budgets
	PYTHONPATH=$(CURDIR)/$(OVERLAY):$(CURDIR) $(BIN)/python -m tests.tools.host_budgets

released: $(INSTALLED) $(TRANSFORMERS:%=.venv-transformers-%/installed)
	@$(MAKE) --jobs=$(WORKERS) --output-sync=target $(TRANSFORMERS:%=released-%)

$(TRANSFORMERS:%=released-%): released-%: .venv-transformers-%/installed
	PYTHONPATH=$(CURDIR)/$(<D):$(CURDIR) $(BIN)/python -m pytest $(FAMILIES)

# Every family under every release, in all ways: what is served goes to tests/tools/served.json and into
# the tables of docs/releases.md and README.md. make versions RELEASES="4.57.6 5.24.0": some of them.
RELEASES ?=

versions: $(INSTALLED)
	$(BIN)/python -m tests.tools.releases $(RELEASES)

# What follows from the processor: the suite with less of this one, other threads, and as a job in the
# background, a line of counts each. A few files: make machines TESTS=tests/modules/test_qformer.py;
# kernels in the interpreter: make machines TESTS="--device interpreter"
TESTS ?= tests

machines: $(INSTALLED)
	$(BIN)/python -m tests.tools.machines $(TESTS)

# Libraries that are not installed are left out; for xformers and Liger: pip install -e '.[bench]'.
bench: $(INSTALLED)
	$(BIN)/vlm-fast bench

bench-full: $(INSTALLED)
	$(BIN)/vlm-fast bench --full

# The site is built from the docstrings that the package has at run time.
DOCS_PACKAGES = $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')

docs: $(INSTALLED)
	$(PIP) $(DOCS_PACKAGES)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --strict

check: $(INSTALLED)
	$(BIN)/vlm-fast check

# No environment of its own: a GPU machine comes with its torch, perhaps without a network.
gpu:
	PYTHONPATH=. $(PYTHON) -m vlm_fast.benchmarks.gpu

# Host time of patched connectors against unpatched ones, without a GPU: torch's CUDA build (several
# GB) over libraries that compute nothing, pinned to one core. A part of it, at 17 us a launch:
# make host HOST="--only Q-Former --ns 17000"
HOST ?=
HOST_PIP := .venv-host/bin/pip install --quiet --disable-pip-version-check
STUBS := .venv-host/bin/python -m tests.tools.stub_libraries .venv-host/stub

host: .venv-host/installed
	taskset --cpu-list 1 $(STUBS) .venv-host/bin/python -m vlm_fast.benchmarks.host $(HOST)

# OpenFlamingo without what it depends on: one of its files is used.
.venv-host/installed: pyproject.toml tests/tools/stub_libraries.py $(wildcard csrc/launch* tests/support/stub_cuda/*)
	test -x .venv-host/bin/python || $(PYTHON) -m venv .venv-host
	$(HOST_PIP) -e '.[hf]' torch==2.14.1 transformers==5.17.0
	$(HOST_PIP) --no-deps open_flamingo==2.0.1 einops einops_exts
	$(STUBS)
	@touch $@

# The optional Hopper GEMMs: built (a minute and 4 GB a kernel, two at once; MAX_JOBS), and held to
# their registers. Of the wheel only the headers are wanted, none of its dependencies.
hopper: $(INSTALLED)
	$(PIP) --no-deps nvidia-cutlass
	VLM_FAST_CUTLASS=1 VLM_FAST_BUILD_EXT=0 $(BIN)/python setup.py build_ext --inplace
	$(BIN)/python -m vlm_fast.benchmarks.hopper

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-host .venv-triton-* .venv-transformers-* build dist site *.egg-info vlm_fast/_C*.so vlm_fast/_hopper*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	@case '$(TORCH)' in \
	cpu) $(MAKE) --no-print-directory torch-cpu ;; \
	cuda) echo "make: PyPI's torch, some 2.7 GB on Linux; TORCH=cpu chooses the small build" ;; \
	*) echo "make: TORCH is cpu or cuda, not '$(TORCH)'"; exit 2 ;; \
	esac
	$(PIP) -e '.[hf,dev]'
	@touch $@

$(OVERLAY)/installed: $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) \
	  triton==$(BUDGETS_TRITON)
	@touch $@

$(TRANSFORMERS:%=.venv-transformers-%/installed): .venv-transformers-%/installed: $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m tests.tools.releases --install $*

# The exact version: nothing can put the large build in its place.
torch-cpu:
	@echo "make: $(CPU_TORCH), as TORCH=cpu; with an NVIDIA GPU choose TORCH=cuda"
	@$(PIP) '$(CPU_TORCH)' 2>/dev/null || { \
	  echo "make: pip finds none in its own places, now it asks $(CPU_INDEX)"; \
	  $(PIP) --extra-index-url $(CPU_INDEX) '$(CPU_TORCH)'; } || { \
	  echo "make: no CPU build of torch was found; TORCH=cuda downloads PyPI's, some 2.7 GB"; \
	  exit 1; }
