# Sourced by the other scripts: makes .venv once, installs the package and what is named in $1 (such as [test]).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3.10 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [ -z "${found:-}" ]; then
        echo "error: Python 3.10, 3.11 or 3.12 is needed; name it by PYTHON=/path/to/python" >&2
        exit 2
    fi
    "$found" -m venv .venv
fi

wanted="$(cat requirements.txt pyproject.toml | cksum)"
stamp=".venv/installed$1"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into .venv (torch is large: minutes)"
    # an old pip, such as Python 3.10 brings, builds basicsr in a way that fails
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
    .venv/bin/python -m pip install --quiet --editable ".$1"
    echo "$wanted" > "$stamp"
fi
