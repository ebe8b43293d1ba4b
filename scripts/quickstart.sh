#!/usr/bin/env bash
# Sets up .venv and runs the quickstart; its results go to quickstart/.
source "$(dirname "$0")/setup_env.sh" "[basicsr]"
.venv/bin/tlw quickstart "$@"
echo "These commands need the environment: source .venv/bin/activate"
