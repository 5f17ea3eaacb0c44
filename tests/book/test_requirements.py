"""requirements.txt, requirements.lock, pyproject.toml and what is installed say the same."""

import json
import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import lock


def pins(text: str) -> dict[str, str]:
    """The `name==version` lines of a requirements file, by canonical name."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    found = {}
    for line in filter(None, lines):
        name, _, version = line.partition("==")
        assert re.fullmatch(r"[\w.]+", version), f"{line!r} is not of the form name==version"
        found[canonicalize_name(name)] = version
    return found


def closure(names: list[str]) -> set[str]:
    """Everything that is needed, directly or not, by the packages named; read from what is installed."""
    reached: set[tuple[str, str]] = set()
    pending = [(canonicalize_name(name), "") for name in names]
    while pending:
        name, extra = pending.pop()
        if (name, extra) in reached:
            continue
        reached.add((name, extra))
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                pending += [(canonicalize_name(needed.name), wanted) for wanted in ("", *needed.extras)]
    return {name for name, _ in reached}


@pytest.fixture(scope="module")
def direct(root):
    return pins((root / "requirements.txt").read_text())


@pytest.fixture(scope="module")
def locked(root):
    return pins((root / "requirements.lock").read_text())


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def test_every_requirement_gives_its_reason(root):
    lines = [line for line in (root / "requirements.txt").read_text().splitlines() if "==" in line]
    assert [line for line in lines if not re.search(r"==\S+\s+# \w", line)] == []


def test_the_lock_holds_the_requirements(direct, locked):
    assert {name: locked.get(name) for name in direct} == direct


def test_the_lock_is_what_the_requirements_bring_in(direct, locked):
    needed = closure(list(direct))
    assert sorted(needed - locked.keys()) == [], "run `make lock`"
    assert sorted(locked.keys() - needed) == [], "run `make lock`"


def test_what_is_installed_is_what_is_locked(locked):
    installed = {name: Version(metadata.version(name)).public for name in locked}
    assert installed == locked, "run `make setup`"


def test_no_addresses(root):
    for name in ("requirements.txt", "requirements.lock"):
        assert not re.search(r"https?:|file:|--|/simple", (root / name).read_text()), name


def test_pyproject_and_requirements_name_the_same_packages(direct, project):
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {canonicalize_name(needed.name): needed.specifier for needed in map(Requirement, lines)}
    assert declared.keys() == direct.keys()
    assert [name for name, version in direct.items() if version not in declared[name]] == []


def test_torch_is_exact(direct):
    assert direct["torch"] == "2.13.0"


def test_the_lock_command_drops_local_labels(monkeypatch, tmp_path):
    """`torch 2.13.0+cpu` is one build of 2.13.0; pinning the label would shut out every other machine."""
    entries = [{"name": "B_b", "version": "1.0+cpu"}, {"name": "a", "version": "2"}]
    report = json.dumps({"install": [{"metadata": entry} for entry in entries]})

    class Answer:
        returncode, stdout = 0, report

    monkeypatch.setattr(lock.subprocess, "run", lambda *_, **__: Answer)
    lock.main(tmp_path)
    assert pins((tmp_path / "requirements.lock").read_text()) == {"a": "2", "b-b": "1.0"}


def test_the_lock_command_keeps_the_old_lock_when_pip_finds_no_solution(monkeypatch, tmp_path):
    class Answer:
        returncode, stdout = 1, ""

    monkeypatch.setattr(lock.subprocess, "run", lambda *_, **__: Answer)
    (tmp_path / "requirements.lock").write_text("old")
    with pytest.raises(SystemExit, match="no solution"):
        lock.main(tmp_path)
    assert (tmp_path / "requirements.lock").read_text() == "old"
