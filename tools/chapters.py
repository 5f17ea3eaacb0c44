"""The chapters as files: what book.yml lists, the two forms of a chapter, and what must hold for every one of them.

`chapters/NN_name.py` (py:percent) is the source.  `chapters/NN_name.ipynb` has the same cells with stored outputs, for
reading and to compare with.  Every check here returns its complaints as sentences, none if all is well;
`python -m tools.chapters` prints them for the whole book and executes nothing.
"""

import ast
import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
PAPERMILL = ("11_pretraining", "12_glue")  # the chapters that take parameters
PREFACE = "00_preface"
MARK = "# NBVAL_CHECK_OUTPUT"  # the first line of a cell whose text output must not change
COMPARED = ("text/plain", "text/html", "text/markdown")  # beside what is printed
CELL_METADATA = ("tags", "mystnb")  # what a cell may say about itself; mystnb holds captions and alt texts
MAX_NOTEBOOK_BYTES = 500_000
MAX_FIGURE_BYTES = 60_000
NOTEBOOK_METADATA = {
    # papermill needs the language; versions are left out, so that a notebook does not change with the machine.
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    "jupytext": {"formats": "ipynb,py:percent"},
}


@dataclass(frozen=True)
class Chapter:
    """One chapter: its name, `01_distillation`, and its two files."""

    name: str
    source: Path
    notebook: Path


def chapters(root: Path = ROOT) -> list[Chapter]:
    """The chapters in the order of book.yml.

    Raises ValueError if book.yml lists none, or one whose source is missing.
    """
    book = yaml.safe_load((root / "book.yml").read_text())
    files = [entry["file"] for part in book["parts"] for entry in part["chapters"]]
    files = [file for file in files if file.startswith("chapters/")]  # the other pages belong to the site only
    if not files:
        raise ValueError("book.yml lists no chapter")
    found = [Chapter(Path(file).name, root / f"{file}.py", root / f"{file}.ipynb") for file in files]
    for chapter in found:
        if not chapter.source.exists():
            raise ValueError(f"book.yml lists chapters/{chapter.name}, but chapters/{chapter.name}.py is missing")
    return found


def unlisted(root: Path = ROOT) -> list[str]:
    """Files in chapters/ that belong to no chapter of book.yml."""
    listed = {path for chapter in chapters(root) for path in (chapter.source, chapter.notebook)}
    present = [path for pattern in ("*.py", "*.ipynb") for path in (root / "chapters").glob(pattern)]
    return [f"chapters/{path.name} is not in book.yml" for path in sorted(set(present) - listed)]


def read_source(source: Path) -> NotebookNode:
    """The notebook that a .py chapter describes: no outputs, fixed metadata, cell ids that depend on content only."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def source_hash(notebook: NotebookNode) -> str:
    """A hash of the cells without their outputs; stored with the outputs, it tells whether they are of this source."""
    cells = [[cell.cell_type, cell.source, kept_metadata(cell)] for cell in notebook.cells]
    return hashlib.sha256(repr(cells).encode()).hexdigest()[:16]


def strip(executed: NotebookNode) -> NotebookNode:
    """An executed notebook as it is stored: without times and papermill's notes, what was printed in one piece.

    What a cell printed to stderr is kept: progress bars are off, so it is a library's warning, and a complaint.
    """
    kept = nbformat.from_dict(executed)
    for cell in kept.cells:
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in CELL_METADATA if cell.metadata.get(key)})
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    kept.metadata = nbformat.from_dict(NOTEBOOK_METADATA | {"kdlib": {"outputs_of": source_hash(kept)}})
    return kept


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with what a cell prints in a row as one of them: in how many parts it comes is a matter of time."""
    found: list[NotebookNode] = []
    for output in outputs:
        last = found[-1] if found else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            found[-1] = nbformat.from_dict({**last, "text": last["text"] + output.text})
        else:
            found.append(output)
    return found


def kept_metadata(cell: NotebookNode) -> dict:
    """What a cell says about itself, without what tools add when they run it; in the order of the stored file."""
    kept = {key: cell.metadata[key] for key in CELL_METADATA if cell.metadata.get(key)}
    return {key: json.loads(json.dumps(value, sort_keys=True)) for key, value in kept.items()}


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """The code cells that carry a tag."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and tag in cell.metadata.get("tags", [])]


def problems(chapter: Chapter, root: Path = ROOT) -> list[str]:
    """Everything that is wrong with a chapter's files; the remedy is part of each sentence."""
    if not chapter.notebook.exists():
        return [f"chapters/{chapter.name}.ipynb is missing: run `make notebooks`"]
    source = read_source(chapter.source)
    stored = nbformat.read(chapter.notebook, as_version=4)
    found = [
        *pair_problems(source, stored),
        *output_problems(stored, root),
        *size_problems(chapter.notebook, stored),
        *caption_problems(stored),
        *mark_problems(stored),
        *parameter_problems(chapter.name, source),
        *agreement_problems(chapter.name, source, library_names(root)),
    ]
    return [f"chapters/{chapter.name}: {problem}" for problem in found]


