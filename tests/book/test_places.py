"""A chapter runs wherever it is opened: from any folder, and where kdlib is not installed yet."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest

from tools import chapters

REAL = chapters.chapters()
SETUP = chapters.setup_cell()


@pytest.mark.parametrize("chapter", REAL, ids=[chapter.name for chapter in REAL])
def test_every_chapter_begins_with_the_same_set_up(chapter):
    assert list(chapters.setup_problems(chapters.read_source(chapter.source), SETUP)) == []


@pytest.mark.parametrize(
    ("mistake", "replacement"),
    [
        ("# %% [markdown]\n# text", "# %%\n1 + 1"),  # another code cell first
        ("import kdlib\n", "import  kdlib\n"),  # one letter
        (' tags=["setup", "hide-input"]', ""),  # the tag
        ("# last", f'# %% tags=["setup", "hide-input"]\n{SETUP}'),  # twice
    ],
)
def test_another_set_up_is_caught(tmp_path, mistake, replacement):
    good = f'# %% [markdown]\n# text\n\n# %% tags=["setup", "hide-input"]\n{SETUP}\n\n# %%\n2\n\n# last\n'
    path = tmp_path / "chapter.py"
    path.write_text(good)
    assert list(chapters.setup_problems(chapters.read_source(path), SETUP)) == []
    path.write_text(good.replace(mistake, replacement))
    (problem,) = chapters.setup_problems(chapters.read_source(path), SETUP)
    assert "must be the set-up cell of 00_preface.py" in problem


def test_the_set_up_takes_no_name_that_a_chapter_needs():
    """Chapter 12 collects its parameters from the names that are new after its imports."""
    from kdlib import runs  # here, because the other tests of this file do not need torch

    names = {node.id for node in ast.walk(ast.parse(SETUP)) if isinstance(node, ast.Name)}
    assert names & {field.name for field in dataclasses.fields(runs.RunConfig)} == set()


# What the cell does, in a Python that has everything but kdlib.


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """A Python with links to all installed packages but kdlib, and no network to install from."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "kdlib" not in entry.name:
            (site / entry.name).symlink_to(entry)
    for name in ("PYTHONPATH", "KDLIB_SOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads this as: no isolation
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return tmp_path / "bare" / "bin" / "python"


@pytest.fixture
def repository(tmp_path, root) -> Path:
    """What an installation takes from the repository, and the embedded data."""
    folder = tmp_path / "the book"
    for name in ("kdlib", "data/miniglue"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, folder)
    (folder / "chapters").mkdir()
    return folder


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def run(python, folder, code=SETUP, **environment):
    """Run the cell in `folder`; what it printed, and then where kdlib was taken from."""
    code += "\nimport kdlib\nprint(kdlib.__file__)"
    environment = {**os.environ, **environment}
    return subprocess.run([python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_in_the_repository_the_repository_is_installed(bare, repository, elsewhere):
    first = run(bare, repository / "chapters")
    library = str(repository / "kdlib" / "__init__.py")
    assert (first.stdout, first.returncode) == (f"{library}\n", 0), first.stderr
    again = run(bare, elsewhere, "")
    assert again.stdout == f"{library}\n", "it stays, for other folders and kernels"


def test_a_git_address_is_cloned_once(bare, repository, elsewhere):
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "The book"]):
        subprocess.run([*git, *command], check=True)
    broken = run(bare, elsewhere, KDLIB_SOURCE=repository.as_uri(), PIP_FIND_LINKS="", PIP_NO_BUILD_ISOLATION="1")
    assert broken.returncode != 0, "without its build backend the installation fails, after the clone"
    answer = run(bare, elsewhere, KDLIB_SOURCE=repository.as_uri())
    assert answer.stdout == f"{elsewhere / 'kdlib-book' / 'kdlib' / '__init__.py'}\n", answer.stderr
    assert (elsewhere / "kdlib-book" / "data" / "miniglue" / "vocab.txt").exists()


def test_without_any_source_the_remedy_is_named(bare, elsewhere):
    answer = run(bare, elsewhere)
    assert answer.returncode != 0 and answer.stdout == ""
    assert answer.stderr.endswith(
        "ImportError: kdlib is missing: set KDLIB_SOURCE to the book's folder or git address, run again\n"
    )
    assert "During handling" not in answer.stderr


def test_where_kdlib_is_installed_nothing_happens(root, elsewhere, monkeypatch):
    watch = (
        "import sys\n"
        "def hook(event, arguments):\n"
        "    if event in ('subprocess.Popen', 'os.posix_spawn'):\n"
        "        raise AssertionError(arguments)\n"
        "sys.addaudithook(hook)\n"
    )
    answer = run(sys.executable, elsewhere, watch + SETUP, PYTHONPATH=str(root), KDLIB_SOURCE="/nowhere")
    assert (answer.stdout, answer.stderr) == (f"{root / 'kdlib' / '__init__.py'}\n", "")


@pytest.mark.timeout(300)
def test_the_preface_runs_from_another_folder_where_kdlib_is_missing(
    bare, repository, elsewhere, tmp_path, root, monkeypatch
):
    """As on Colab: a notebook, a kernel, and an address."""
    (elsewhere / "kdlib").mkdir()  # a folder that Python takes for a package
    kernels = elsewhere / "jupyter" / "kernels" / "bare"
    kernels.mkdir(parents=True)
    specification = {"argv": [str(bare), "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    specification |= {"display_name": "bare", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(specification))
    monkeypatch.setenv("JUPYTER_PATH", str(elsewhere / "jupyter"))
    monkeypatch.setenv("KDLIB_SOURCE", str(repository))
    notebook, out = elsewhere / "preface.ipynb", elsewhere / "out.ipynb"
    jupytext.write(jupytext.read(root / "chapters" / "00_preface.py"), notebook)
    papermill.execute_notebook(
        notebook, out, cwd=elsewhere, kernel_name="bare", progress_bar=False, log_output=False, language="python"
    )
    outputs = [output for cell in nbformat.read(out, as_version=4).cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert {output.get("name") for output in outputs} == {"stdout"}
    assert outputs[-1].text.endswith("ready\n")
    assert run(bare, tmp_path, "").stdout.strip() == str(repository / "kdlib" / "__init__.py"), "for other folders, too"
