# Every target makes what it needs: a virtual environment in .venv, the package and its extras.
PYTHON ?= python3
VENV ?= .venv
# torch's own index has wheels without CUDA (about 200 MB instead of several GB). Where it cannot be reached, pip's
# configured indexes are used. For a CUDA build: make test TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# The interpreter tests were checked with this one; 3.9's refuses masks that 3.6 takes. A CUDA build of torch brings its
# own: make test TORCH_INDEX=... TRITON=triton
TRITON ?= triton==3.6.0
# SGLang has a virtual environment of its own, because it pins other versions; without its dependencies, most of which are
# for CUDA. Its tests: make test-sglang
SGLANG_VENV ?= .venv-sglang
SGLANG ?= sglang==0.5.23
SGLANG_NO_DEPS := torchvision==0.28.0 triton==3.6.0 apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 xgrammar==0.2.7
# arguments of `mac-kernels demo`, e.g. make demo ARGS="--preset fast --tokens 800"
ARGS ?=

QUIET := --quiet --no-compile --disable-pip-version-check
RUN := $(VENV)/bin/python -m
PACKAGES := mac_kernels integrations autotune tests benchmarks

.PHONY: help setup test test-fast test-sglang demo format lint types figures clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.dev  ## make .venv and install the package with the extras demo, dev and tune

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# bytecode is compiled when a module is first imported: most of what is installed never is
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(RUN) pip install $(QUIET) --upgrade pip
	$(RUN) pip install $(QUIET) --retries 0 --timeout 10 --index-url $(TORCH_INDEX) "$(TORCH)" \
		|| $(RUN) pip install $(QUIET) "$(TORCH)"
	$(RUN) pip install $(QUIET) --editable ".[demo]" "$(TRITON); sys_platform == 'linux'"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(RUN) pip install $(QUIET) --editable ".[demo,dev,tune]"
	@touch $@

# the interpreter replaces Triton for a whole process, so that kernels that are interpreted have a run of their own
test: setup  ## everything that needs no GPU
	$(RUN) pytest -n auto
	TRITON_INTERPRET=1 $(RUN) pytest -n auto -m "not gpu" tests/kernels

test-fast: setup  ## without the tests marked slow
	$(RUN) pytest -n auto -m "not slow"

$(SGLANG_VENV)/.done: tests/integration/sglang-requirements.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install $(QUIET) --upgrade pip
	$(SGLANG_VENV)/bin/pip install $(QUIET) --retries 0 --timeout 10 --index-url $(TORCH_INDEX) "$(TORCH)" \
		|| $(SGLANG_VENV)/bin/pip install $(QUIET) "$(TORCH)"
	$(SGLANG_VENV)/bin/pip install $(QUIET) --no-deps $(SGLANG_NO_DEPS) "$(SGLANG)"
	$(SGLANG_VENV)/bin/pip install $(QUIET) -r tests/integration/sglang-requirements.txt
	$(SGLANG_VENV)/bin/pip install $(QUIET) --no-deps --editable .
	@touch $@

test-sglang: $(SGLANG_VENV)/.done  ## the tests with a real SGLang server on the CPU
	$(SGLANG_VENV)/bin/python -m pytest tests/integration/test_sglang_*.py

demo: $(VENV)/.demo  ## full attention and MAC on the same text, on this machine's CPU
	$(VENV)/bin/mac-kernels demo $(ARGS)

lint: setup  ## ruff: rules and format
	$(RUN) ruff check $(PACKAGES)
	$(RUN) ruff format --check $(PACKAGES)

format: setup  ## rewrite in the house format
	$(RUN) ruff check --fix $(PACKAGES)
	$(RUN) ruff format $(PACKAGES)

types: setup  ## mypy, strict
	$(RUN) mypy

figures: setup  ## redraw the README's figures from the committed results
	$(RUN) benchmarks.plot

clean:  ## remove the virtual environment and the caches
	rm -rf $(VENV) $(SGLANG_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
