"""Build the site with Sphinx from docs/, the chapters' notebooks and kdlib's docstrings; nothing is executed.

`python -m tools.site` builds it from the stored notebooks into _build/check/html, in seconds: the site that the tests
read.  `make book` builds the one for readers, from the notebooks it has executed, into _build/html.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from tools import api
from tools.chapters import ROOT, Chapter, chapters, strip

CHECKED = Path("_build") / "check"
LONG = 30
"""Lines of printed output from which on a page folds it."""


@dataclass(frozen=True)
class Cost:
    """What a chapter took when it was executed."""

    seconds: float
    peak_mib: float


def fingerprint(paths: Iterable[Path], root: Path) -> str:
    """A hash of the names and contents of files; folders stand for every file below them."""
    digest = hashlib.sha256(sys.version.encode())
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"\n{file.relative_to(root)}\n".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def build(root: Path, build: Path, notebooks: Path, costs: Mapping[str, Cost]) -> bool:
    """Build `build/html` from the notebooks in a folder; warnings are errors.  False if it failed.

    Nothing is done if the pages are those of the last time.
    """
    source, html, stamp = build / "site", build / "html", build / "site.sha256"
    _collect(root, source, notebooks, costs)
    wanted = fingerprint([source, root / "requirements.lock"], root) + _own_hash()
    if stamp.exists() and stamp.read_text() == wanted and (html / "index.html").exists():
        return True
    stamp.unlink(missing_ok=True)
    for folder in (html, build / "singlehtml", build / "doctrees"):
        shutil.rmtree(folder, ignore_errors=True)
    for builder in ("html", "singlehtml"):
        command = [sys.executable, "-m", "sphinx", "-b", builder, "-q", "-n", "-W", "--keep-going"]
        if subprocess.run([*command, "-d", str(build / "doctrees"), str(source), str(build / builder)]).returncode:
            return False
    _add_print_page(build / "singlehtml" / "index.html", html)
    stamp.write_text(wanted)
    return True


def cost_table(chapters: Iterable[Chapter], costs: Mapping[str, Cost]) -> str:
    """A table of what each chapter takes, for the site's first page."""
    rows = []
    for chapter in chapters:
        cost = costs.get(chapter.name)
        measured = f"{cost.seconds:.0f} | {cost.peak_mib:.0f}" if cost else "not measured | not measured"
        rows.append(f"| {{doc}}`/chapters/{chapter.name}` | {measured} |")
    return "\n".join(["| chapter | seconds | memory in MiB |", "|---|---:|---:|", *rows, ""])


def chapter_page(notebook: NotebookNode, chapter: Chapter, derived: Iterable[api.Entry]) -> NotebookNode:
    """A chapter as the site shows it: with links to its two files under the title, and to the library at the end.

    The remark that tells nbval to compare a cell's output is for nbval only.  Long outputs are folded.
    """
    page = nbformat.from_dict(notebook)
    for cell in page.cells:
        cell.source = cell.source.removeprefix("# NBVAL_CHECK_OUTPUT\n")
        if any(output.get("text", "").count("\n") > LONG for output in cell.get("outputs", [])):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-output"]
    title, _, rest = page.cells[0].source.partition("\n")
    files = [
        f"{{download}}`{label} </downloads/{path.name}>`"
        for label, path in (("notebook (.ipynb)", chapter.notebook), ("source (.py)", chapter.source))
    ]
    page.cells[0].source = f"{title}\n\n:::{{container}} downloads\nDownload: {', '.join(files)}\n:::\n{rest}"
    lines = [f"- {entry.link}: {api.markdown(entry.summary)}" for entry in derived]
    if lines:
        text = "\n".join(["## In the library", "", "What `kdlib` offers of this chapter:", "", *lines])
        page.cells.append(new_markdown_cell(text, id="library"))
    return page


def main(root: Path = ROOT) -> int:
    """Build the site that the tests read; returns the exit status."""
    built = build(root, root / CHECKED, root / "chapters", {})
    print(f"The site: {root / CHECKED / 'html' / 'index.html'}" if built else "The site was not built.")
    return 0 if built else 1


def _collect(root: Path, source: Path, notebooks: Path, costs: Mapping[str, Cost]) -> None:
    """Put everything that Sphinx reads into `source`."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(root / "docs", source)
    shutil.copy(root / "book.yml", source)
    for folder in ("chapters", "downloads", "api"):
        (source / folder).mkdir()
    derived = api.derived(root)
    for chapter in chapters(root):
        notebook = strip(nbformat.read(notebooks / chapter.notebook.name, as_version=4))
        nbformat.write(notebook, source / "downloads" / chapter.notebook.name)
        shutil.copy(chapter.source, source / "downloads")
        page = chapter_page(notebook, chapter, derived.get(chapter.name, []))
        nbformat.write(page, source / "chapters" / chapter.notebook.name)
    for name, text in api.pages(root).items():
        (source / "api" / f"{name}.md").write_text(text)
    (source / "costs.md").write_text(cost_table(chapters(root), costs))


def _add_print_page(single: Path, html: Path) -> None:
    """The whole book on one page, `print.html`; styles, scripts, figures and downloads are those of the other pages.

    Sphinx writes links as `index.html#document-page#anchor`; browsers want the anchor alone.
    """
    page = re.sub(r'(?<=href=")index\.html(?=#)', "", single.read_text())
    (html / "print.html").write_text(re.sub(r'(?<=href=")#document-[^"#]*(?=#)', "", page))


def _own_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
