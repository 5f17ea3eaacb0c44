"""Execute what has changed, then compare the marked outputs with the stored ones: `python -m tools.compare`.

`make test` calls it.  What is compared is what nbval compares with --nbval-lax, so that a reader may use that: the
cells that begin with `# NBVAL_CHECK_OUTPUT`, and of these the text, not the figures.  What any cell prints to stderr is
a complaint, too.
"""

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.book import execute_book, executed_path, finished, table
from tools.chapters import ROOT, Chapter, chapters, marked, noise_problems, shown


def differences(stored: NotebookNode, executed: NotebookNode) -> Iterator[str]:
    """Where the marked cells of two notebooks show different text, each with the lines that differ."""
    if [cell.source for cell in stored.cells] != [cell.source for cell in executed.cells]:
        yield "the stored notebook has other cells than the executed one: run `make notebooks`"
        return
    for number, (ours, theirs) in enumerate(zip(stored.cells, executed.cells, strict=True), start=1):
        if not marked(ours):
            continue
        kept, found = shown(ours), shown(theirs)
        for kind in sorted(kept.keys() | found.keys()):
            before, after = kept.get(kind, "").splitlines(), found.get(kind, "").splitlines()
            if kept.get(kind) != found.get(kind):
                lines = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
                said = {"- ": "stored", "+ ": "found "}
                text = "\n".join(f"    {said[line[:2]]}  {line[2:]}" for line in lines)
                yield f"cell {number}, {kind}:\n{text or '    the ends of lines differ'}"


def compare(chapter: Chapter, root: Path) -> list[str]:
    """What is wrong with the outputs of an executed chapter."""
    name = f"chapters/{chapter.name}.ipynb"
    if not chapter.notebook.exists():
        return [f"{name} is missing: run `make notebooks`"]
    executed = nbformat.read(executed_path(root, chapter.name), as_version=4)
    stored = nbformat.read(chapter.notebook, as_version=4)
    return [f"{name}, {said}" for said in (*noise_problems(executed), *differences(stored, executed))]


def main(root: Path = ROOT) -> int:
    """Execute and compare; prints the table of the chapters and every difference, and returns the exit status."""
    _, rows = execute_book(root)
    print(f"\n{table(rows)}\n")
    if not finished(rows):
        print("Nothing was compared: a chapter failed, see above.")
        return 1
    found = [said for chapter in chapters(root) for said in compare(chapter, root)]
    if found:
        print("\n".join(found))
        print("\nOutputs are not as stored. If that is meant, `make notebooks` stores the new ones.")
        return 1
    print("Every marked output is as stored.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
