"""What all tests share: the real GLUE files if they are there, no network, one thread, reproducible examples."""

import os
import shutil
import tempfile
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import settings

import tools.offline.sitecustomize
import tools.typed
from tools.offline import refuse_network

# Before anything imports a library that reads them.
refuse_network()  # in the processes that tests start
os.environ.setdefault("KDLIB_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")  # else jupyter_core warns that this will be the default
os.environ.setdefault("MPLBACKEND", "agg")

# Before anything imports them; `tools.typed` has to be imported, for jaxtyping imports `tools` only.
tools.typed.import_libraries()
jaxtyping.install_import_hook(tools.typed.rooms(), "tools.typed.checked")

settings.register_profile("kdlib", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("kdlib")

ROOT = Path(__file__).resolve().parents[1]
ASKED = Path(tempfile.gettempdir()) / f"kdlib-asked-{os.getpid()}"


LONGEST = ("book/test_site", "test_processes", "test_cluster", "test_resume", "book/test_book", "book/test_records")
LONGEST += ("test_runs", "book/test_places", "methods/test_lgtm", "book/test_glue_chapter", "test_interrupts")
"""What takes longest, in its order: begun last, it would leave the other worker without work."""


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, and measure no coverage while the book's tests run.

    Tracing takes half as long again, and tests/ mirrors kdlib.
    """
    rank = {ROOT / "tests" / f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "book"):
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(autouse=True)
def no_other_machine(monkeypatch):
    """Fails a test during which another machine was asked for, here or in a process that the test started."""
    monkeypatch.setenv("KDLIB_ASKED", str(ASKED))
    yield
    if ASKED.exists():
        asked = sorted(set(ASKED.read_text().splitlines()))
        ASKED.unlink()
        pytest.fail(f"no test needs the network, but this one asked for {', '.join(asked)}")


@pytest.fixture(scope="session")
def quick_runs(tmp_path_factory):
    """A folder with a finished run and its teacher's, and the run's name."""
    from kdlib import runs
    from tests.quick import QUICK

    folder = tmp_path_factory.mktemp("quick")
    return folder, runs.run(runs.configure(**QUICK, output_dir=str(folder))).run_id


@pytest.fixture(scope="module")
def finished_run(quick_runs, tmp_path_factory):
    """The record of a finished run, with folders for one file alone: what it writes beside them nobody else sees."""
    from kdlib.records import read_record

    folder, name = quick_runs
    copy = tmp_path_factory.mktemp("runs") / "runs"
    shutil.copytree(folder, copy)
    record = read_record(copy / name)
    record.config["output_dir"] = str(copy)
    return record


@pytest.fixture
def unchecked(monkeypatch):
    """For a test of what is said to whoever gives something that the annotations forbid."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def offline_hub(monkeypatch):
    """For a test that names a network of the hub: the libraries are told to be offline, and do not ask."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


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


@pytest.fixture
def few_to_test(monkeypatch):
    """For runs of which nobody looks at all predictions."""
    from kdlib import configuration, glue
    from tests import quick

    configuration._loaded.cache_clear()
    monkeypatch.setattr(glue, "load", quick.few_to_test(glue.load))
    yield
    configuration._loaded.cache_clear()
