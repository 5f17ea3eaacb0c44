"""Create .venv, or bring it up to date: `python3.11 tools/environment.py` (the Makefile's `setup`).

Needs nothing but a Python with venv.  Nothing is done while requirements.txt, requirements.lock and pyproject.toml are
those of the last time and .venv stands where it was made: a virtual environment cannot be moved.
"""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INPUTS = ("requirements.txt", "requirements.lock", "pyproject.toml")


def fingerprint(root: Path) -> str:
    """A hash of everything that the set-up depends on."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def usable(environment: Path) -> bool:
    """Whether there is an environment that was made at this very place and whose Python still runs."""
    activate = environment / "bin" / "activate"
    if not activate.exists() or str(environment) not in activate.read_text():
        return False
    try:
        answer = subprocess.run(
            [environment / "bin" / "python", "-c", "import pip, sys; sys.exit(sys.version_info < (3, 11))"]
        )
    except OSError:
        return False
    return answer.returncode == 0


def run(*command: str) -> None:
    """Run a command; on failure say which one it was and stop."""
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"\nSetting up .venv failed in:\n    {' '.join(command)}\n{error}\nMend the cause and run make again.")


def main(root: Path = ROOT) -> None:
    """Create or refresh the environment unless its stamp says that nothing has changed."""
    (root / "_build").mkdir(exist_ok=True)  # where the README's commands write, and papermill makes no folders
    environment = root / ".venv"
    stamp = environment / "kdlib-setup"
    wanted = fingerprint(root)
    reuse = usable(environment)
    if reuse and stamp.exists() and stamp.read_text() == wanted:
        return
    started = time.monotonic()
    if reuse:
        print("Bringing .venv up to date with requirements.txt", flush=True)
        stamp.unlink(missing_ok=True)
    else:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(f"Creating .venv with Python {version} (once; a few minutes)", flush=True)
        run(sys.executable, "-m", "venv", "--clear", str(environment))
    pip = (str(environment / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check")
    pip += ("--no-compile",)  # on all cores below
    run(*pip, "-r", str(root / "requirements.txt"), "-c", str(root / "requirements.lock"))
    # Everything that kdlib needs is there by now, its build backend included: nothing more may be fetched.
    run(*pip, "--no-deps", "--no-build-isolation", "-e", str(root))
    # Some packages carry files that are no valid Python, templates for instance: they are left out.
    subprocess.run([pip[0], "-m", "compileall", "-q", "-q", "-j", "0", str(environment / "lib")])
    stamp.write_text(wanted)
    print(f"Set up in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
