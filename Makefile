# On a machine with git, make and Python >= 3.11, `make demo` and `make test` need nothing else: uv comes into .tools, the
# locked packages into .venv.
SHELL := /bin/bash
UV := .tools/bin/uv
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false
export PYTHONDONTWRITEBYTECODE :=  # what is set here for all would have each of the hundreds of processes compile torch anew

.PHONY: demo test browser coverage check lock
demo: .venv/ready
	$(BIN)/python scripts/demo.py

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

browser:  # Chromium and what drives it, for the tests of pages, which are skipped without; as root, with Debian's packages and npm
	command -v chromium || (apt-get update -qq && apt-get install -yqq --no-install-recommends chromium)
	npm install --no-save --no-audit --no-fund --loglevel error playwright-core axe-core

coverage: .venv/ready  # the same, a quarter slower, with the lines that no test runs; fails below the share in pyproject.toml
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --cov --cov-report term

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lock: $(UV)
	$(UV) lock

.venv/ready: $(UV) pyproject.toml uv.lock
	$(UV) sync --frozen --all-extras --no-extra quantization
	$(UV) export --frozen --quiet --extra quantization --no-hashes --no-emit-project | grep ^bitsandbytes \
	  | $(UV) pip install --quiet --no-deps --target .venv/quantization -r -  # apart: tests/train/test_quantization.py says why
	touch $@

$(UV):
	python3 -m venv .tools
	.tools/bin/python -m pip install --quiet uv
