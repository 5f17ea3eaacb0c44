"""The set-up, the Makefile, the README and CI: what a newcomer touches first."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tools import environment


@pytest.fixture
def commands(monkeypatch) -> list[tuple[str, ...]]:
    """The commands that the set-up would run, instead of running them."""
    ran: list[tuple[str, ...]] = []

    def record(*command):
        ran.append(command)
        if "venv" in command:  # as far as the set-up looks at it
            place = Path(command[-1])
            (place / "bin").mkdir(parents=True)
            (place / "bin" / "activate").write_text(f"VIRTUAL_ENV='{place}'\n")
            (place / "bin" / "python").symlink_to(environment.sys.executable)

    monkeypatch.setattr(environment, "run", record)
    return ran


@pytest.fixture
def repository(tmp_path) -> Path:
    root = tmp_path / "a repository"
    root.mkdir()
    for name in environment.INPUTS:
        (root / name).write_text(f"# {name}\n")
    return root


def test_the_first_set_up_makes_an_environment_and_installs_the_pins_then_the_package(repository, commands):
    environment.main(repository)
    venv, requirements, package = commands
    python = str(repository / ".venv" / "bin" / "python")
    assert venv[1:] == ("-m", "venv", "--clear", str(repository / ".venv"))
    assert requirements[0] == package[0] == python
    assert requirements[-4:] == (
        *("-r", str(repository / "requirements.txt")),
        *("-c", str(repository / "requirements.lock")),
    )
    assert package[-4:] == ("--no-deps", "--no-build-isolation", "-e", str(repository))


def test_the_folder_that_the_readmes_papermill_commands_write_to_is_there(repository, commands, copy, root):
    environment.main(repository)
    assert (repository / "_build").is_dir()
    (repository / "_build").rmdir()
    environment.main(repository)
    assert (repository / "_build").is_dir(), "although nothing else is done the second time"
    (copy / "_build" / "html").mkdir(parents=True)
    assert make(copy, "clean").returncode == 0
    assert list((copy / "_build").iterdir()) == []
    commands_named = re.findall(r"^papermill \S+ (\S+)", (root / "README.md").read_text(), re.MULTILINE)
    assert commands_named and {Path(place).parent for place in commands_named} == {Path("_build")}


def test_nothing_is_done_twice(repository, commands, capsys):
    environment.main(repository)
    commands.clear()
    capsys.readouterr()
    environment.main(repository)
    assert commands == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", environment.INPUTS)
def test_changed_requirements_are_installed_into_the_same_environment(repository, commands, name):
    environment.main(repository)
    commands.clear()
    (repository / name).write_text("# something else\n")
    environment.main(repository)
    assert len(commands) == 2
    assert not any("venv" in command for command in commands)


def test_an_environment_that_was_moved_is_made_anew(repository, commands):
    environment.main(repository)
    assert environment.usable(repository / ".venv")
    moved = repository.with_name("moved here")
    shutil.copytree(repository, moved, symlinks=True)
    assert not environment.usable(moved / ".venv")


def test_an_environment_whose_python_is_gone_is_made_anew(repository, commands):
    environment.main(repository)
    (repository / ".venv" / "bin" / "python").unlink()
    assert not environment.usable(repository / ".venv")


def test_a_set_up_that_failed_is_not_taken_for_done(repository, commands, monkeypatch):
    environment.main(repository)
    (repository / "requirements.txt").write_text("nonsense==\n")
    monkeypatch.setattr(environment, "run", lambda *command: environment.sys.exit("failed"))
    with pytest.raises(SystemExit):
        environment.main(repository)
    (repository / "requirements.txt").write_text("# requirements.txt\n")
    assert not (repository / ".venv" / "kdlib-setup").exists()


def test_a_command_that_fails_is_shown(monkeypatch):
    with pytest.raises(SystemExit, match=r"failed in:\n    false now\n.*\nMend the cause and run make again"):
        environment.run("false", "now")


def make(folder, *arguments):
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path, root) -> Path:
    """The Makefile and its tools in a folder with a space in its name."""
    folder = tmp_path / "a copy"
    shutil.copytree(root / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "Makefile", folder)
    return folder


def targets(root) -> set[str]:
    (line,) = re.findall(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    return set(line.split())


def test_help_is_the_default_and_names_every_target(copy, root):
    shown = make(copy)
    assert shown.returncode == 0
    assert shown.stdout == make(copy, "help").stdout
    assert set(re.findall(r"^  (\w+) +\w", shown.stdout, re.MULTILINE)) == targets(root)


@pytest.mark.parametrize("version", [None, "3.9"])
def test_a_python_that_is_missing_or_too_old_is_refused_in_plain_words(copy, version):
    python = copy / "old python"
    if version:
        python.write_text("#!/bin/sh\nexit 1\n")  # as one that says it is older than 3.11
        python.chmod(0o755)
    refused = make(copy, "book", f"PYTHON={python}")
    assert refused.returncode != 0
    assert "kdlib needs Python 3.11 or newer" in refused.stderr
    assert "make PYTHON=/path/to/python" in refused.stderr
    assert not (copy / ".venv").exists()


def test_the_readme_names_only_targets_and_files_that_exist(root):
    readme = (root / "README.md").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", readme, re.MULTILINE))
    assert {"book", "test"} <= named <= targets(root)
    named = re.findall(r"\b(?:chapters|configs|kdlib|data|docs|tools|tests|benchmarks)/[\w/.]*\w", readme)
    assert [name for name in named if "NN_name" not in name and not (root / name).exists()] == []


def test_ci_runs_what_the_readme_says(root):
    ci = (root / ".ci" / "run").read_text()
    assert "set -euo pipefail" in ci
    assert re.search(r"^make test$", ci, re.MULTILINE)
    assert re.search(r"^book=\$\(make book ", ci, re.MULTILINE)
    assert (root / ".ci" / "run").stat().st_mode & 0o111


def test_the_papers_parameter_files_are_valid(root):
    from kdlib import runs  # here, because the other tests of this file do not need torch

    # Those of chapter 11, "…_pretraining", have a test beside it.
    files = sorted(file for file in (root / "configs").glob("*.yml") if not file.stem.endswith("pretraining"))
    assert [file.stem for file in files] == ["ikd", "lgtm", "metadistil", "tutor_kd"]
    for file in files:
        parameters = yaml.safe_load(file.read_text())
        config = runs.configure(**parameters)
        assert {name: config.flat[name] for name in parameters} == parameters, file.name
