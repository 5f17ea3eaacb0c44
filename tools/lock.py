"""Write requirements.lock: `make lock`, that is `.venv/bin/python -m tools.lock`.

pip resolves requirements.txt from scratch, without installing anything, and this writes down what it chose: one
`name==version` a line.  The lock is used as a constraint (`pip install -r requirements.txt -c requirements.lock`), so a
line whose package is not needed on some platform does no harm there.
"""

import json
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# Every package that requirements.txt brings in, pinned. Written by `make lock`; do not edit.
# Used as a constraint: pip install -r requirements.txt -c requirements.lock
"""


def resolve(requirements: Path) -> dict[str, str]:
    """The versions that pip would install into an empty environment, by canonical name.

    Raises SystemExit with pip's own words if there is no solution.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq"]
    command += ["--disable-pip-version-check", "--report", "-", "-r", str(requirements)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        sys.exit("pip found no solution for requirements.txt; requirements.lock is as it was")
    installed = [entry["metadata"] for entry in json.loads(answer.stdout)["install"]]
    # A local label such as +cpu names a build, not a version: the lock must hold for every build.
    return {canonicalize_name(entry["name"]): Version(entry["version"]).public for entry in installed}


def main(root: Path = ROOT) -> None:
    """Write the lock of `root`."""
    versions = resolve(root / "requirements.txt")
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    (root / "requirements.lock").write_text(HEADER + "".join(lines))
    print(f"requirements.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
