"""Write docs/papers.md, the page "From paper to code", from data/ledger.yml: `python -m tools.ledger`.

The ledger says of every equation, algorithm, figure and table of the four papers where it stands in the book, in kdlib
and in the tests; of tables that a study file computes, also which of its rows have a method here, and which of these
have run.  `problems` says what in it is not true; nothing is imported or executed for that.
"""

import ast
import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tools import api

ROOT = Path(__file__).resolve().parents[1]
LEDGER = "data/ledger.yml"
PAGE = "docs/papers.md"
STATUSES = ("derived", "measured", "shown", "not yet", "left out")
DATA = r"\bdigits\b|MiniGLUE|mini-corpus|SST-2"
"""What a remark on a measurement has to name: the data that it was made on."""
KINDS = {"": "equation", "alg": "algorithm", "fig": "figure", "tab": "table"}


class Paper(NamedTuple):
    """A paper: what docstrings call it, what it is, and how many equations, algorithms, figures and tables it has."""

    name: str
    work: str
    counts: tuple[int, int, int, int]


PAPERS = {
    "lgtm": Paper("LGTM", "*Tailoring Instructions to Student's Learning Levels Boosts …*, ACL 2023", (19, 1, 6, 7)),
    "metadistil": Paper("MetaDistil", "*Meta Learning for Knowledge Distillation*, 2021", (3, 1, 5, 3)),
    "ikd": Paper("IKD", "*Learning to Teach with Student Feedback*, 2021", (16, 0, 5, 4)),
    "tutor": Paper("Tutor-KD", "*Tutoring Helps Students Learn Better …*, EMNLP 2022", (14, 0, 3, 6)),
}

HEAD = """\
---
html_theme.sidebar_secondary.remove: true
---

# From paper to code

<!-- Written by `make pages` from data/ledger.yml. Do not edit. -->

Every numbered equation, algorithm, figure and table of the four papers, and what became of it in this book. The
meanings are in our words and our notation, see {{doc}}`notation`.

- *derived*: a chapter derives it, and the tests named beside it fail if the code says something else
- *measured*: a chapter measures its counterpart, on data and networks of our size; the remark says on which
- *shown*: a drawing, or a table of settings, in which there is nothing to measure
- *not yet*: with what is there already, and what is missing
- *left out*: by choice, with the reason

{counts}

No table was computed at a paper's size: that takes GPUs, the hub and the files in `experiments/tables` or `configs`. Of
the tables that have a file in `experiments/tables`, a second list says which of their rows kdlib has a method for, and
in which chapters that ran at the size of this book: tiny networks on MiniGLUE, in chapters 11 and 12 larger ones on
small parts of one and of two real tasks. Data sets and networks that do not exist here are named in the remarks.

The numbers that the papers print in their tables are in `data/published`, but for one table of example sentences.
"""

COLUMNS = ("id", "what it says", "in the book", "in kdlib", "tests", "status")


@dataclass(frozen=True)
class Entry:
    """One line of the ledger; data/ledger.yml explains the fields."""

    id: str
    meaning: str
    status: str
    anchor: str = ""
    functions: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    why: str = ""
    transcribed: str = ""
    study: str = ""
    no_arm: Mapping[str, str] = field(default_factory=dict)

    @property
    def paper(self) -> str:
        """The paper's key in PAPERS."""
        return self.id.split("-")[0]

    @property
    def kind(self) -> str:
        """Equation, algorithm, figure or table."""
        return KINDS.get(re.sub(r"\d+$", "", self.id.split("-")[-1]), "thing of another kind")


