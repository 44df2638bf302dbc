# Every target works from a bare clone: the environment is made in .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test check gpu bench bench-gpu bench-cpu

setup: $(READY)

# Python compiles what is imported; compiling all that comes along at once would take half a minute more.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[plot]' --group dev
	touch $(READY)

# The whole method in minutes, without a GPU: distil gates, compare methods, draw pictures. DEMO holds options.
demo: $(READY)
	$(BIN)/seerattention demo $(DEMO)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal tests --ignore=tests/gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Needs a CUDA device and the packages in the Python that PYTHON names.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest tests/gpu

# On a CUDA device in the Python that PYTHON names, as gpu; without one in .venv on the CPU.
bench:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(MAKE) bench-gpu; else $(MAKE) bench-cpu; fi

bench-gpu:
	PYTHONPATH=src $(PYTHON) -c 'from seerattention.cli import main; main()' bench prefill

bench-cpu: $(READY)
	$(BIN)/seerattention bench prefill
