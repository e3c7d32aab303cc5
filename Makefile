# Two commands on a fresh machine with Python 3.11+ and make: `make demo`, `make test`. Each installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# After installation nothing is looked up on the network.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check figures clean

demo: $(STAMP)
	$(BIN)/synapse demo --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py tests/test_documents.py

# The figures of the README, made from the demo.
figures: demo
	$(BIN)/synapse report runs/demo/cybersecurity --figures docs/figures

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
