"""Everything that must hold, in order: `python -m tools.check` (`make test`); stops at the first step that fails.

Names of steps as arguments run only those: `python -m tools.check lint tests`.
"""

import subprocess
import sys
import time

from tools.chapters import ROOT
from tools.execute import kernel_environment

WORKERS = "2"
SHARED = ["--dist", "loadscope", "--no-loadscope-reorder"]  # a file to a worker, in the order of tests/conftest.py
PYTHON = ".venv/bin/python"  # as a reader types it


def steps() -> dict[str, list[str]]:
    """The steps by name, each a command for this Python."""
    return {
        "lint": ["ruff", "check", "."],
        "format": ["ruff", "format", "--check", "."],
        "types": ["mypy"],
        "tests": ["pytest", "-q", "-n", WORKERS, *SHARED, "--cov", "--cov-report", "term"],
        "notebooks": ["tools.compare"],
    }


def main(names: list[str]) -> int:
    """Run the named steps, or all; returns the exit status."""
    available = steps()
    unknown = [name for name in names if name not in available]
    if unknown:
        print(f"unknown step {unknown[0]!r}; there are {', '.join(available)}")
        return 2
    kernel_environment()
    lines = []
    for name, command in available.items():
        if names and name not in names:
            continue
        print(f"== {name}: {' '.join(command)}", flush=True)
        started = time.perf_counter()
        failed = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
        lines.append(f"{name:<10} {time.perf_counter() - started:6.1f} s  {'failed' if failed else 'ok'}")
        if failed:
            print("\n" + "\n".join(lines))
            print(
                f"\nmake test stopped: the step {name!r} failed, its output is above. "
                f"To run it alone: {PYTHON} -m tools.check {name}"
            )
            return 1
    print("\n" + "\n".join(lines))
    print("\nEverything holds.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
