# openset-serve. Targets stand in the order of the data flow; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python

PROTOCOL ?= glyphs
LOSS     ?= cos_eos
PRESET   ?=
SEED     ?= 42
PORT     ?= 8000
COMPOSE  ?= docker compose --project-name openset-serve
DEVICE   ?=
PRECISION ?=

# Optional settings become arguments only where they are given.
flag = $(if $($(1)),$(2) $(if $(3),$(3),$($(1))))
# The grid is not for the default protocol, unless that was asked for.
chosen-protocol = $(if $(filter file,$(origin PROTOCOL)),,$(PROTOCOL))
# What cures and recommend, which train arms side by side, both take.
arm-flags = --protocol $(PROTOCOL) $(call flag,EPOCHS,--epochs) $(call flag,DATA,--data) $(call flag,DIGITS,--digits) $(call flag,SIZE,--size) $(call flag,IMAGE_SIZE,--image-size) \
  $(call flag,PER_CLASS,--per-class) $(if $(ALLOW_MISSING_CLASSES),--allow-missing-classes) $(call flag,SEEDS,--seeds) $(call flag,DEVICE,--device) $(call flag,JSON,--json) \
  $(foreach option,$(OPTIONS),--option $(option))
need = $(if $($(1)),,$(error $@ needs $(1)=..., e.g. make $@ $(1)=$(2)))

.PHONY: help install lock demo train evaluate export calibrate archive serve bench shortcut compare-losses cures recommend reproduce report up up-gpu down test lint types chaos clean

help: ## list the targets, each with the variables that it takes; those in brackets may be left out
	@awk -F':.*## ' '/^[a-z-]+:.*## /{n = split($$2, part, " [|] "); printf "  \033[1m%-15s\033[0m %s\n", $$1, part[1]; \
	  if (n > 1) printf "  %-15s   %s\n", "", part[2]}' $(MAKEFILE_LIST)

# -- set-up ---------------------------------------------------------------------------------------------------------

install: $(VENV)/installed ## .venv with the locked packages (about 6 GB; minutes on a slow line, repeatable)

$(VENV)/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "openset-serve needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing). Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "installing the locked packages into $(VENV) (torch with CUDA is most of it, about 6 GB on disk) ..."
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	@$(VENV)/bin/uv pip sync --quiet --compile-bytecode --python $(PY) requirements.lock
	@touch $@ && echo "installed: $(VENV)"

lock: ## renew requirements.lock from pyproject.toml
	@test -x $(VENV)/bin/uv || { $(PYTHON) -m venv $(VENV) && $(PY) -m pip install --quiet uv; }
	@$(VENV)/bin/uv pip compile --quiet --upgrade --all-extras --universal --no-header --no-emit-index-url --no-annotate pyproject.toml -o requirements.lock

# -- try it -----------------------------------------------------------------------------------------------------------

demo: install ## train glyphs, serve it, show a known and an unknown image (KEEP=1 leaves it running) | [PORT=8000 KEEP=1]
	@$(PY) -m serving.demo --port $(PORT) $(if $(KEEP),--keep)

# Training keeps the memory it frees, for its next step: on a CPU fresh pages cost time (benchmarks/allocator.py). glibc's names.
train compare-losses cures recommend reproduce: export MALLOC_MMAP_MAX_ ?= 0
train compare-losses cures recommend reproduce: export MALLOC_TRIM_THRESHOLD_ ?= 1099511627776

# -- from data to model -----------------------------------------------------------------------------------------------

train: install ## train a model: runs/<name>/; OPTIONS there are: python -m training.train --list-options | PROTOCOL= (folders: own classes in DATA=) LOSS= [DATA= EPOCHS= SEED= PRESET= OPTIONS="k=v ..." IMAGE_SIZE= DIGITS= NAME= DEVICE= PRECISION= WORKERS= CACHE=folder|none GPUS=n]
	@$(PY) $(if $(GPUS),-m torch.distributed.run --standalone --nproc-per-node $(GPUS)) -m training.train --protocol $(PROTOCOL) --loss $(LOSS) --seed $(SEED) $(call flag,PRESET,--preset) \
	  $(call flag,DATA,--data) $(call flag,EPOCHS,--epochs) $(call flag,IMAGE_SIZE,--image-size) $(call flag,DIGITS,--digits) \
	  $(call flag,NAME,--name) $(call flag,DEVICE,--device) $(call flag,PRECISION,--precision) $(call flag,WORKERS,--workers) \
	  $(call flag,CACHE,--cache) $(foreach option,$(OPTIONS),--option $(option))

