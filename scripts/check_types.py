"""Run mypy, and fail where a file has more errors than types_baseline.json grants it. STRICT folders are granted none.

python scripts/check_types.py [--update] [mypy's own flags]
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASELINE = Path(__file__).with_name("types_baseline.json")
STRICT = ("vica/checkpoint/", "vica/engine/", "vica/kernels/", "vica/model/", "vica/plan/")
ERROR = re.compile(r"(?P<file>[^:]+):\d+: error: ")


def run_mypy(flags: list[str]) -> list[str]:
    """Returns a line for each error; anything but a finished check ends the program."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if ERROR.match(line)]
    if done.returncode not in (0, 1) or (done.returncode == 1 and not lines):
        sys.exit(f"mypy did not finish: {done.stdout}{done.stderr}")
    return lines


def count(lines: list[str]) -> dict[str, int]:
    files = (match["file"].replace("\\", "/") for line in lines if (match := ERROR.match(line)))
    return dict(sorted(Counter(files).items()))


def allowed(file: str, baseline: dict[str, int]) -> int:
    return 0 if file.startswith(STRICT) else baseline.get(file, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write today's counts, unless there are more in all")
    args, flags = parser.parse_known_args()
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else None
    lines = run_mypy(flags)
    found = count(lines)
    total, granted = sum(found.values()), sum((baseline or {}).values())
    print(f"{total} type errors; the baseline grants {granted}")
    if args.update and (baseline is None or total <= granted):
        BASELINE.write_text(json.dumps(found, indent=0) + "\n")
        return 0
    grown = [file for file, errors in found.items() if errors > allowed(file, baseline or {})]
    for file in grown:
        print(f"{file}: {found[file]} errors, {allowed(file, baseline or {})} granted", file=sys.stderr)
        print(*(line for line in lines if line.startswith(f"{file}:")), sep="\n", file=sys.stderr)
    if not grown and total < granted:
        print("fewer than granted: run again with --update")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
