.DEFAULT_GOAL := help
BIN := .venv/bin
FILE ?=
.PHONY: help install format lint docs quick test

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## Create .venv with the test extra
	scripts/test.sh --install-only

format: install ## Sort imports, fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: install ## The static checks that CI runs
	$(BIN)/python scripts/check_layers.py
	$(BIN)/python scripts/size.py
	$(BIN)/python scripts/check_vendor_contracts.py
	$(BIN)/python scripts/gen_docs.py --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## Write the generated pages
	$(BIN)/python scripts/gen_docs.py

quick: lint ## The static checks and the unit tests
	scripts/test.sh --suite stage-a-test-cpu --jobs 2 --root test/registered/unit

test: $(if $(FILE),install) ## Run the CPU suites, or FILE=test/registered/... alone
	$(if $(FILE),$(BIN)/python $(FILE) -v,scripts/test.sh)