def read(root: Path = ROOT) -> list[Entry]:
    """The ledger.

    Raises ValueError for an entry with a field that is missing or unknown.
    """
    entries = []
    for given in yaml.safe_load((root / LEDGER).read_text()):
        unknown = given.keys() - {field.name for field in fields(Entry)}
        missing = {"id", "meaning", "status"} - given.keys()
        if unknown or missing:
            raise ValueError(f"{LEDGER}, {given.get('id')}: unknown {sorted(unknown)}, missing {sorted(missing)}")
        entries.append(
            Entry(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
        )
    return entries


# What there is to point to


def every_id() -> list[str]:
    """The ids that there must be, in the order of the papers."""
    return [
        f"{key}-{prefix}{number}"
        for key, paper in PAPERS.items()
        for prefix, count in zip(KINDS, paper.counts, strict=True)
        for number in range(1, count + 1)
    ]


def cited(text: str) -> list[str]:
    """The ids that a text such as "LGTM eqs. (8), (12)-(17) and Figure 3; IKD section 2" cites.

    A number belongs to the last kind and the last paper named before it.  A semicolon ends a paper's numbers, and so
    does a year in brackets, because another work is meant then.  Sections and lines have no entries in the ledger.
    """
    keys = {paper.name: key for key, paper in PAPERS.items()}
    prefixes = {word: prefix for prefix, word in KINDS.items()} | {"eq.": "", "eqs.": ""}
    names = "|".join(map(re.escape, keys))
    pattern = rf"(?P<paper>\b(?:{names})\b)|(?P<end>;|\(\d{{4}}\))"
    pattern += r"|(?P<kind>\beqs?\.|\b(?:algorithm|figure|table|section|line)s?\b)"
    pattern += r"|(?P<bracket>\()?\b(?P<first>\d+)\b\)?(?:\s*[-–]\s*\(?(?P<last>\d+)\)?)?"
    paper, kind, found = None, None, []
    for match in re.finditer(pattern, text, re.IGNORECASE):
        if match["paper"]:
            paper, kind = next(key for name, key in keys.items() if name.lower() == match["paper"].lower()), None
        elif match["end"]:
            paper = None
        elif match["kind"]:
            word = match["kind"].lower()
            kind = prefixes.get(word, prefixes.get(word.rstrip("s")))
        elif paper and kind is not None and (kind or match["bracket"]):
            last = int(match["last"] or match["first"])
            found += [f"{paper}-{kind}{number}" for number in range(int(match["first"]), last + 1)]
    return list(dict.fromkeys(found))


def docstrings(root: Path) -> dict[str, tuple[str, str]]:
    """By dotted name, the site's link to a public thing of kdlib, and its docstring; a method's link is its class's."""
    found = {}
    for entry in (entry for entries in api.modules(root).values() for entry in entries):
        name = f"{entry.module}.{entry.name}".rstrip(".")
        found[name] = (entry.link, entry.doc)
        found |= {f"{name}.{member.name}": (entry.link, member.doc) for member in entry.members}
    return found


def sources(doc: str) -> str:
    """What a docstring says under `Source:`, on one line."""
    parts = re.findall(r"\bSource:(.*?)(?=\bDerived in:|\n\s*\n|\Z)", doc, re.DOTALL)
    return "; ".join(" ".join(part.split()) for part in parts)


def anchors(root: Path) -> dict[str, str]:
    """By `chapters/NN_name#label`, the text of the link: all labelled equations and figures, and the headings."""
    found = {}
    for path in sorted((root / "chapters").glob("*.py")):
        chapter, text = f"chapters/{path.stem}", path.read_text()
        for label in re.findall(r"\$\$ \(([\w-]+)\)$", text, re.MULTILINE):
            found[f"{chapter}#{label}"] = f"{{eq}}`{label}`"
        for label in re.findall(r'^# %% mystnb=.*"name": "([\w-]+)"', text, re.MULTILINE):
            found[f"{chapter}#{label}"] = f"{{numref}}`{label}`"
        for title in re.findall(r"^# ##{1,2} (.+)$", text, re.MULTILINE):
            label = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")  # as MyST makes it
            found[f"{chapter}#{label}"] = f"[{title}]({chapter}.ipynb#{label})"
    return found


def tests(root: Path) -> set[str]:
    """Every test as `path::name` or `path::Class::name`."""
    found = set()
    for path in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            place = path.relative_to(root).as_posix()
            if isinstance(node, ast.FunctionDef):
                found.add(f"{place}::{node.name}")
            elif isinstance(node, ast.ClassDef):
                found |= {f"{place}::{node.name}::{inner.name}" for inner in node.body if hasattr(inner, "name")}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def announced(root: Path) -> dict[str, set[str]]:
    """By chapter, the ids that the row "Papers" of its head announces."""
    found = {}
    for path in sorted((root / "chapters").glob("*.py")):
        row = re.search(r"^# \| Papers \| (.*) \|$", path.read_text(), re.MULTILINE)
        found[f"chapters/{path.stem}"] = set(cited(row[1])) if row else set()
    return found


@dataclass(frozen=True)
class Way:
    """How a student is taught, as far as the papers' tables tell ways apart: a method, and what else has a row of its
    own."""

    method: str
    objective: str | None = None
    patient: bool = False
    pilot_update: bool = True
    student: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any], student: str | None = None) -> "Way":
        """That of a run's settings: `pkd` and `dist` are `kd` with an objective of their own."""
        method, objective = settings["method"], settings.get("objective")
        patient = method == "pkd" or bool(settings.get("pkd_weight"))
        objective = "dist" if method == "dist" else objective if objective in ("dist", "logit_mse") else None
        pilot = settings.get("pilot_update") is not False
        return cls("kd" if method in ("pkd", "dist") else method, objective, patient, pilot, student)