evaluate: install ## report.json, table, figures; DIGITS of toy: test with those of the other source | RUN=runs/<name> [SCORES= DIGITS= DEVICE= PRECISION=]
	$(call need,RUN,runs/glyphs-cos_eos)
	@$(PY) -m training.evaluate --run $(RUN) $(call flag,SCORES,--scores) $(call flag,DIGITS,--digits) $(call flag,DEVICE,--device) $(call flag,PRECISION,--precision)

export: install ## artifact with weights, model card, calibration scores and a factory threshold | RUN= [FPR= CONFIDENCE= NAME= SCORES= DEVICE= PRECISION=]
	$(call need,RUN,runs/glyphs-cos_eos)
	@$(PY) -m training.export --run $(RUN) $(call flag,FPR,--fpr) $(call flag,CONFIDENCE,--confidence) $(call flag,NAME,--name) $(call flag,SCORES,--scores) $(call flag,DEVICE,--device) $(call flag,PRECISION,--precision)

calibrate: install ## scores of one more serving path | RUN= [DEVICE= PRECISION= COMPILED=1]
	$(call need,RUN,runs/glyphs-cos_eos)
	@$(PY) -m training.calibrate --run $(RUN) $(call flag,DEVICE,--device) $(call flag,PRECISION,--precision) $(if $(COMPILED),--compiled)

archive: install ## model_store/<name>.mar | RUN= [NAME=]
	$(call need,RUN,runs/glyphs-cos_eos)
	@$(PY) -m serving.archive --artifact $(RUN)/artifact --name $(or $(NAME),$(notdir $(patsubst %/,%,$(RUN))))

shortcut: install ## can foreign images be told by a histogram of values? If so, a CCR on these data says little | [PROTOCOL= DATA= DIGITS= IMAGE_SIZE= PER_CLASS= WORKERS= JSON= FIGURE=]
	@$(PY) -m training.shortcut --protocol $(PROTOCOL) $(call flag,DATA,--data) $(call flag,DIGITS,--digits) $(call flag,IMAGE_SIZE,--image-size) $(call flag,PER_CLASS,--per-class) $(call flag,WORKERS,--workers) \
	  $(call flag,JSON,--json) $(call flag,FIGURE,--figure)

compare-losses: install ## all twenty losses, one epoch each on glyphs, one table of CCR@FPR | [PROTOCOL= DATA= EPOCHS= LOSSES=a,b SIZE= JSON=]
	@$(PY) -m training.compare_losses --protocol $(PROTOCOL) $(call flag,DATA,--data) $(call flag,EPOCHS,--epochs) $(call flag,LOSSES,--losses) \
	  $(call flag,SIZE,--size) $(call flag,JSON,--json)

cures: install ## variants side by side | CURE=arc_os|arc_os_stress|scale|feature_dim|background|preset|margin|magnitude_weight|turned_negatives|composed_negatives [PROTOCOL= EPOCHS= DATA= DIGITS= SIZE= IMAGE_SIZE= PER_CLASS= ALLOW_MISSING_CLASSES=1 SEEDS=1,2|2-3 OPTIONS="k=v ..." DEVICE= JSON=]
	$(call need,CURE,scale)
	@$(PY) -m training.cures --cure $(CURE) $(arm-flags)

recommend: install ## choose the recommended loss, preset and score without the test | PROTOCOL= [DATA= EPOCHS= SEEDS=1,2|2-3 DIGITS= SIZE= IMAGE_SIZE= PER_CLASS= ALLOW_MISSING_CLASSES=1 OPTIONS="k=v ..." DEVICE= JSON=]
	@$(PY) -m training.recommend $(arm-flags)

