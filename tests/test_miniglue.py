"""Where MiniGLUE's files are found: in the repository, and in what an installed kdlib carries."""

import hashlib
import shutil
import subprocess
import sys
import zipfile

from kdlib import doctor, glue, miniglue


def test_the_repository_has_the_data(root):
    assert miniglue.folder() == root / "data" / "miniglue"


def test_an_installed_kdlib_carries_the_same_files_and_finds_them(root, tmp_path, monkeypatch):
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(root / "kdlib", source / "kdlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    build = "import sys\nfrom setuptools import build_meta\nprint(build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", build, str(tmp_path)]
    wheel = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    zipfile.ZipFile(tmp_path / wheel).extractall(installed)

    carried = installed / "kdlib" / "embedded"
    files = {str(path.relative_to(carried)): path.read_bytes() for path in carried.rglob("*") if path.is_file()}
    assert "mini-mnli" in files.pop("README.md").decode()
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == doctor.miniglue_hashes()
    monkeypatch.setattr(miniglue, "__file__", str(installed / "kdlib" / "miniglue.py"))
    assert miniglue.folder() == carried
    assert len(miniglue.tokenizer()) == 112


def test_the_tasks_are_those_of_glue():
    assert [name for name in glue.TASKS if name.startswith("mini-")] == list(miniglue.TASK_NAMES)
