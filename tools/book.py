"""Make the book: `python -m tools.book` executes the chapters and builds the site; `--store` keeps the outputs instead.

A chapter is executed again only if its source, kdlib, the data or the pinned packages have changed since the last time;
the site is built again only if a page has.  Both are told by the content of the files, not by their dates.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat

from tools import site
from tools.chapters import ROOT, Chapter, chapters, read_source, strip
from tools.execute import execute
from tools.site import fingerprint


@dataclass(frozen=True)
class Record:
    """The last execution of a chapter, as _build/book.json keeps it."""

    name: str
    seconds: float
    peak_mib: float
    result: str  # "ok" or "failed"
    fingerprint: str  # of everything the chapter was executed from


def execute_book(root: Path, force: bool = False) -> tuple[dict[str, Record], list[tuple[str, str, str, str]]]:
    """Execute the chapters in order until one fails.

    Returns the records by name and the rows of the closing table: chapter, seconds, MiB, result.
    """
    build, records, rows = root / "_build", _read_records(root), []
    failed = False
    for chapter in chapters(root):
        if failed:
            rows.append((chapter.name, "", "", "not run"))
            continue
        wanted = chapter_fingerprint(chapter, root)
        record = records.get(chapter.name)
        executed = build / "executed" / f"{chapter.name}.ipynb"
        fresh = record is not None and record.result == "ok" and record.fingerprint == wanted and executed.exists()
        if not fresh or force:
            print(f"{chapter.name} ...", end=" ", flush=True)
            run = execute(read_source(chapter.source), executed, cwd=empty_folder(build / "work" / chapter.name))
            failed = run.failure is not None
            result = "failed" if failed else "ok"
            record = Record(chapter.name, round(run.seconds, 1), round(run.peak_mib), result, wanted)
            records[chapter.name] = record
            _write_records(root, records)
            print(f"{record.seconds:.1f} s", flush=True)
            if failed:
                print(f"\nchapters/{chapter.name}.ipynb {run.failure}\n", flush=True)
        rows.append(
            (
                chapter.name,
                f"{record.seconds:.1f}",
                f"{record.peak_mib:.0f}",
                "up to date" if fresh and not force else record.result,
            )
        )
    return records, rows


def empty_folder(folder: Path) -> Path:
    """A new folder to run a chapter in: runs that an earlier version left must not be taken for this one's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def chapter_fingerprint(chapter: Chapter, root: Path) -> str:
    """Everything that a chapter's outputs depend on."""
    names = ("kdlib", "data", "requirements.lock", "tools/execute.py")
    return fingerprint([chapter.source, *(root / name for name in names if (root / name).exists())], root)


def store(root: Path) -> None:
    """Write the executed chapters to chapters/*.ipynb, without whatever changes from run to run."""
    for chapter in chapters(root):
        stored = strip(nbformat.read(root / "_build" / "executed" / f"{chapter.name}.ipynb", as_version=4))
        text = nbformat.writes(stored) + "\n"
        if not chapter.notebook.exists() or chapter.notebook.read_text() != text:
            chapter.notebook.write_text(text)
            print(f"stored chapters/{chapter.name}.ipynb")


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """The closing table: chapter, seconds, MiB, result."""
    lines = [("chapter", "seconds", "MiB", "result"), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}  {seconds:>{widths[1]}}  {mib:>{widths[2]}}  {result}"
        for name, seconds, mib, result in lines
    )


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.book", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--store", action="store_true", help="store the outputs in chapters/*.ipynb instead of building the site"
    )
    parser.add_argument("--force", action="store_true", help="execute every chapter, up to date or not")
    options = parser.parse_args(arguments)
    records, rows = execute_book(root, options.force)
    executed = all(row[3] in ("ok", "up to date") for row in rows)
    built = False
    if executed and options.store:
        store(root)
    elif executed:
        costs = {name: site.Cost(record.seconds, record.peak_mib) for name, record in records.items()}
        built = site.build(root, root / "_build", root / "_build" / "executed", costs)
    print(f"\n{table(rows)}\n")
    if not executed:
        print("The book stopped at the cell shown above; no site was built.")
    elif not options.store:
        page = root / "_build" / "html" / "index.html"
        print(f"The site: {page}" if built else "The site was not built: Sphinx's complaints are above.")
    return 0 if executed and (built or options.store) else 1


def _read_records(root: Path) -> dict[str, Record]:
    path = root / "_build" / "book.json"
    if not path.exists():
        return {}
    return {entry["name"]: Record(**entry) for entry in json.loads(path.read_text())["chapters"]}


def _write_records(root: Path, records: dict[str, Record]) -> None:
    """In the order of the book; chapters that are gone are dropped."""
    kept = [asdict(records[chapter.name]) for chapter in chapters(root) if chapter.name in records]
    (root / "_build" / "book.json").write_text(json.dumps({"chapters": kept}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