def pair_problems(source: NotebookNode, stored: NotebookNode) -> Iterator[str]:
    """Where the .py and the .ipynb differ, cell by cell."""
    remedy = "run `make notebooks` (the .py is the source)"
    if len(source.cells) != len(stored.cells):
        yield f"the .py has {len(source.cells)} cells, the .ipynb {len(stored.cells)}: {remedy}"
    for number, (ours, theirs) in enumerate(zip(source.cells, stored.cells, strict=False), start=1):
        same_metadata = kept_metadata(ours) == kept_metadata(theirs)
        if (ours.cell_type, ours.source) != (theirs.cell_type, theirs.source) or not same_metadata:
            yield f"cell {number} differs between .py and .ipynb: {remedy}"
            if len(source.cells) != len(stored.cells):
                break  # from here on all are shifted
    if stored.metadata.get("kernelspec", {}).get("language") != "python":
        yield f"the .ipynb names no kernel language, papermill would refuse it: {remedy}"


def output_problems(stored: NotebookNode, root: Path = ROOT) -> Iterator[str]:
    """Outputs that are missing, out of order, of another source, errors, or tied to one machine."""
    code = [cell for cell in stored.cells if cell.cell_type == "code" and cell.source.strip()]
    yield from noise_problems(stored)
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        yield f"the cells were not run once, in order, from a fresh kernel (counts {counts}): run `make notebooks`"
    if code and not any(cell.outputs for cell in code):
        yield "no outputs are stored: run `make notebooks`"
    if stored.metadata.get("kdlib", {}).get("outputs_of") != source_hash(stored):
        yield "the stored outputs are not of these cells: run `make notebooks`"
    machine = re.compile(rf"at 0x[0-9a-f]{{6,}}|{re.escape(str(root))}|(?<![\w.~])/(home|root|Users|tmp)/")
    for number, cell in enumerate(stored.cells, start=1):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {number} stores an error, {output.ename}: {output.evalue}"
            for text in _texts(output):
                if match := machine.search(text):
                    yield f"the output of cell {number} shows {match[0]!r}, which is different on another machine"


def noise_problems(notebook: NotebookNode) -> Iterator[str]:
    """What was printed to stderr: progress bars are off, so it is a library's warning."""
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                noise = " ".join(output.text.split())[:200]
                yield f"cell {number} prints to stderr: {noise!r}; mend the cause, or filter it by name with the reason"


def size_problems(path: Path, stored: NotebookNode) -> Iterator[str]:
    """A notebook or a figure that is too large to be read and reviewed."""
    size = path.stat().st_size
    if size > MAX_NOTEBOOK_BYTES:
        yield f"the notebook has {size:,} bytes, {MAX_NOTEBOOK_BYTES:,} are allowed: draw smaller or fewer figures"
    for number, cell in enumerate(stored.cells, start=1):
        for output in cell.get("outputs", []):
            for kind, content in output.get("data", {}).items():
                if not kind.startswith("image/"):
                    continue
                figure = len(content) if kind == "image/svg+xml" else len(base64.b64decode(content))
                if figure > MAX_FIGURE_BYTES:
                    yield f"a figure of cell {number} has {figure:,} bytes, {MAX_FIGURE_BYTES:,} are allowed"


def caption_problems(stored: NotebookNode) -> Iterator[str]:
    """Figures that a reader who cannot see them, or does not know what to look at, gets nothing from."""
    for number, cell in enumerate(stored.cells, start=1):
        if not any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {})):
            continue
        said = cell.metadata.get("mystnb", {})
        if not said.get("image", {}).get("alt") or not said.get("figure", {}).get("caption"):
            example = '# %% mystnb={"image": {"alt": "..."}, "figure": {"caption": "..."}}'
            yield f"the figure of cell {number} needs an alt text and a caption: {example}"


def marked(cell: NotebookNode) -> bool:
    """Whether `make test` compares what a cell shows with what is stored."""
    return cell.cell_type == "code" and cell.source.splitlines()[:1] == [MARK]


def shown(cell: NotebookNode) -> dict[str, str]:
    """The text that a cell shows, by kind: what it prints ("stdout"), and its results as plain text, HTML, Markdown."""
    found: dict[str, str] = {}
    for output in cell.outputs:
        if output.get("name") == "stdout":
            found["stdout"] = found.get("stdout", "") + output.text
        for kind in COMPARED:
            if kind in output.get("data", {}):
                found[kind] = found.get(kind, "") + output.data[kind] + "\n"
    return found


