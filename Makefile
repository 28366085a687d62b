# One command per purpose; the first one that needs it makes .venv with plain pip, later runs need no network.
PYTHON ?= python3
QUICK ?= 0
HOST ?= 127.0.0.1
PORT ?= 8000
SUFFIX := $(if $(filter 1,$(QUICK)),-quick)
WORKDIR ?= work/demo$(SUFFIX)
BUNDLE ?= $(WORKDIR)/export/bundle
REFERENCE_WORKDIR ?= work/reference$(SUFFIX)
QUICK_FLAG := $(if $(filter 1,$(QUICK)),--quick)
# Passed to pip; on an ordinary Linux machine the parity environment is smaller with
#   PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# The pins are those of Python 3.11; a newer Python takes the ranges of pyproject.toml.
PINS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')

VENV := .venv
PARITY_VENV := .venv-parity
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
PARITY_READY := $(PARITY_VENV)/.ready

.PHONY: help install demo serve reference test check parity throughput bench ladder format clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo '  variables: QUICK=1 (small variant), WORKDIR=DIR, BUNDLE=DIR, HOST, PORT, PYTHON, PIP_ARGS'

install: $(READY)  ## makes .venv and nothing else; every other target does it too

demo: $(READY)  ## data to trained models to a served search, and how good each stage is
	$(RUN) -m train.demo --config configs/demo/pipeline.py --workdir $(WORKDIR) $(QUICK_FLAG)

serve: $(READY)  ## serves the bundle that `make demo` made
	$(RUN) -m serve.main --bundle $(BUNDLE) --host $(HOST) --port $(PORT)

reference: $(READY)  ## the real recipe; its table is docs/results/reference
	$(RUN) -m train.demo --config configs/reference/pipeline.py --workdir $(REFERENCE_WORKDIR) $(QUICK_FLAG)

test: $(READY)  ## every test that needs no other implementation to compare with
	$(RUN) -m pytest -n 2 --dist loadfile

check: $(READY)  ## format, lint, types, import floors and budgets
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/basedpyright
	$(RUN) -m pytest tests/test_imports.py

parity: $(PARITY_READY)  ## the networks against torch and transformers, in an environment of their own
	$(PARITY_VENV)/bin/python -m pytest -o addopts='-q --strict-markers' tests/parity

throughput: $(PARITY_READY)  ## training steps beside torch's; the table is docs/results/throughput
	$(PARITY_VENV)/bin/python -m train.throughput --config configs/throughput.py --workdir work/throughput $(QUICK_FLAG)

bench: $(PARITY_READY)  ## scoring beside torch's; the table is docs/results/bench
	$(PARITY_VENV)/bin/python -m train.bench --config configs/bench.py --workdir work/bench $(QUICK_FLAG)

ladder: $(PARITY_READY)  ## the demo's ranker run in every way, quality and speed of each
	$(PARITY_VENV)/bin/python -m train.ladder --config configs/ladder.py --workdir work/ladder $(QUICK_FLAG)

format: $(READY)  ## applies what `make check` asks of the form
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:  ## removes the environments; the cache and the work directories stay
	rm -rf $(VENV) $(PARITY_VENV)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade 'pip>=25.1'  # resumes broken downloads
	@echo "installing into $(VENV)"
	$(VENV)/bin/python -m pip install -q $(PIP_ARGS) $(PINS) -e '.[all,dev]'
	touch $@

$(PARITY_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PARITY_VENV)
	@echo "installing into $(PARITY_VENV), torch with it"
	$(PARITY_VENV)/bin/python -m pip install -q $(PIP_ARGS) $(PINS) -e '.[all,dev,parity]'
	touch $@
