.DEFAULT_GOAL := help
BIN := .venv/bin
.PHONY: help install format lint docs test

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## Create .venv with the test extra
	scripts/test.sh --install-only

format: install ## Sort imports and mend what ruff can mend
	$(BIN)/ruff check --fix .

lint: install ## The static checks that CI runs
	$(BIN)/python scripts/check_layers.py
	$(BIN)/python scripts/size.py
	$(BIN)/python scripts/check_vendor_contracts.py
	$(BIN)/python scripts/gen_docs.py --check
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install ## Write the generated pages anew
	$(BIN)/python scripts/gen_docs.py

test: ## Run the CPU suites
	scripts/test.sh
