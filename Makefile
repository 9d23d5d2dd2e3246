# Two commands do everything: `make demo` trains the reference VAE on real digits, `make test` runs all checks.
# Each sets up its own virtual environment first, and both are safe to run again.

PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# STRICT=--strict: a compiler's warning is an error.
STRICT ?=
BUILD := $(BIN)/python csrc/build.py $(STRICT)
# Of what PyTorch does around the operations nothing depends on the instruction set.
ELSEWHERE := native_library native_codegen compile operators func amp
NATIVE_TESTS := FUSED_ELBO_REQUIRE_BACKENDS=native $(BIN)/python -m pytest -n auto -k native $(ELSEWHERE:%=--ignore tests/test_%.py)
CXX_SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu tests/ptx/*.cpp)

.PHONY: demo test codegen instruction-sets ptx cpu-library build wheel sanitize lint docs format check doctor bench microbench gpu clean

# The libraries are built by rules of their own.
$(READY): export FUSED_ELBO_BUILD = 0
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# An isolated build would fetch a second, unpinned set of build tools; setuptools comes from the constraints instead.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# What everything here runs on. Takes no time where it is current.
cpu-library: $(READY)
	$(BUILD) --only cpu

# The CPU library and, with nvcc, the CUDA library.
build: $(READY)
	$(BUILD)

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

# Threads that spin while they wait make steps this small ten times slower on a machine that does something else too.
demo: export OMP_WAIT_POLICY = PASSIVE
demo: cpu-library
	$(BIN)/python -m fused_elbo train --loss both --model mlp --epochs 5 --out $(RUNS)/demo-mlp --overwrite
	$(BIN)/python -m fused_elbo train --loss both --model conv --epochs 5 --out $(RUNS)/demo-conv --overwrite

# Tests whose Triton kernels run as they are compiled, in place of interpreted; so do the others by `make ptx`.
COMPILED := $(addprefix tests/test_,latent.py nll.py elbo.py)
SPACE := $(subst ,, )

test: export OMP_NUM_THREADS = 1
test: lint docs cpu-library
	$(BIN)/python -m pytest -n auto -k "not (triton and ($(subst $(SPACE), or ,$(notdir $(COMPILED)))))"
	$(MAKE) instruction-sets
	$(MAKE) ptx PTX="tests/test_ptx.py $(COMPILED)"

# The kernels as they are compiled for a GPU, run without one by the machine for PTX in tests/ptx; the CUDA library's where nvcc has built it.
PTX ?= tests
ptx: export OMP_NUM_THREADS = 1
ptx: $(READY)
	backends=$$($(BIN)/python -c "import importlib.util as u; print('triton' * bool(u.find_spec('triton')))") || exit 1; \
	for backend in $$backends $(if $(wildcard build/objects/cuda/*.o),native); do \
	  FUSED_ELBO_PTX=$$backend FUSED_ELBO_REQUIRE_BACKENDS=$$backend $(BIN)/python -m pytest -n auto -q -k "$$backend or ptx" $(PTX) || exit 1; done

# The native backend's tests on the instruction sets of this processor that are not its best.
instruction-sets: cpu-library
	sets=$$($(BIN)/python -c "from fused_elbo.backends import native; print(*native.supported()[1:])") || exit 1; \
	for set in $$sets; do \
	  echo "FUSED_ELBO_CPU=$$set"; FUSED_ELBO_CPU=$$set $(NATIVE_TESTS) -q || exit 1; done

# The same tests on a CPU library that watches its memory and its arithmetic. Leaks are not looked for: Python's would drown ours.
sanitize: export OMP_NUM_THREADS = 1
sanitize: cpu-library
	$(BUILD) --sanitize
	sets=$$($(BIN)/python -c "from fused_elbo.backends import native; print(*native.supported())") || exit 1; \
	[ -n "$$sets" ] || { echo "no CPU library: python -m fused_elbo doctor says why"; exit 1; }; \
	for set in $$sets; do \
	  echo "FUSED_ELBO_CPU=$$set"; FUSED_ELBO_CPU=$$set FUSED_ELBO_LIB=$(CURDIR)/build/sanitize ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libubsan.so) $(NATIVE_TESTS) -q || exit 1; done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Every kernel's machine code beside its budget (fused_elbo/codegen/budgets.py); `make test` holds it to the same table.
codegen: build
	$(BIN)/python -m fused_elbo.codegen

check: cpu-library
	$(BIN)/python -m fused_elbo check

# The notice is that of a successor to mkdocs-material, which reads the same file.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY)
	$(BIN)/mkdocs build --quiet --strict

doctor: cpu-library
	$(BIN)/python -m fused_elbo doctor

# BENCH=--quick, or any other options of the command.
bench: build
	mkdir -p $(RUNS)
	$(BIN)/python -m fused_elbo bench --json $(RUNS)/bench.json --markdown $(RUNS)/bench.md --plot $(RUNS)/bench $(BENCH)

# Stored in .benchmarks, and compared with the last run that was.
microbench: build
	$(BIN)/python -m pytest benchmarks --benchmark-autosave $(if $(wildcard .benchmarks/*/*.json),--benchmark-compare)

# All that a GPU can show, what would fail first in front: kernels under compute-sanitizer, the tests, the benchmark, into RUNS.
gpu: export FUSED_ELBO_REQUIRE_BACKENDS = native triton
gpu: build
	mkdir -p $(RUNS)
	$(BIN)/python -m fused_elbo doctor
	# Time on a GPU is dear: what fails early takes nothing away from what comes later.
	rm -f $(RUNS)/gpu-failed
	$(BIN)/python -m pytest tests/test_cuda.py || touch $(RUNS)/gpu-failed
	# By itself it does not fail for what it finds; and a call of CUDA's that fails may be a try of torch's.
	if command -v compute-sanitizer; then for tool in "memcheck --report-api-errors no" racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	  $(BIN)/python -m benchmarks.every_kernel || touch $(RUNS)/gpu-failed; done; \
	else echo "compute-sanitizer is not in PATH: nobody watches the kernels"; fi
	# What ran first takes some 12 GiB a test, which not every GPU has for all processors at once.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --ignore tests/test_cuda.py || touch $(RUNS)/gpu-failed
	$(MAKE) bench
	test ! -e $(RUNS)/gpu-failed

clean:
	rm -rf $(VENV) build dist fused_elbo/lib .pytest_cache .ruff_cache .hypothesis *.egg-info
