"""Bring the tables of README.md up to date: `python -m tools.readme`.

What stands between `<!-- NAME -->` and `<!-- end of NAME -->` is written here: the chapters from book.yml and their
titles, the results from the run records under data/runs.  No number of a table in the README is typed.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from kdlib import models, records, runs
from tools.chapters import ROOT, chapters, read_source

README = "README.md"


def chapter_table(root: Path = ROOT) -> str:
    """One row a chapter: its number, its title with a link, and the part of the book."""
    book = yaml.safe_load((root / "book.yml").read_text())
    parts = {Path(entry["file"]).name: part["caption"] for part in book["parts"] for entry in part["chapters"]}
    rows = ["| | chapter | part |", "|---:|---|---|"]
    for chapter in chapters(root):
        number, title = int(chapter.name.split("_")[0]), _title(read_source(chapter.source).cells[0].source)
        rows.append(f"| {number} | [{title}](chapters/{chapter.notebook.name}) | {parts[chapter.name]} |")
    return "\n".join(rows)


def result_table(root: Path = ROOT) -> str:
    """Test accuracy of every setting on record for MiniGLUE: mean and standard deviation over seeds, in per cent.

    Of the distilled students, and of each network alone, only the settings with the most seeds: the sweeps with fewer
    belong to their chapters.
    """
    settings: dict[str, list[runs.RunRecord]] = {}
    for path in sorted((root / "data" / "runs").rglob("*.json")):
        record = runs.read_record(path) if records.is_record(path) else None
        if record is not None and "test/accuracy" in record.metrics and record.config["source"] == "miniglue":
            identity = {n: v for n, v in runs.configure(**record.config).identity.items() if n != "seed"}
            settings.setdefault(json.dumps(identity), []).append(record)
    most: dict[tuple[str, str], int] = {}
    for found in settings.values():
        rival = _rival(found[0].config)
        most[rival] = max(len(found), most.get(rival, 0))
    rows = []
    for found in settings.values():
        config = found[0].config
        if len(found) < most[_rival(config)]:
            continue
        scores = [100 * record.metrics["test/accuracy"] for record in found]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        cells = [config["task"], config["student"], _lesson(config), f"{mean(scores):.1f}{spread}", str(len(scores))]
        rows.append((config["task"], -mean(scores), f"| {' | '.join(cells)} |"))
    if not rows:
        return "No runs are on record: `make experiments` makes them."
    head = ["| task | network | learns from | test accuracy, % | seeds |", "|---|---|---|---:|---:|"]
    lines = [line for _, _, line in sorted(rows)]
    alike = {line.rsplit("|", 3)[0] for line in lines}
    if len(alike) < len(lines):
        raise ValueError("two settings look alike in the README's results: say in _lesson how they differ")
    return "\n".join(head + lines)


def _rival(config: dict[str, Any]) -> tuple[str, str]:
    """What a setting shares with those that it stands beside: the task, and the network if that learned alone."""
    return config["task"], config["student"] if config["method"] == "fine_tune" else ""


def _lesson(config: dict[str, Any]) -> str:
    """What a network learned from, in a few words: only what is not the default of every record."""
    if config["method"] == "fine_tune":
        return "the labels"
    teacher = "the book's tiny-4x128" if config["teacher"] == models.BOOK_TEACHER else config["teacher"]
    words = [f"{teacher} by {config['method']}", f"α = {config['alpha']:g}", f"T = {config['temperature']:g}"]
    return ", ".join(words + ([config["objective"]] if config["objective"] != "kl" else []))


def glue_table(root: Path = ROOT) -> str:
    """Validation accuracy on real GLUE, in per cent, by method: a column for each task, of the study 12_glue.

    The teacher's row is that of its fine-tuning, before it teaches.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for path in sorted((root / "data" / "runs" / "12_glue").glob("*.json")):
        record = runs.read_record(path)
        alone = record.config["method"] == "fine_tune"
        teacher = alone and record.config["student_layers"] is None
        who = "the teacher alone" if teacher else "the student alone" if alone else _method(record.config)
        task = f"{record.config['task']}, {record.samples['train']:,} rows"
        scores.setdefault(who, {}).setdefault(task, []).append(100 * record.metrics["validation/accuracy"])
    tasks = sorted({task for row in scores.values() for task in row}, reverse=True)
    if not tasks:
        return "No runs are on record: `python -m kdlib study experiments/12_glue.yml` makes them."
    head = [f"| learns by | {' | '.join(tasks)} |", f"|---|{'---:|' * len(tasks)}"]
    order = sorted(scores, key=lambda who: (not who.startswith("the "), who))
    rows = [f"| {who} | {' | '.join(_spread(scores[who].get(task, [])) for task in tasks)} |" for who in order]
    return "\n".join(head + rows)


def _method(config: dict[str, Any]) -> str:
    """The name of a method, with its variant where it has some."""
    variant = config.get("influence")
    return config["method"] + (f", {variant}" if variant else "")


def _spread(scores: list[float]) -> str:
    """Mean ± standard deviation (number of seeds)."""
    if not scores:
        return ""
    several = f" ± {stdev(scores):.1f} ({len(scores)} seeds)" if len(scores) > 1 else " (1 seed)"
    return f"{mean(scores):.1f}{several}"


TABLES: dict[str, Callable[[Path], str]] = {
    "chapters": chapter_table,
    "results": result_table,
    "glue": glue_table,
}


def rendered(text: str, root: Path = ROOT) -> str:
    """The README with its tables as they should be.

    Raises ValueError if a table's markers are not there exactly once.
    """
    for name, table in TABLES.items():
        between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
        if len(between.findall(text)) != 1:
            raise ValueError(f"README.md needs <!-- {name} --> and <!-- end of {name} --> once, each on its own line")
        made = f"\n{table(root)}\n\n"
        text = between.sub(lambda _, made=made: made, text)
    return text


def main(root: Path = ROOT) -> int:
    """Write the tables into README.md; returns the exit status."""
    path = root / README
    before = path.read_text()
    after = rendered(before, root)
    if after != before:
        path.write_text(after)
        print(f"wrote the tables of {README}")
    return 0


def _title(cell: str) -> str:
    """The first heading of a chapter."""
    return re.search(r"^# (.+)$", cell, re.MULTILINE)[1].strip()


if __name__ == "__main__":
    sys.exit(main())
