#!/usr/bin/env bash
# Sets up .venv and runs the quickstart; its results go to quickstart/.
source "$(dirname "$0")/setup_env.sh" "[basicsr]"
exec .venv/bin/tlw quickstart "$@"
