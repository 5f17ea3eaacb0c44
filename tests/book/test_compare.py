"""Comparing executed chapters with what is stored: every marked output of the book, falsified, must be seen."""

import copy
import re
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import book, chapters, compare
from tools.compare import differences

REAL = chapters.chapters()
MARK = chapters.MARK


def falsified(text):
    """The text with its last digit, or else its last letter, replaced by another."""
    place = [*re.finditer(r"\d", text)] or [*re.finditer(r"\w", text)] or [*re.finditer(r"\S", text)]
    where = place[-1].start()
    return text[:where] + ("8" if text[where] == "7" else "7") + text[where + 1 :]


def falsifications(notebook):
    """For each text of each marked cell: the number of the cell, and a copy of the notebook with that text changed."""
    for index, cell in enumerate(notebook.cells):
        if not chapters.marked(cell):
            continue
        for number, output in enumerate(cell.outputs):
            kinds = ["text"] if output.get("name") == "stdout" else [*output.get("data", {}).keys() & chapters.COMPARED]
            for kind in kinds:
                changed = copy.deepcopy(notebook)
                holder = changed.cells[index].outputs[number]
                holder = holder if kind == "text" else holder.data
                holder[kind] = falsified(holder[kind])
                yield index + 1, changed


@pytest.mark.parametrize("chapter", REAL, ids=[chapter.name for chapter in REAL])
def test_a_falsified_output_of_a_chapter_is_seen(chapter):
    stored = nbformat.read(chapter.notebook, as_version=4)
    assert list(differences(stored, stored)) == []
    changes = list(falsifications(stored))
    assert changes, "the chapter has no marked output"
    for number, changed in changes:
        for pair in ((changed, stored), (stored, changed)):
            (said,) = differences(*pair)
            assert said.startswith(f"cell {number}, ")


def notebook(*outputs, source=f"{MARK}\nshow()"):
    return new_notebook(cells=[new_markdown_cell("# A", id="a"), new_code_cell(source, id="b", outputs=list(outputs))])


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def result(**kinds):
    return new_output("execute_result", data={kind.replace("_", "/"): text for kind, text in kinds.items()})


def test_the_message_has_cell_kind_and_the_lines_that_differ():
    stored = notebook(printed("fine\nloss 0.25\n"))
    (said,) = differences(stored, notebook(printed("fine\nloss 0.52\n")))
    assert said == "cell 2, stdout:\n    stored  loss 0.25\n    found   loss 0.52"


@pytest.mark.parametrize(
    ("stored", "executed", "kind"),
    [
        (notebook(printed("a")), notebook(), "stdout"),
        (notebook(), notebook(printed("a")), "stdout"),
        (notebook(printed("a\n")), notebook(printed("a")), "stdout"),
        (notebook(printed("a\n")), notebook(printed("a\n"), printed("b\n")), "stdout"),
        (notebook(result(text_plain="1")), notebook(result(text_plain="2")), "text/plain"),
        (notebook(result(text_plain="1")), notebook(printed("1")), "stdout"),
        (notebook(result(text_html="<b>1</b>")), notebook(result(text_html="<b>2</b>")), "text/html"),
        (notebook(result(text_markdown="*1*")), notebook(result(text_markdown="*1*", text_plain="1")), "text/plain"),
        (notebook(result(text_plain="1"), result(text_plain="2")), notebook(result(text_plain="12")), "text/plain"),
    ],
)
def test_other_text_more_text_or_less_is_seen(stored, executed, kind):
    assert f"cell 2, {kind}:" in "\n".join(differences(stored, executed))


@pytest.mark.parametrize(
    ("stored", "executed"),
    [
        (notebook(printed("1 s"), source="took()"), notebook(printed("2 s"), source="took()")),
        (notebook(result(image_png="AA==")), notebook(result(image_png="BB=="))),
        (notebook(printed("a\nb\n")), notebook(printed("a\n"), printed("b\n"))),  # flushed in two pieces
    ],
)
def test_what_is_not_compared(stored, executed):
    assert list(differences(stored, executed)) == []


def test_notebooks_of_different_cells_are_not_compared():
    (said,) = differences(notebook(printed("1")), notebook(printed("1"), source=f"{MARK}\nother()"))
    assert "run `make notebooks`" in said
    (said,) = differences(notebook(printed("1")), new_notebook(cells=[]))
    assert "run `make notebooks`" in said


# The whole command, on a small book.

SHOWS = f"# %%\n{MARK}\nfrom pathlib import Path\n\nprint(Path('../../../kdlib/losses.py').stat().st_size)\n"


@pytest.fixture
def stored_book(small_book, monkeypatch, capsys):
    """A book of one chapter that prints a number which depends on the library, executed and stored."""
    monkeypatch.setattr(book, "WORKERS", 1)
    small_book.write("01_small", SHOWS)
    assert book.main(["--store"], small_book.root) == 0
    capsys.readouterr()
    return small_book


def test_what_make_book_has_executed_is_compared_without_executing_it_again(stored_book, capsys):
    assert compare.main(stored_book.root) == 0
    screen = capsys.readouterr().out
    assert re.search(r"^01_small .* up to date$", screen, re.MULTILINE)
    assert "Every marked output is as stored." in screen


def test_a_change_of_the_library_that_changes_an_output_is_seen(stored_book, capsys):
    library = stored_book.root / "kdlib" / "losses.py"
    library.write_text(library.read_text() + "# more\n")
    assert compare.main(stored_book.root) == 1
    screen = capsys.readouterr().out
    assert re.search(r"^chapters/01_small\.ipynb, cell 1, stdout:\n    stored  \d+\n    found   \d+$", screen, re.M)
    assert "`make notebooks` stores the new ones" in screen
    assert book.main(["--store"], stored_book.root) == 0
    assert compare.main(stored_book.root) == 0


def test_a_warning_that_was_not_there_is_seen(stored_book, capsys):
    path = stored_book.root / "_build" / "executed" / "01_small.ipynb"
    executed = nbformat.read(path, as_version=4)
    executed.cells[0].outputs.append(printed("lib.py:3: FutureWarning: it will go\n", name="stderr"))
    nbformat.write(executed, path)
    assert compare.main(stored_book.root) == 1
    assert "chapters/01_small.ipynb, cell 1 prints to stderr: 'lib.py:3: FutureWarning" in capsys.readouterr().out


def test_a_failing_chapter_and_a_missing_notebook_stop_the_comparison(stored_book, capsys):
    chapter = chapters.chapters(stored_book.root)[0]
    stored = chapter.notebook.read_text()
    chapter.notebook.unlink()
    assert compare.main(stored_book.root) == 1
    assert "chapters/01_small.ipynb is missing: run `make notebooks`" in capsys.readouterr().out
    chapter.notebook.write_text(stored)
    stored_book.write("01_small", SHOWS + "\n# %%\nassert 1 > 2, 'broken'\n")
    assert compare.main(stored_book.root) == 1
    screen = capsys.readouterr().out
    assert "stopped at cell 2" in screen and "AssertionError: broken" in screen
    assert "Nothing was compared" in screen


def test_a_reader_may_check_a_chapter_with_nbval(root):
    """The shortest one; in the gate nbval has no other part."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command += ["--nbval-lax", "--nbval-current-env", str(root / "chapters" / "00_preface.ipynb")]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-1000:]
    assert re.search(r"\d+ passed", answer.stdout)
