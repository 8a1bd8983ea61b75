# make run: from nothing to the result table.  make test: the whole test suite.  Both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test check install

run: $(STAMP)
	@echo "== 1/5  the starter corpus"
	@$(BIN)/python -m data_pipelines.prepare corpus=starter
	@echo "== 2/5  training the ablation: average pooling"
	@$(BIN)/python -m mm1.train +ablation=connector_avgpool
	@echo "== 3/5  training the base configuration: C-Abstractor"
	@$(BIN)/python -m mm1.train
	@echo "== 4/5  few-shot evaluation of both, at 0, 4 and 8 shots"
	@$(BIN)/python -m eval.fewshot run=base processes=2
	@$(BIN)/python -m eval.fewshot run=connector_avgpool processes=2
	@echo "== 5/5  the result table"
	@$(BIN)/python -m ablations.table runs=[base,connector_avgpool]

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (the first time this downloads about 3 GB, most of it torch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt --editable ".[dev]"
	@touch $@