def arms(root: Path, study: str) -> dict[str, dict[str, Any]]:
    """The arms of a study file, each with what it takes from others; `common` and rules are left out."""
    own = yaml.safe_load((root / study).read_text())["arms"]

    def whole(name: str) -> dict[str, Any]:
        return {**(whole(own[name]["like"]) if "like" in own[name] else {}), **own[name]}

    return {name: whole(name) for name in own}


def ways(root: Path, study: str) -> dict[str, Way]:
    """How each arm of a study file teaches, its teacher's own row left out."""
    found = {name: arm for name, arm in arms(root, study).items() if name != "teacher"}
    return {name: Way.of(arm, arm.get("student")) for name, arm in found.items()}


def methods(root: Path) -> set[str]:
    """The names in kdlib's METHODS."""
    tree = ast.parse((root / "kdlib" / "methods" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "METHODS":
            return {key.value for key in node.value.keys}
    return set()


def on_record(root: Path) -> dict[Way, list[int]]:
    """The chapters whose records in data/runs have a run of a way, on tasks with classes; their students are ours."""
    found: dict[Way, set[int]] = {}
    for path in sorted((root / "data" / "runs").glob("[0-9]*/*.json")):
        config = json.loads(path.read_text()).get("config", {})
        if "task" in config and not config["task"].endswith("stsb"):
            found.setdefault(Way.of(config), set()).add(int(path.parent.name[:2]))
    return {way: sorted(chapters) for way, chapters in found.items()}


def printed(root: Path, entry: Entry) -> set[str]:
    """The methods that have a row of scores in a table, as far as it is transcribed."""
    if not entry.transcribed:
        return set()
    with (root / entry.transcribed).open(newline="") as lines:
        return {row["method"] for row in csv.DictReader(lines) if row["table"] == entry.id} - {"all"}


# What must hold


def problems(entries: list[Entry], root: Path = ROOT) -> list[str]:
    """Everything in the ledger that is not true, as sentences; none if all is well."""
    return [
        *id_problems([entry.id for entry in entries]),
        *(f"{entry.id}: {said}" for entry in entries for said in field_problems(entry)),
        *place_problems(entries, root),
        *source_problems(entries, root),
        *transcription_problems(entries, root),
        *study_problems(entries, root),
    ]


def id_problems(ids: list[str]) -> Iterator[str]:
    """Each thing that the papers number stands there once, in the papers' order."""
    wanted = every_id()
    for name in dict.fromkeys(ids):
        if name not in wanted:
            yield f"{name}: no paper has this"
        if ids.count(name) > 1:
            yield f"{name}: stands there {ids.count(name)} times"
    yield from (f"{name}: is missing" for name in wanted if name not in ids)
    known = [name for name in dict.fromkeys(ids) if name in wanted]
    if known != sorted(known, key=wanted.index):
        yield "the entries are not in the order of the papers"


def field_problems(entry: Entry) -> Iterator[str]:
    """What its status and its kind ask of an entry."""
    if entry.status not in STATUSES:
        yield f"status is {entry.status!r}, expected one of {', '.join(STATUSES)}"
    for text in (entry.meaning, entry.why):
        if re.search(r"[|$<>*_`\n]", text):
            yield f"what would be markup on the page: {text!r}"
    if not 10 < len(entry.meaning) < 160:
        yield f"the meaning has {len(entry.meaning)} characters"
    theory = entry.kind in ("equation", "algorithm")
    if entry.status in ("derived", "measured", "shown"):
        if not entry.anchor and entry.status != "shown":
            yield f"{entry.status}, but no anchor says where"
        if theory != (entry.status == "derived"):
            yield f"{entry.status} is for {'figures and tables' if theory else 'equations and algorithms'}"
    elif entry.anchor:
        yield f"{entry.status}, but it has an anchor"
    if entry.status != "derived" and not entry.why:
        yield f"{entry.status}, but no remark says on what, where or why"
    if entry.status == "measured" and entry.why and not re.search(DATA, entry.why):
        yield f"measured, but the remark does not say on which data: {entry.why!r}"
    if entry.no_arm and not entry.study:
        yield "rows without an arm, but no study has the others"
    if entry.status == "left out" and (entry.functions or entry.tests):
        yield "left out, but it has functions or tests"
    if (entry.status == "derived" or entry.functions) and not entry.tests:
        yield "no test holds it to the code"


def place_problems(entries: list[Entry], root: Path) -> Iterator[str]:
    """Anchors, functions and tests exist, and chapters and docstrings agree on what is derived where."""
    places, known, checks, heads = anchors(root), docstrings(root), tests(root), announced(root)
    for entry in entries:
        chapter = entry.anchor.split("#")[0]
        if entry.anchor and entry.anchor not in places:
            yield f"{entry.id}: there is no {entry.anchor}"
        elif entry.anchor and entry.id not in heads[chapter]:
            yield f"{entry.id}: stands in {chapter}, whose head does not announce it"
        for name in entry.functions:
            if name not in known:
                yield f"{entry.id}: there is no {name}"
        for name in entry.tests:
            if name not in checks:
                yield f"{entry.id}: there is no test {name}"
        said = [known[name][1] for name in entry.functions if name in known]
        if entry.status == "derived" and said and not any(chapter in doc.partition("Derived in:")[2] for doc in said):
            yield f"{entry.id}: none of its functions says that it is derived in {chapter}"
    for chapter, names in heads.items():
        yield from (f"{chapter} announces {name}, which no paper has" for name in sorted(names - set(every_id())))


def source_problems(entries: list[Entry], root: Path) -> Iterator[str]:
    """A docstring cites an equation if and only if the ledger names the function there."""
    listed = {(entry.id, name) for entry in entries for name in entry.functions}
    said = set()
    for name, (_, doc) in docstrings(root).items():
        source = sources(doc)
        said |= {(id, name) for id in cited(source)}
        if "section" not in source and not cited(source) and any(paper.name in source for paper in PAPERS.values()):
            yield f"{name} names a paper under Source, but nothing in it: {source!r}"
    yield from (f"{name} cites {id}, but the ledger does not name it there" for id, name in sorted(said - listed))
    yield from (f"{id}: names {name}, whose docstring does not cite it" for id, name in sorted(listed - said))


def transcription_problems(entries: list[Entry], root: Path) -> Iterator[str]:
    """A table is said to be transcribed if and only if its numbers are in data/published."""
    there = set()
    for path in sorted((root / "data" / "published").glob("*.csv")):
        with path.open(newline="") as lines:
            there |= {(row["table"], path.relative_to(root).as_posix()) for row in csv.DictReader(lines)}
    said = {(entry.id, entry.transcribed) for entry in entries if entry.transcribed}
    yield from (f"{id}: its numbers are in {path}, which the ledger does not say" for id, path in sorted(there - said))
    yield from (f"{id}: its numbers are not in {path}" for id, path in sorted(said - there))


def study_problems(entries: list[Entry], root: Path) -> Iterator[str]:
    """Every study of a table is named, and has an arm, by a method that exists, for each row without a reason."""
    named, known = [entry.study for entry in entries if entry.study], methods(root)
    for path in sorted((root / "experiments" / "tables").glob("*.yml")):
        if (name := path.relative_to(root).as_posix()) not in named:
            yield f"{name} is named by no entry"
    for entry in entries:
        if not entry.study:
            continue
        if not (root / entry.study).exists():
            yield f"{entry.id}: there is no {entry.study}"
            continue
        there, rows = arms(root, entry.study), printed(root, entry)
        yield from (f"{entry.id}: no arm for {row}" for row in sorted(rows - there.keys() - entry.no_arm.keys()))
        yield from (f"{entry.id}: {row} has no arm, it says, but it has" for row in entry.no_arm.keys() & there.keys())
        yield from (f"{entry.id}: no row is called {row}" for row in entry.no_arm.keys() - rows)
        for arm, settings in there.items():
            if settings["method"] not in known:
                yield f"{entry.id}: arm {arm} has method {settings['method']}, which kdlib does not have"


# The page


def page(entries: list[Entry], root: Path = ROOT) -> str:
    """The whole page; `problems` must have found none."""
    places, known = anchors(root), docstrings(root)
    parts = [HEAD.format(counts=count_table(entries))]
    for key, paper in PAPERS.items():
        rows = [row(entry, places, known) for entry in entries if entry.paper == key]
        parts.append("\n".join([f"## {paper.name}", "", f"{paper.work}.", "", *table(COLUMNS, rows), ""]))
        if of_tables := table_rows([entry for entry in entries if entry.paper == key and entry.study], root):
            title = f"### The rows of {paper.name}'s tables"
            parts.append("\n".join([title, "", *table(("row", "method", "tables", "run at our size"), of_tables), ""]))
    return "\n".join(parts)


def count_table(entries: list[Entry]) -> str:
    """How many of each kind have which status."""
    rows = []
    for kind in KINDS.values():
        states = [entry.status for entry in entries if entry.kind == kind]
        rows.append([f"{kind}s", *(str(states.count(status)) for status in STATUSES), str(len(states))])
    return "\n".join(table(("", *STATUSES, "all"), rows))


def table_rows(entries: list[Entry], root: Path) -> list[list[str]]:
    """A line for each row of the tables that have a study: its method here, the tables, and where it ran."""
    ran = on_record(root)
    numbers: dict[tuple[str, Way | str], list[str]] = {}
    for entry in entries:
        there, rows = ways(root, entry.study), printed(root, entry)
        for name in [name for name in (*there, *entry.no_arm) if name in rows]:
            how = there.get(name) or entry.no_arm[name]
            numbers.setdefault((name, how), []).append(entry.id.partition("-tab")[2])
    return [[name, *_told(how, ", ".join(tables), ran)] for (name, how), tables in numbers.items()]


def _told(how: Way | str, tables: str, ran: Mapping[Way, list[int]]) -> tuple[str, str, str]:
    """The cells of a row after its name: method, tables, and where it ran."""
    if isinstance(how, str):
        return "none", tables, f"no; {how}"
    names = {Way("kd", patient=True): "pkd", Way("kd", objective="dist"): "dist"}
    name = names.get(how, how.method)
    more = [f"objective {how.objective}"] if how.objective not in (None, name) else []
    more += ["with PKD's term"] if how.patient and name != "pkd" else []
    more += [] if how.pilot_update else ["without the pilot update"]
    more += [f"from {how.student}"] if how.student else []
    chapters = ran.get(how, [])
    places = f"chapter{'s' if len(chapters) > 1 else ''} {', '.join(map(str, chapters))}" if chapters else "no"
    return ", ".join([f"`{name}`", *more]), tables, places


def row(entry: Entry, places: dict[str, str], known: dict[str, tuple[str, str]]) -> list[str]:
    """The cells of one entry; a test's name is shown in words."""
    place = ""
    if entry.anchor:
        place = f"chapter {int(re.search(r'[0-9]+', entry.anchor)[0])}, {places[entry.anchor]}"
    functions = [known[name][0] for name in entry.functions]
    checks = [f"`{test.split('::')[0]}`: {in_words(test)}" for test in entry.tests]
    status = f"{entry.status}; {entry.why}" if entry.why else entry.status
    return [entry.id, entry.meaning, place, ", ".join(functions), "; ".join(checks), status]


def in_words(test: str) -> str:
    """`tests/test_a.py::TestTheStep::test_it_goes_down` as "the step: it goes down"."""
    *classes, name = test.split("::")[1:]
    parts = [re.sub(r"(?<!^)(?=[A-Z])", " ", part.removeprefix("Test")).lower() for part in classes]
    return ": ".join([*parts, name.removeprefix("test_").replace("_", " ")])


def table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A table's lines in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def main(root: Path = ROOT) -> int:
    """Write the page, unless the ledger is wrong; returns the exit status."""
    entries = read(root)
    if complaints := problems(entries, root):
        print("\n".join(complaints))
        return 1
    path, text = root / PAGE, page(entries, root)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
        print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
