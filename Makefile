# The commands a person needs. Both `make demo` and `make test` create and fill .venv themselves.
# PYTHON chooses the interpreter (3.11 or later); the first installation compiles llama.cpp, which takes 5 to 15 minutes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# Public evaluation data, where it lies beside the project; tests that need it skip and say so without it.
ifneq ($(wildcard ../shared/data/README.md),)
export PERSONA_EDGE_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help install demo test lint bench clean

help:
	@echo "make demo   export the 16 MBTI personas for a 135M model on this machine, then ask base, INFP and ENTJ the same question"
	@echo "make test   lint, types and all tests"
	@echo "make lint   ruff and mypy only"
	@echo "make bench  side-by-side measurements, as ratios (benchmarks/)"
	@echo "make clean  remove .venv and build products; the model cache stays"

install: $(STAMP)

$(STAMP): Makefile pyproject.toml constraints.txt $(wildcard runtime/csrc/*)
	$(PYTHON) -c "import sys; sys.exit('persona-edge needs Python 3.11 or later; set PYTHON=...') if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo 'Installing into .venv; the first time, llama.cpp is compiled, which takes 5 to 15 minutes.'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[offline,eval,onnx,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/persona-edge export --model smollm2-135m --personas mbti16
	$(BIN)/persona-edge chat --model smollm2-135m --compare base,INFP,ENTJ --temperature 0 --max-tokens 60 \
		--message "How would you like to spend a free Saturday?"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	rm -f runtime/_kernels*.so runtime/_kernels*.pyd
