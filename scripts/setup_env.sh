# Sourced by the other scripts: makes .venv once, installs the package and what is named in $1 (such as [basicsr]).
# PYTHON names the interpreter; without it one that is found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

if [ ! -x .venv/bin/python ]; then
    if [ -n "${PYTHON:-}" ]; then
        if ! usable "$PYTHON"; then
            echo "error: PYTHON=$PYTHON is not a Python of 3.10 or later that can make environments" >&2
            exit 2
        fi
        found=$PYTHON
    else
        for candidate in python3.12 python3.13 python3.11 python3.10 python3.14 python3; do
            if usable "$candidate"; then
                found=$candidate
                break
            fi
        done
        if [ -z "${found:-}" ]; then
            echo "error: Python 3.10 or later is needed; name it by PYTHON=/path/to/python" >&2
            exit 2
        fi
    fi
    echo "Making .venv with $found"
    "$found" -m venv .venv
fi

wanted="$(cat requirements.txt requirements/*.txt pyproject.toml tlw_setup.py | cksum)"
stamp=".venv/installed$1"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into .venv (torch is large: minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
    # setuptools' long warning about folders of this name is of no use here
    PYTHONWARNINGS=ignore .venv/bin/python -m pip install --disable-pip-version-check --editable ".$1"
    .venv/bin/tlw-setup
    echo "$wanted" > "$stamp"
fi
