# Every goal makes the environment first: .venv, from pyproject.toml alone.
PYTHON3 ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test bench clean

help:
	@echo "make demo   prune ResNet-50 to 90 %, compile it, verify it, time it against ONNX Runtime"
	@echo "make test   lint, types, tests"
	@echo "make bench  the benchmarks in tests/benchmarks; JSON goes to build/benchmarks"
	@echo "make clean  remove .venv and everything that was built"

$(READY): pyproject.toml
	@echo "Making .venv; the first time downloads TVM and ONNX Runtime, some minutes"
	@$(PYTHON3) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(READY)
	@$(BIN)/python -m topiarist.compiler.demo --out demo

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist loadfile

bench: $(READY)
	@mkdir -p build/benchmarks
	@set -e; for name in $$(basename -s .py tests/benchmarks/bench_*.py); do \
		$(BIN)/python -m tests.benchmarks.$$name --json build/benchmarks/$$name.json; done

clean:
	rm -rf .venv build dist demo .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
