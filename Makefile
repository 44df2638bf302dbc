# Every target works from a bare clone: the environment is made in .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PARALLEL := --numprocesses auto --dist worksteal
ATTACHED := tests/hosts tests/engine tests/policies tests/examples tests/demo tests/evals/tasks \
  tests/test_extending.py

.PHONY: setup demo test test-oldest test-newest test-native test-vllm check gpu bench bench-gpu bench-cpu

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) tests --ignore=tests/gpu --ignore=tests/vllm

# The tests of attached models, on the oldest transformers that pyproject.toml allows and on the newest of all packages.
test-oldest: .venv/oldest/.ready
	PYTHONPATH=$(CURDIR)/.venv/oldest OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ATTACHED)

test-newest: .venv/newest/.ready
	OMP_NUM_THREADS=1 .venv/newest/bin/python -m pytest $(PARALLEL) $(ATTACHED)

# Engines of vLLM on the CPU, in an environment of its own: 2.1 GB.
test-vllm: .venv/vllm/.ready
	.venv/vllm/bin/python -m pytest --numprocesses 2 --dist loadfile tests/vllm tests/hosts/vllm

# The CPU's kernels under gcc's sanitizers, for which Python is no leak.
test-native: $(READY)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest tests/ops/*/sanitized_native.py

# An older transformers takes older tokenizers and huggingface_hub along; all else is as in .venv.
.venv/oldest/.ready: $(READY)
	rm -rf .venv/oldest
	mkdir .venv/oldest
	grep -vE '^(transformers|tokenizers|huggingface_hub)=' constraints.txt > .venv/oldest/constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint .venv/oldest/constraints.txt \
	  --target .venv/oldest "$$(sed -n 's/.*"\(transformers\)>=\(.*\)".*/\1==\2/p' pyproject.toml)"
	touch $@

.venv/newest/.ready: pyproject.toml
	rm -rf .venv/newest
	$(PYTHON) -m venv .venv/newest
	.venv/newest/bin/python -m pip install --quiet --upgrade pip
	.venv/newest/bin/python -m pip install --quiet --no-compile --editable '.[plot]' --group dev
	touch $@

.venv/vllm/.ready: pyproject.toml constraints-vllm.txt
	rm -rf .venv/vllm
	$(PYTHON) -m venv .venv/vllm
	.venv/vllm/bin/python -m pip install --quiet --upgrade pip
	.venv/vllm/bin/python -m pip install --quiet --no-compile --no-deps --requirement constraints-vllm.txt
	.venv/vllm/bin/python -m pip install --quiet --no-compile --no-deps --editable .
	touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Needs a CUDA device and the packages in the Python that PYTHON names. Most of the time goes into compiling kernels,
# so processes share the device. pytest-benchmark, where installed, warns of processes: not wanted here.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -p no:benchmark --numprocesses 14 --dist worksteal tests/gpu

# On a CUDA device in the Python that PYTHON names, as gpu; without one in .venv on the CPU.
bench:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(MAKE) bench-gpu; else $(MAKE) bench-cpu; fi

bench-gpu:
	PYTHONPATH=src $(PYTHON) -c 'from seerattention.cli import main; main()' bench prefill

bench-cpu: $(READY)
	$(BIN)/seerattention bench prefill
