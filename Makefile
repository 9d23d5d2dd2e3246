# Two commands do everything: `make demo` trains the reference VAE on real digits, `make test` runs all checks.
# Each sets up its own virtual environment first, and both are safe to run again.

PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format check doctor clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# An isolated build would fetch a second, unpinned set of build tools; setuptools comes from the constraints instead.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# Threads that spin while they wait make steps this small ten times slower on a machine that does something else too.
demo: export OMP_WAIT_POLICY = PASSIVE
demo: $(READY)
	$(BIN)/python -m fused_elbo train --loss both --model mlp --epochs 5 --out $(RUNS)/demo-mlp --overwrite
	$(BIN)/python -m fused_elbo train --loss both --model conv --epochs 5 --out $(RUNS)/demo-conv --overwrite

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(READY)
	$(BIN)/python -m fused_elbo check

doctor: $(READY)
	$(BIN)/python -m fused_elbo doctor

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