def mark_problems(stored: NotebookNode) -> Iterator[str]:
    """A chapter whose outputs `make test` would not compare, and marks that compare nothing."""
    if not any(marked(cell) for cell in stored.cells):
        yield f"no output is compared: begin each cell that prints rounded or recorded numbers with {MARK!r}"
    for number, cell in enumerate(stored.cells, start=1):
        if marked(cell) and not shown(cell):
            yield f"cell {number} is marked {MARK!r}, but it shows no text to compare: take the mark away"
        if cell.cell_type == "code" and any(line.strip() == MARK for line in cell.source.splitlines()[1:]):
            yield f"cell {number} has {MARK!r} below its first line, where it does not count: move it up"


def parameter_problems(name: str, source: NotebookNode) -> Iterator[str]:
    """A papermill chapter has exactly one cell tagged `parameters`, any other chapter has none."""
    expected, count = int(name in PAPERMILL), len(tagged(source, "parameters"))
    if count != expected:
        yield f"{count} cells are tagged 'parameters', expected {expected}"


def library_names(root: Path = ROOT) -> dict[str, set[str]]:
    """The public functions and classes of kdlib and the modules that define each, read without importing anything."""
    names: dict[str, set[str]] = {}
    for path in sorted((root / "kdlib").rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for name in _definitions(ast.parse(path.read_text())):
            if not name.startswith("_"):
                names.setdefault(name, set()).add(module)
    return names


def agreement_problems(name: str, source: NotebookNode, library: dict[str, set[str]]) -> Iterator[str]:
    """Definitions that a chapter shares with kdlib by name and does not compare with it.

    The convention: a chapter defines its own small versions, and a cell tagged `agrees` imports the library's version
    under another name, or as an attribute of its module, and asserts that both give the same.  That they do is shown by
    running the chapter; that no shared name is forgotten is shown here.
    """
    if name == PREFACE or name in PAPERMILL:
        return
    agreeing = tagged(source, "agrees")
    if not agreeing:
        yield "no cell is tagged 'agrees': compare the chapter's own definitions with kdlib's in one"
    compared: set[str] = set()
    for cell in agreeing:
        tree = _parse(cell)
        if not any(_asserts(node) for node in ast.walk(tree)):
            yield f"the cell tagged 'agrees' that begins {cell.source.splitlines()[0]!r} asserts nothing"
            continue
        own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        compared |= own & _library_references(tree, library)
    cells = [cell for cell in source.cells if cell.cell_type == "code" and cell not in agreeing]
    defined = [definition for cell in cells for definition in _definitions(_parse(cell))]
    for shared in sorted(set(defined) & library.keys() - compared):
        where = " or ".join(sorted(library[shared]))
        yield f"{shared} is defined here and in {where}, but no cell tagged 'agrees' compares the two"


def setup_cell(root: Path = ROOT) -> str:
    """The cell that installs kdlib where it is missing, as it stands in the preface."""
    (cell,) = tagged(read_source(root / "chapters" / f"{PREFACE}.py"), "setup")
    return cell.source


def setup_problems(source: NotebookNode, wanted: str) -> Iterator[str]:
    """The first code cell, and no other, is the preface's set-up cell: a chapter runs wherever it is opened."""
    code = [cell.source for cell in source.cells if cell.cell_type == "code"]
    if code[:1] != [wanted] or len(tagged(source, "setup")) != 1:
        yield f"the first code cell must be the set-up cell of {PREFACE}.py, tag included: copy it from there"


def _definitions(tree: ast.Module) -> list[str]:
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def _parse(cell: NotebookNode) -> ast.Module:
    """The syntax tree of a code cell; IPython's own lines (%matplotlib, !ls) are left out."""
    lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    return ast.parse("\n".join(lines))


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return called.startswith("assert_")


def _library_references(tree: ast.Module, library: dict[str, set[str]]) -> set[str]:
    """The names that a cell takes from kdlib: `from kdlib.losses import f as g` or `losses.f`."""
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kdlib"
        for alias in node.names
        if alias.asname not in (None, alias.name)  # the plain name would hide the chapter's own version
    }
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and any(ast.unparse(node.value) in (module, module.rpartition(".")[2]) for module in library.get(node.attr, ()))
    }
    return imported | attributes


def _texts(output: NotebookNode) -> Iterator[str]:
    """Whatever text an output shows."""
    yield output.get("text", "")
    for kind, content in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield content


def main(root: Path = ROOT) -> int:
    """Print everything that is wrong with the chapters' files, executing nothing; returns the exit status."""
    found = [*unlisted(root)]
    for chapter in chapters(root):
        found += problems(chapter, root)
        complaints = setup_problems(read_source(chapter.source), setup_cell(root))
        found += [f"chapters/{chapter.name}: {complaint}" for complaint in complaints]
    print("\n".join(found) or f"{len(chapters(root))} chapters, each with its .ipynb")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
