# Every target makes the environment it needs in .venv; PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A process a core, each with one thread: the tensors are small. They are tests of the CPU's ways.
PARALLEL = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: quickstart test test-launch test-kernels test-export test-timm test-slow test-gpu check bench bench-gpu report clean

quickstart: $(READY)  ## train on scikit-learn's digits, then compare the nano backbones on them
	$(BIN)/python train_imagenet.py --config quickstart
	$(BIN)/python -m metala_vision compare compare/quickstart --seconds 1

test: $(READY)  ## the fast tests
	$(PARALLEL) -m "not slow and not launch and not export and not gpu and not interpreter and not aot"

test-launch: $(READY)  ## runs under torchrun and accelerate, killed and resumed
	$(PARALLEL) -m "launch and not slow"

test-kernels: $(READY)  ## the Triton kernels without a GPU: interpreted, and compiled for GPUs
	TRITON_INTERPRET=1 $(PARALLEL) tests/kernels -m "interpreter and not slow"
	$(PARALLEL) tests/kernels -m "aot and not slow"

test-export: $(READY)  ## the smallest model through AOTInductor and ONNX
	$(PARALLEL) -m "export and not slow"

test-timm: $(READY)  ## timm's own model tests over our models; FILTER names fewer
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.timm_suite $(if $(FILTER),'$(FILTER)') -n auto --maxprocesses 8

test-slow: $(READY)  ## all tests that need no GPU
	$(PARALLEL) -m "not gpu and not interpreter"
	TRITON_INTERPRET=1 $(PARALLEL) tests/kernels -m interpreter

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

check: $(READY)  ## formatting, lint and types; edits nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

bench: $(READY)  ## timings on this machine: the operator, then whole models
	$(BIN)/python benchmarks/operator_cpu.py
	$(BIN)/python benchmarks/models_cpu.py

MINUTES ?= 30
bench-gpu: $(READY)  ## tests, sanitizer and benchmarks on a GPU within MINUTES, into runs/gpu
	$(BIN)/python benchmarks/gpu.py --out runs/gpu --minutes $(MINUTES)

report: $(READY)  ## the README's tables and pictures from benchmarks/results/
	$(BIN)/python benchmarks/report.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python 3.10 or newer is needed, {sys.executable} is {v.major}.{v.minor}; name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# Of torch's modules few are ever imported, and compiled then: half a minute less.
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove the environment
	rm -rf $(VENV)
