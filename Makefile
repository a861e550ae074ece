.PHONY: check format lint types test test-pretended wheel clean

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

test-pretended:
	PYTHONPATH=tests/pretend_gpu PRETEND_GPU=noisy python -m pytest

wheel: clean
	python -m build

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
