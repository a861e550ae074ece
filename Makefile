.PHONY: check format lint types test wheel clean

check: lint types test

format:
	ruff format
	ruff check --fix

lint:
	ruff format --check
	ruff check

types:
	mypy
	basedpyright

test:
	python -m pytest

wheel: clean
	python -m build

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
