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
	@echo "make demo   ask a 135M model and its INFP and ENTJ the same question, then find two personas on this machine and ask those"
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

ASK := $(BIN)/persona-edge chat --model smollm2-135m --temperature 0 --max-tokens 60 \
	--message "How would you like to spend a free Saturday?"

demo: $(STAMP)
	$(ASK) --compare base,INFP,ENTJ
	@echo 'That was the pack that ships. Now E and I are found from nothing, some 15 minutes; all 16 (--personas mbti16) take 70.'
	$(BIN)/persona-edge export --model smollm2-135m --personas mbti-ei
	$(ASK) --compare base,E,I

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
