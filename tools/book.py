"""Make the book: `python -m tools.book` executes the chapters and builds the site; `--store` keeps the outputs instead.

A chapter is executed again only if its source, kdlib, the data or the pinned packages have changed since the last time,
here or in `make test`; the site is built again only if a page has.  Both are told by the content of the files, not by
their dates.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat

from tools import site
from tools.chapters import ROOT, Chapter, chapters, read_source, strip
from tools.execute import Execution, execute
from tools.site import fingerprint

WORKERS = 2  # chapters side by side, each with one thread


@dataclass(frozen=True)
class Record:
    """The last execution of a chapter, as _build/book.json keeps it."""

    name: str
    seconds: float
    peak_mib: float
    result: str  # "ok" or "failed"
    fingerprint: str  # of everything the chapter was executed from


def execute_book(root: Path, force: bool = False) -> tuple[dict[str, Record], list[tuple[str, str, str, str]]]:
    """Execute the chapters that have changed, two side by side; after a failure none is begun.

    Returns the records by name and the rows of the closing table: chapter, seconds, MiB, result.
    """
    records, listed = _read_records(root), chapters(root)
    wanted = {chapter.name: chapter_fingerprint(chapter, root) for chapter in listed}
    fresh = {
        name
        for name, record in records.items()
        if record.result == "ok" and record.fingerprint == wanted.get(name) and executed_path(root, name).exists()
    }
    results = {name: "up to date" for name in fresh if not force}
    for chapter, run in _side_by_side([chapter for chapter in listed if chapter.name not in results], root):
        result = results[chapter.name] = "failed" if run.failure else "ok"
        record = Record(chapter.name, round(run.seconds, 1), round(run.peak_mib), result, wanted[chapter.name])
        records[chapter.name] = record
        _write_records(root, records)
        print(f"{chapter.name} {record.seconds:.1f} s", flush=True)
        if run.failure:
            print(f"\nchapters/{chapter.name}.ipynb {run.failure}\n", flush=True)
    rows = []
    for chapter in listed:
        if chapter.name not in results:
            rows.append((chapter.name, "", "", "not run"))
            continue
        record = records[chapter.name]
        rows.append((chapter.name, f"{record.seconds:.1f}", f"{record.peak_mib:.0f}", results[chapter.name]))
    return records, rows


def _side_by_side(waiting: list[Chapter], root: Path) -> Iterator[tuple[Chapter, Execution]]:
    """Execute chapters in order in two processes, and yield each when it ends; after a failure none is begun.

    A process of its own for each, because what a chapter takes is measured as that of all processes below this one.
    """
    if min(WORKERS, len(waiting)) < 2:  # a process more would only cost its start
        for chapter in waiting:
            run = execute_chapter(chapter, root)
            yield chapter, run
            if run.failure:
                return
        return
    waiting, running = list(waiting), {}
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        while waiting or running:
            while waiting and len(running) < WORKERS:
                chapter = waiting.pop(0)
                running[pool.submit(execute_chapter, chapter, root)] = chapter
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = future.result()
                if run.failure:
                    waiting.clear()
                yield running.pop(future), run


def execute_chapter(chapter: Chapter, root: Path) -> Execution:
    """Execute one chapter in an empty folder and keep the notebook with its outputs."""
    cwd = empty_folder(root / "_build" / "work" / chapter.name)
    return execute(read_source(chapter.source), executed_path(root, chapter.name), cwd=cwd)


def executed_path(root: Path, name: str) -> Path:
    """Where the executed notebook of a chapter is kept."""
    return root / "_build" / "executed" / f"{name}.ipynb"


def empty_folder(folder: Path) -> Path:
    """A new folder to run a chapter in: runs that an earlier version left must not be taken for this one's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def chapter_fingerprint(chapter: Chapter, root: Path) -> str:
    """Everything that a chapter's outputs depend on."""
    names = ("kdlib", "data", "requirements.lock", "tools/execute.py", "tools/offline")
    return fingerprint([chapter.source, *(root / name for name in names if (root / name).exists())], root)


def store(root: Path) -> None:
    """Write the executed chapters to chapters/*.ipynb, without whatever changes from run to run."""
    for chapter in chapters(root):
        stored = strip(nbformat.read(executed_path(root, chapter.name), as_version=4))
        text = nbformat.writes(stored) + "\n"
        if not chapter.notebook.exists() or chapter.notebook.read_text() != text:
            chapter.notebook.write_text(text)
            print(f"stored chapters/{chapter.name}.ipynb")


def finished(rows: list[tuple[str, str, str, str]]) -> bool:
    """Whether every chapter has been executed without a failure."""
    return all(row[3] in ("ok", "up to date") for row in rows)


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
    executed = finished(rows)
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
