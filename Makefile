# On a fresh clone `make demo` and `make test` need nothing but Python: they build the virtual environment themselves.
#
#   make demo ARGS="--json demo.json"    further arguments of `compressm demo`
#   make test ARGS="-m slow"             further arguments of pytest; of `make distributions` too
#   make test PYTHON=python3.12 VENV=/tmp/venv312

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
KILLS  ?= 50
MINUTES ?= 30
FUZZ_JSON ?= results/fuzz.json
TRITON_JSON ?= results/triton.json
PACKAGE ?= theory
SAMPLE  ?= 200
TESTS   ?=

BIN := $(VENV)/bin
# The pins of constraints.txt hold for Python 3.11 and later; on 3.10 the ranges of pyproject.toml decide alone.
PINS = $$($(BIN)/python -c 'import sys; print("constraints.txt" if sys.version_info >= (3, 11) else "/dev/null")')
# pip compiles 24,000 files one after the other, a third of the time that it takes. All cores compile them afterwards, without
# the packages' own tests; what fails is a template for another Python and is never imported.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile -c $(PINS)
COMPILE = $(BIN)/python -m compileall -qq -j 0 -x 'site-packages/.*/tests/'
# Triton lies in a folder beside the environment's own packages, so that nothing but `make triton` finds it.
WITH_TRITON = PYTHONPATH=$(abspath $(VENV))/triton TRITON_CACHE_DIR=$(abspath $(VENV))/triton-cache OMP_NUM_THREADS=1

.PHONY: help demo test test-faults fuzz mutants triton distributions lint format types docs pages check-pages snippets clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' Makefile | expand -t 16

demo: $(VENV)/.installed-train  ## compress a small model while it trains; the picture is demo.png
	$(BIN)/compressm demo $(ARGS)

test: $(VENV)/.installed-dev  ## run the tests that need neither a GPU nor patience
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-faults: $(VENV)/.installed-dev  ## kill, fill, flip and cut off: KILLS=50 kills; the table goes to results/faults.json
	KILLS=$(KILLS) FAULTS_JSON=results/faults.json OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -n 2 -m "slow or not slow"

fuzz: $(VENV)/.installed-dev  ## fuzz the readers of checkpoints, configurations and arguments: MINUTES=30
	$(INSTALL) -e .[fuzz]
	$(BIN)/python tests/fuzz/loaders.py --minutes $(MINUTES) $(if $(FUZZ_JSON),--json $(FUZZ_JSON))

mutants: $(VENV)/.installed-dev  ## which mistakes do tests notice: PACKAGE=theory SAMPLE=200, results in results/mutants.json
	$(INSTALL) -e .[mutants]
	$(BIN)/python scripts/mutants.py $(PACKAGE) --sample $(SAMPLE) $(if $(TESTS),--tests $(TESTS)) $(ARGS)

distributions: $(VENV)/.installed-dev  ## build sdist and wheel, compare and install them, run tests of the unpacked sdist
	$(BIN)/python scripts/distributions.py $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## ruff: mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev  ## pyright over src/
	$(BIN)/pyright --pythonpath $(BIN)/python

triton: $(VENV)/.installed-dev $(VENV)/.triton  ## without a GPU: interpret the Triton kernels, and compile them for 8.0, 9.0 and 10.0
	$(WITH_TRITON) $(BIN)/python -c 'import triton; print("Triton", triton.__version__)'
	TRITON_JSON=$(abspath $(TRITON_JSON)) $(WITH_TRITON) $(BIN)/python -m pytest tests/scans/test_triton.py -m "slow and not gpu"

docs: $(VENV)/.installed-dev  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pages: $(VENV)/.installed-dev  ## rebuild the pages that are generated from stored results
	$(BIN)/python scripts/pages.py

check-pages: $(VENV)/.installed-dev  ## rebuild those pages in a temporary folder, and show where they differ
	$(BIN)/python scripts/pages.py --check

snippets: $(VENV)/.installed-dev  ## run the Python blocks of README and documentation
	$(BIN)/python scripts/run_snippets.py README.md docs/*.md

clean:  ## remove the virtual environment, caches and build products
	rm -rf .venv site dist build .pytest_cache .ruff_cache .hypothesis demo.png demo.json
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files: a second call installs nothing unless the pins or pyproject.toml have changed.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 10) <= v < (3, 14) or sys.exit("compressm needs Python 3.10 to 3.13, and this is %d.%d: call make with PYTHON=python3.11, say" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

$(VENV)/.installed-train: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[train]"
	@$(COMPILE) $(VENV)/lib || true
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[dev]"
	@$(COMPILE) $(VENV)/lib || true
	@touch $@ $(VENV)/.installed-train

$(VENV)/.triton: $(VENV)/.torch
	rm -rf $(VENV)/triton
	$(INSTALL) --no-deps --target $(VENV)/triton triton
	@$(COMPILE) $(VENV)/triton || true
	@touch $@
