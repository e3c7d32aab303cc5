# Two commands on a fresh machine with Python 3.11+ and make: `make demo`, `make test`. Each installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# After installation nothing is looked up on the network.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-oldest test-cluster check architectures figures bench-peers bench-sweep bench-probe bench-record bench-attack bench-scale clean

demo: $(STAMP)
	$(BIN)/synapse demo --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto

# The tests that run models, with the oldest version of the model library that is supported, in an environment of its own.
# That version compiles functions as torch no longer likes: the warning is the library's, not the project's.
OLDEST := .venv-oldest
OLDEST_TESTS := tests/test_architecture_table.py tests/recording tests/test_study.py tests/attack tests/cli tests/demo \
	tests/model tests/perturb tests/probe tests/sweeping

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest --numprocesses auto -W 'ignore:`torch.jit:DeprecationWarning' $(OLDEST_TESTS)

# Workers killed, nodes taken away, items that poison: minutes, so not part of `make test`.
test-cluster: $(STAMP)
	$(BIN)/python -m pytest -m cluster tests/execute tests/test_scale_out_examples.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py tests/test_documents.py

# The page of architectures, made from the table of the tests.
architectures: $(STAMP)
	$(BIN)/python -W ignore tests/architecture_page.py

# The figures of the README, made from the demo.
figures: demo
	$(BIN)/synapse report runs/demo/cybersecurity --figures docs/figures

# The peers of the benchmarks, in an environment of their own, and what is measured against them (docs/benchmarks.md).
PEERS := .venv-peers

bench-peers: $(PEERS)/installed

bench-sweep: $(PEERS)/installed
	$(PEERS)/bin/python benchmarks/sweep.py --json runs/bench-sweep.json --markdown docs/benchmarks.md

bench-probe: $(PEERS)/installed
	$(PEERS)/bin/python benchmarks/probe.py --json runs/bench-probe.json --markdown docs/benchmarks.md

bench-record: $(PEERS)/installed
	$(PEERS)/bin/python benchmarks/record.py --json runs/bench-record.json --markdown docs/benchmarks.md

bench-attack: $(PEERS)/installed
	$(PEERS)/bin/python benchmarks/attack.py --json runs/bench-attack.json --markdown docs/benchmarks.md

bench-scale: $(PEERS)/installed
	$(PEERS)/bin/python benchmarks/scale.py --json runs/bench-scale.json --markdown docs/benchmarks.md

$(PEERS)/installed: pyproject.toml constraints.txt benchmarks/requirements.txt benchmarks/requirements-alone.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable . --requirement benchmarks/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement benchmarks/requirements-alone.txt
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST)/installed: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable . pytest pytest-xdist beartype
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(PEERS) runs .mypy_cache .ruff_cache .pytest_cache
