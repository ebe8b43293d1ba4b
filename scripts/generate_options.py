"""Write ``options/`` and ``docs/options.md`` anew; ``--check`` writes nothing and fails if a file differs."""

import argparse
import sys
from pathlib import Path

from tlw_basicsr.tools.option_tables import write_tables
from tlw_basicsr.tools.recipes import list_files

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a file differs from what it is made of")
    check = parser.parse_args().check
    files = {ROOT / path: text for path, text in list_files().items()} | {ROOT / "docs/options.md": write_tables()}
    of_others = set((ROOT / "options").rglob("*.yml")) - files.keys()
    different = [p for p, text in files.items() if not p.is_file() or p.read_text("utf-8") != text]
    if check and (different or of_others):
        sys.exit("differ: " + ", ".join(str(p.relative_to(ROOT)) for p in [*different, *sorted(of_others)]))
    for path in different:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], "utf-8")
    for path in of_others:
        path.unlink()


if __name__ == "__main__":
    main()
