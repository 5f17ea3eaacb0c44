"""A book of a few cells in a temporary folder, for tests of the tools that make the real one."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tools import chapters
from tools.chapters import Chapter

HEADER = "# ---\n# jupyter:\n#   jupytext:\n#     formats: ipynb,py:percent\n# ---\n\n"


@dataclass(frozen=True)
class SmallBook:
    """A repository with a book in it; `write` adds a chapter or replaces its source."""

    root: Path
    pages: list[dict] = field(default_factory=list)  # what book.yml lists besides the chapters

    def write(self, name: str, source: str) -> Chapter:
        path = self.root / "chapters" / f"{name}.py"
        path.write_text(HEADER + source)
        names = sorted(file.stem for file in path.parent.glob("*.py"))
        parts = [{"caption": "All", "chapters": [{"file": f"chapters/{name}"} for name in names]}, *self.pages]
        (self.root / "book.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": "index", "parts": parts}))
        return next(chapter for chapter in chapters.chapters(self.root) if chapter.name == name)


@pytest.fixture
def small_book(tmp_path, monkeypatch) -> SmallBook:
    """A repository, in a folder with a space in its name, with a library of one function and no chapter yet."""
    root = tmp_path / "a book"
    for folder in ("chapters", "docs", "kdlib", "data"):
        (root / folder).mkdir(parents=True)
    (root / "kdlib" / "losses.py").write_text("def half(x):\n    return x / 2\n\n\ndef _hidden(x):\n    return x\n")
    (root / "data" / "numbers.txt").write_text("1 2 3\n")
    (root / "requirements.lock").write_text("")
    # The chapters' kernels are to import this library, not the real one.
    monkeypatch.setenv("PYTHONPATH", str(root))
    return SmallBook(root)
