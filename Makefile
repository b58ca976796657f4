# Everything runs in .venv beside this file. `make` alone explains the targets.

PYTHON      ?= python3
TORCH_INDEX ?=
MODEL       ?=
SEED        ?= 42
PYTEST_ARGS ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# What .venv was made with stays until EXTRAS says otherwise, so that a plain `make test` keeps faiss-gpu.
DEFAULT_EXTRAS := cpu,dev
EXTRAS ?= $(or $(shell sed -n 2p $(STAMP) 2>/dev/null),$(DEFAULT_EXTRAS))

# The environment is current if these are what they were when it was installed: the two files and the folder's place.
FINGERPRINT = $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-') $(CURDIR)

# Tests use two processes of one thread each and never ask a hub.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=disabled

.DEFAULT_GOAL := help
.PHONY: help venv install demo ask test drills bench format lint clean

help:
	@echo "make demo    the whole job on examples/faq_zh: prepare, mine, train, merge, evaluate (first makes .venv)"
	@echo "make ask     type a question, see the top five before and after training (after make demo)"
	@echo "make test    ruff, mypy and the test suite; needs no network once .venv is made"
	@echo "make drills  the long tests: many kills, large files"
	@echo "make bench   the CMRC 2018 benchmark (benchmarks/README.md)"
	@echo "make format  rewrite the code in the project's style"
	@echo "make lint    ruff and mypy alone"
	@echo "make venv    make or renew .venv; it is renewed only if pyproject.toml or constraints.txt changed"
	@echo "make clean   remove outputs/demo and caches; .venv and the fetched encoder stay"
	@echo
	@echo "Variables (make demo MODEL=BAAI/bge-small-zh-v1.5):"
	@echo "  PYTHON=$(PYTHON)    a Python of 3.11 or newer, used to make .venv"
	@echo "  TORCH_INDEX=$(TORCH_INDEX)       URL of a package index with torch builds for CPU only; used for torch alone"
	@echo "  EXTRAS=$(EXTRAS)    EXTRAS=gpu,dev for faiss on NVIDIA GPUs; never cpu and gpu at once"
	@echo "  MODEL=$(MODEL)             the demo's encoder, a hub name or a folder; empty: the small one from PyPI"
	@echo "  SEED=$(SEED)            the demo's seed"
	@echo "  PYTEST_ARGS=$(PYTEST_ARGS)       more arguments for pytest, for example '-k loss -x'"

venv:
	@if [ ! -x $(BIN)/python ] || [ "$$(cat $(STAMP) 2>/dev/null)" != "$$(printf '%s\n' "$(FINGERPRINT)" "$(EXTRAS)")" ]; \
	then $(MAKE) --no-print-directory install; fi

# torch comes first and alone, so that TORCH_INDEX need not serve anything else; what torch depends on follows with
# the second line. faiss-cpu and faiss-gpu write into the same folder: going from one to the other removes both first.
install:
	@case ",$(EXTRAS),,$(EXTRAS)," in *,cpu,*,gpu,*) \
	    echo "error: EXTRAS=$(EXTRAS): faiss-cpu and faiss-gpu overwrite each other; name one of cpu and gpu" >&2; \
	    exit 2;; esac
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "error: PYTHON=$(PYTHON): not found; name a Python of 3.11 or newer: make venv PYTHON=/path/to/python3.11" >&2; \
	    exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: PYTHON=$(PYTHON) is $$("$(PYTHON)" -V 2>&1), but 3.11 or newer is needed:" \
	         "make venv PYTHON=/path/to/python3.11" >&2; \
	    exit 2; }
	@rm -f $(STAMP)
	@[ -x $(BIN)/python ] || { rm -rf $(VENV); \
	    "$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 \
	    || { "$(PYTHON)" -m venv --clear --without-pip $(VENV) \
	         && "$(PYTHON)" -m pip --python $(BIN)/python install --quiet pip; } \
	    || { rm -rf $(VENV); \
	         echo "error: $(PYTHON) cannot make $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	         exit 2; }; }
	@for faiss in cpu gpu; do \
	    case ",$(EXTRAS)," in *,$$faiss,*) ;; *) \
	        if [ -n "$$(echo $(VENV)/lib/python3*/site-packages/faiss_$$faiss-*.dist-info | grep -v '\*')" ]; then \
	            $(BIN)/python -m pip uninstall --quiet --yes faiss-cpu faiss-gpu; fi;; esac; done
	@echo "installing into $(VENV): torch ..."
	@$(BIN)/python -m pip install --no-deps -c constraints.txt $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch
	@echo "installing into $(VENV): .[$(EXTRAS)] ..."
	@$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	@printf '%s\n' "$(FINGERPRINT)" "$(EXTRAS)" > $(STAMP)

demo: venv
	@$(BIN)/python examples/demo.py --seed $(SEED) $(if $(MODEL),--model "$(MODEL)")

ask: venv
	@$(BIN)/python examples/ask.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

drills: venv
	$(TEST_ENV) $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

bench: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/cmrc.sh

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf outputs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
