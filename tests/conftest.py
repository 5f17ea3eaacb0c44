"""What all tests share: the real GLUE files if they are there, no network, one thread, reproducible examples."""

import os
from pathlib import Path

import pytest

# Before anything imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KDLIB_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")  # else jupyter_core warns that this will be the default
os.environ.setdefault("MPLBACKEND", "agg")

from hypothesis import settings

settings.register_profile("kdlib", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("kdlib")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that holds `glue/`: $KDLIB_SHARED, or `shared` beside the repository.  Skips where there is none."""
    folder = Path(os.environ.get("KDLIB_SHARED", ROOT.parent / "shared"))
    if not (folder / "glue").is_dir():
        pytest.skip(
            f"no real GLUE data: {folder / 'glue'} is missing (set KDLIB_SHARED to the folder that holds glue/)"
        )
    return folder