reproduce: install ## the thesis' grid into docs/results | PROTOCOL= [SEEDS=3|1,2|2-3 LOSSES=a,b DIGITS= DATA= EPOCHS= PRESET= OPTIONS= IMAGE_SIZE= BUDGET_MINUTES= PROCESSES= STACK= DEVICE= PRECISION= WORKERS=]
	@$(PY) -m training.reproduce --protocol $(or $(chosen-protocol),toy) $(call flag,PRESET,--preset) $(call flag,SEEDS,--seeds) $(call flag,LOSSES,--losses) \
	  $(call flag,DIGITS,--digits) $(call flag,DATA,--data) $(call flag,EPOCHS,--epochs) $(call flag,IMAGE_SIZE,--image-size) \
	  $(call flag,BUDGET_MINUTES,--budget-minutes) $(call flag,PROCESSES,--processes) $(call flag,STACK,--stack) $(call flag,DEVICE,--device) $(call flag,PRECISION,--precision) $(call flag,WORKERS,--workers) \
	  $(foreach option,$(OPTIONS),--option $(option))

report: install ## tables and figures of the grid again, from its rows and stored scores | [PROTOCOL= MERGE=other.json]
	@$(PY) -m training.grid_report $(if $(chosen-protocol),--protocol $(chosen-protocol)) $(call flag,MERGE,--merge)

# -- serve ------------------------------------------------------------------------------------------------------------

serve: install ## TorchServe and gateway on this machine | MODEL=<name> [PORT=8000 DEVICE= PRECISION= COMPILED=1 WORKERS= BATCH_SIZE= GATEWAY_PROCESSES=]
	$(call need,MODEL,demo)
	@$(PY) -m serving.stack --model $(MODEL) --port $(PORT) $(call flag,DEVICE,--device) $(call flag,PRECISION,--precision) $(if $(COMPILED),--compiled) \
	  $(call flag,WORKERS,--workers) $(call flag,BATCH_SIZE,--batch-size) $(call flag,GATEWAY_PROCESSES,--gateway-processes)

bench: install ## serving speed against its baselines | [IMAGES=<photographs> DEVICE= PRECISION="float32 bfloat16" COMPILED=1 JSON= FIGURE= URL= ARGS=]
	@$(PY) benchmarks/serve.py $(call flag,IMAGES,--images) $(call flag,DEVICE,--device) $(call flag,PRECISION,--precision) \
	  $(if $(COMPILED),--compiled) $(call flag,JSON,--json) $(call flag,FIGURE,--figure) $(call flag,URL,--url) $(ARGS)

# Both containers anew, since an archive that was packed again changes nothing that compose compares; calibrations stay in their
# volume. The containers' users are others than the one who packs: they must be able to enter the folder.
# Says why where a container does not become ready; they stay, to be looked at: make down stops them.
compose_up = chmod -f a+rx model_store; export MODEL=$(MODEL) PORT=$(PORT); $(1) build && { $(1) up --detach --wait --force-recreate || { $(1) logs --tail 100 >&2; exit 1; }; }

up: ## the same in containers, CPU | MODEL=<name> [PORT=8000]
	$(call need,MODEL,demo)
	@$(call compose_up,$(COMPOSE) -f docker/compose.yaml)

up-gpu: ## the same in containers, NVIDIA GPU | MODEL=<name> [PORT=8000]
	$(call need,MODEL,demo)
	@$(call compose_up,$(COMPOSE) -f docker/compose.yaml -f docker/compose.gpu.yaml)

down: ## stop the containers
	@MODEL=$(or $(MODEL),none) $(COMPOSE) -f docker/compose.yaml down

# -- check ------------------------------------------------------------------------------------------------------------

# Side by side, a file at a time and with a thread each, except those that serve: they have the machine to themselves.
all_tests = failed=; OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests/unit tests/contract || failed=1; $(PY) -m pytest tests/e2e || failed=1; test -z "$$failed"

test: install lint types ## lint, types and all tests, real TorchServe and gateway included | [ARGS=]
	@$(if $(ARGS),$(PY) -m pytest $(ARGS),$(all_tests))

lint: install ## ruff: rules and format
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

chaos: install ## kill -9 of fifty training processes at random moments; every run must end the same | [ARGS=]
	@$(PY) -m benchmarks.train_chaos $(ARGS)

types: install ## mypy, strict, on everything but tests and benchmarks
	@$(VENV)/bin/mypy

clean: ## remove the environment and caches; runs and archives stay
	rm -rf $(VENV) .cache .run .mypy_cache .ruff_cache .pytest_cache
