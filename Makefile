# `make demo` and `make test` do all the set-up on a machine with nothing but Python 3.10 to 3.13 and a network to PyPI.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.anomalib-pack-installed

.PHONY: demo test lint format clean

demo: $(READY)
	$(BIN)/anomalib train --config configs/demo.yaml
	@echo
	@echo "Heat maps: results/Ulsad/SyntheticLoco/tray/latest/images/ (folders good, logical_anomalies, structural_anomalies)"

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) results build dist

# Anew whenever the requirements change. constraints.txt pins what the tests ran on.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)
