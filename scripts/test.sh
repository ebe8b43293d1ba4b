#!/usr/bin/env bash
# Sets up .venv, checks the code's style and types and runs the tests, in two processes. Arguments go to pytest.
source "$(dirname "$0")/setup_env.sh" "[test]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright tlw_basicsr
exec .venv/bin/python -m pytest --numprocesses 2 --dist worksteal "$@"
