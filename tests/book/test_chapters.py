"""What holds for every chapter of the book, and proof that each of these checks catches its mistake."""

import base64

import nbformat
import pytest
from nbformat.v4 import new_output

from tools import book, chapters

REAL = chapters.chapters()

GOOD = """\
# %% [markdown]
# # A chapter

# %%
def half(x):
    return 0.5 * x

# %%
half(3)

# %% tags=["agrees"]
# NBVAL_CHECK_OUTPUT
from kdlib.losses import half as library_half

assert half(3) == library_half(3)
print(half(3))
"""


@pytest.mark.parametrize("chapter", REAL, ids=[chapter.name for chapter in REAL])
def test_chapter(chapter):
    assert chapters.problems(chapter) == []


def test_every_file_is_in_the_book():
    assert chapters.unlisted() == []


# The checks themselves, on a small book.


def stored(small_book, source=GOOD, name="01_small"):
    """A chapter with outputs stored as `make notebooks` stores them, but typed in here instead of executed."""
    chapter = small_book.write(name, source)
    notebook = chapters.read_source(chapter.source)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
    code[-1].outputs = [new_output("stream", name="stdout", text="1.5\n")]
    nbformat.write(chapters.strip(notebook), chapter.notebook)
    return chapter


def changed(chapter, change):
    """Apply `change` to the stored notebook."""
    notebook = nbformat.read(chapter.notebook, as_version=4)
    change(notebook)
    nbformat.write(notebook, chapter.notebook)
    return chapter


def only_problem(chapter, small_book):
    (problem,) = chapters.problems(chapter, small_book.root)
    return problem


def test_a_good_chapter_passes(small_book):
    assert chapters.problems(stored(small_book), small_book.root) == []


def test_a_missing_notebook_is_caught(small_book):
    chapter = stored(small_book)
    chapter.notebook.unlink()
    assert "01_small.ipynb is missing: run `make notebooks`" in only_problem(chapter, small_book)


def test_a_changed_cell_of_the_source_is_caught(small_book):
    chapter = stored(small_book)
    chapter.source.write_text(chapter.source.read_text().replace("half(3)\n\n", "half(4)\n\n"))
    assert "cell 3 differs between .py and .ipynb" in only_problem(chapter, small_book)


def test_a_cell_more_in_the_source_is_caught(small_book):
    chapter = stored(small_book)
    chapter.source.write_text(chapter.source.read_text() + "\n# %%\nhalf(5)\n")
    assert "the .py has 5 cells, the .ipynb 4" in only_problem(chapter, small_book)


def test_a_changed_tag_is_caught(small_book):
    chapter = stored(small_book)
    chapter.source.write_text(
        chapter.source.read_text().replace("# %%\nhalf(3)", '# %% tags=["agrees"]\nassert half(3)')
    )
    assert any("cell 3 differs" in problem for problem in chapters.problems(chapter, small_book.root))


def test_captions_are_kept_and_compared(small_book):
    captioned = GOOD.replace("# %%\nhalf(3)", '# %% mystnb={"figure": {"caption": "A half."}}\nhalf(3)')
    chapter = stored(small_book, captioned)
    assert chapters.problems(chapter, small_book.root) == []
    assert nbformat.read(chapter.notebook, as_version=4).cells[2].metadata.mystnb.figure.caption == "A half."
    chapter.source.write_text(chapter.source.read_text().replace("A half", "Half"))
    assert "cell 3 differs between .py and .ipynb" in only_problem(chapter, small_book)


def test_outputs_of_other_cells_are_caught(small_book):
    """Both forms edited alike, as jupytext does, but not run again."""
    chapter = stored(small_book)
    chapter.source.write_text(chapter.source.read_text().replace("half(3)\n\n", "half(4)\n\n"))
    changed(chapter, lambda notebook: notebook.cells[2].update(source="half(4)"))
    assert "the stored outputs are not of these cells" in only_problem(chapter, small_book)


def test_cells_run_out_of_order_are_caught(small_book):
    chapter = changed(stored(small_book), lambda notebook: notebook.cells[2].update(execution_count=7))
    assert "not run once, in order, from a fresh kernel (counts [1, 7, 3])" in only_problem(chapter, small_book)


def test_missing_outputs_are_caught(small_book):
    chapter = changed(stored(small_book), lambda notebook: notebook.cells[3].update(outputs=[]))
    assert "no outputs are stored" in chapters.problems(chapter, small_book.root)[0]


def add_output(output):
    return lambda notebook: notebook.cells[2].outputs.append(output)


def test_an_error_output_is_caught(small_book):
    error = new_output("error", ename="ValueError", evalue="too large", traceback=[])
    chapter = changed(stored(small_book), add_output(error))
    assert "cell 3 stores an error, ValueError: too large" in only_problem(chapter, small_book)


def test_a_warning_on_the_screen_is_caught(small_book):
    warning = new_output("stream", name="stderr", text="lib.py:3: FutureWarning: half\n  will go\n")
    chapter = changed(stored(small_book), add_output(warning))
    assert "cell 3 prints to stderr: 'lib.py:3: FutureWarning: half will go'" in only_problem(chapter, small_book)


@pytest.mark.parametrize("text", ["<object at 0x7f3b9c0d1e20>", "/home/anna/book", "saved to /tmp/x", "{root}/data"])
def test_an_output_of_one_machine_is_caught(small_book, text):
    chapter = stored(small_book)
    changed(chapter, add_output(new_output("stream", name="stdout", text=text.format(root=small_book.root))))
    assert "which is different on another machine" in only_problem(chapter, small_book)


def figure(size):
    return new_output("display_data", data={"image/png": base64.b64encode(bytes(size)).decode()})


CAPTIONED = GOOD.replace(
    "# %%\nhalf(3)", '# %% mystnb={"image": {"alt": "A line."}, "figure": {"caption": "It falls."}}\nhalf(3)'
)


def test_a_large_figure_is_caught(small_book):
    chapter = changed(stored(small_book, CAPTIONED), add_output(figure(60_000)))
    assert chapters.problems(chapter, small_book.root) == []
    chapter = changed(stored(small_book, CAPTIONED), add_output(figure(60_001)))
    assert "a figure of cell 3 has 60,001 bytes" in only_problem(chapter, small_book)


@pytest.mark.parametrize("missing", ['"image": {"alt": "A line."}, ', ', "figure": {"caption": "It falls."}'])
def test_a_figure_without_alt_text_or_caption_is_caught(small_book, missing):
    chapter = changed(stored(small_book, CAPTIONED.replace(missing, "")), add_output(figure(100)))
    assert "the figure of cell 3 needs an alt text and a caption" in only_problem(chapter, small_book)


def test_a_large_notebook_is_caught(small_book):
    chapter = changed(stored(small_book), add_output(new_output("stream", name="stdout", text="x" * 500_000)))
    assert "500,000 are allowed: draw smaller or fewer figures" in only_problem(chapter, small_book)


def test_a_chapter_without_a_compared_output_is_caught(small_book):
    problem = only_problem(stored(small_book, GOOD.replace(f"{chapters.MARK}\n", "")), small_book)
    assert "no output is compared" in problem and f"with '{chapters.MARK}'" in problem


def test_a_mark_that_compares_nothing_is_caught(small_book):
    source = GOOD.replace("# %%\nhalf(3)", f"# %%\n{chapters.MARK}\nx = half(3)")
    assert "cell 3 is marked" in only_problem(stored(small_book, source), small_book)
    image = new_output("display_data", data={"image/svg+xml": "<svg/>"})
    chapter = changed(stored(small_book, source), add_output(image))
    assert "cell 3 is marked" in chapters.problems(chapter, small_book.root)[-1], "figures are not compared"


def test_a_mark_in_the_wrong_place_is_caught(small_book):
    source = GOOD.replace("# %%\nhalf(3)", f"# %%\nhalf(3)\n  {chapters.MARK}")
    assert "cell 3 has '# NBVAL_CHECK_OUTPUT' below" in only_problem(stored(small_book, source), small_book)


def test_a_stray_parameters_cell_is_caught(small_book):
    source = GOOD.replace("# %%\nhalf(3)", '# %% tags=["parameters"]\nseed = 0')
    assert "1 cells are tagged 'parameters', expected 0" in only_problem(stored(small_book, source), small_book)


def test_a_papermill_chapter_needs_its_parameters_cell(small_book):
    chapter = stored(small_book, f"# %%\n{chapters.MARK}\nprint(1)\n", "12_glue")
    assert "0 cells are tagged 'parameters', expected 1" in only_problem(chapter, small_book)
    source = f'# %% tags=["parameters"]\nseed = 0\n\n# %%\n{chapters.MARK}\nprint(1)\n'
    chapter = stored(small_book, source, "12_glue")
    assert chapters.problems(chapter, small_book.root) == []


def test_a_chapter_that_never_compares_itself_with_kdlib_is_caught(small_book):
    found = chapters.problems(stored(small_book, GOOD.replace(' tags=["agrees"]', "")), small_book.root)
    assert "no cell is tagged 'agrees'" in found[0]
    assert "half is defined here and in kdlib.losses" in found[1]


@pytest.mark.parametrize(
    "comparison",
    [
        "assert half(3) == 1.5",  # kdlib's version is not there
        "from kdlib.losses import half\n\nassert half(3) == 1.5",  # hides the chapter's own
        "from kdlib.losses import half as other\n\nassert other(3) == 1.5",  # the chapter's own is not there
        "from other.losses import half as other\n\nassert half(3) == other(3)",  # not kdlib
    ],
)
def test_a_forgotten_comparison_is_caught(small_book, comparison):
    source = GOOD[: GOOD.index("from kdlib")] + comparison + "\n"
    assert "half is defined here and in kdlib.losses" in only_problem(stored(small_book, source), small_book)


@pytest.mark.parametrize(
    "comparison",
    [
        "from kdlib import losses\n\nassert half(3) == losses.half(3)",
        "import kdlib.losses\n\nassert half(3) == kdlib.losses.half(3)",
        "import torch\nfrom kdlib import losses\n\ntorch.testing.assert_close(half(3), losses.half(3))",
    ],
)
def test_other_ways_to_compare_are_accepted(small_book, comparison):
    source = GOOD[: GOOD.index("from kdlib")] + comparison + "\n"
    assert chapters.problems(stored(small_book, source), small_book.root) == []


def test_a_comparison_that_asserts_nothing_is_caught(small_book):
    found = chapters.problems(stored(small_book, GOOD.replace("assert half", "half")), small_book.root)
    assert "asserts nothing" in found[0]


def test_private_names_need_no_comparison(small_book):
    source = GOOD.replace("half(3)\n\n", "def _hidden(x):\n    return x\n\n")
    assert chapters.problems(stored(small_book, source), small_book.root) == []


def test_a_chapter_without_its_source_is_named(small_book):
    chapter = stored(small_book)
    chapter.source.unlink()
    with pytest.raises(ValueError, match=r"chapters/01_small\.py is missing"):
        chapters.chapters(small_book.root)


def test_files_outside_the_book_are_named(small_book):
    stored(small_book)
    (small_book.root / "chapters" / "02_stray.ipynb").write_text("{}")
    assert chapters.unlisted(small_book.root) == ["chapters/02_stray.ipynb is not in book.yml"]


def test_cell_ids_depend_on_content_only(small_book):
    """So that a cell more does not change the ids, and with them the diff, of all that follow."""
    before = [cell.id for cell in chapters.read_source(stored(small_book).source).cells]
    after = [cell.id for cell in chapters.read_source(stored(small_book, "# %%\nnew = 1\n\n" + GOOD).source).cells]
    assert after[1:] == before
    repeated = chapters.read_source(stored(small_book, "# %%\nx = 1\n\n# %%\nx = 1\n").source)
    assert len({cell.id for cell in repeated.cells}) == 2
    nbformat.validate(repeated)


def test_what_a_cell_prints_in_parts_is_stored_as_one():
    """A kernel sends what is printed when its time has come, at times between the text and the end of the line."""
    said = [("stdout", "one"), ("stdout", "\n"), ("stderr", "two"), ("stdout", "three"), ("stdout", " four\n")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in said]
    outputs.insert(3, nbformat.v4.new_output("display_data", data={"text/plain": "a figure"}))
    found = [(output.get("name"), output.get("text")) for output in chapters.joined(outputs)]
    assert found == [("stdout", "one\n"), ("stderr", "two"), (None, None), ("stdout", "three four\n")]


def test_what_is_stored_does_not_change_from_run_to_run(small_book):
    small_book.write("01_small", GOOD + "\n# %%\n'shown'\n")
    texts = []
    for _ in range(2):
        assert book.main(["--store", "--force"], small_book.root) == 0
        texts.append((small_book.root / "chapters" / "01_small.ipynb").read_text())
    assert texts[0] == texts[1]
    assert "'shown'" in texts[0]
    assert "papermill" not in texts[0]
    assert chapters.problems(chapters.chapters(small_book.root)[0], small_book.root) == []


def test_what_an_executed_cell_prints_to_stderr_is_stored_and_caught(small_book):
    """Progress bars are off while the book is stored, so nothing but a warning can come this way."""
    small_book.write("01_small", GOOD + "\n# %%\nimport warnings\n\nwarnings.warn('half will go', stacklevel=1)\n")
    assert book.main(["--store"], small_book.root) == 0
    chapter = chapters.chapters(small_book.root)[0]
    problem = chapters.problems(chapter, small_book.root)[0]
    assert "cell 5 prints to stderr" in problem and "UserWarning: half will go" in problem


def test_the_command_prints_the_problems_of_the_whole_book(small_book, capsys, root):
    source = chapters.read_source(root / "chapters" / "00_preface.py").cells[1].source
    setup = f'# %% tags=["setup", "hide-input"]\n{source}\n\n'
    stored(small_book, setup + GOOD, "00_preface")
    chapter = stored(small_book, setup + GOOD)
    assert chapters.main(small_book.root) == 0
    assert capsys.readouterr().out == "2 chapters, each with its .ipynb\n"
    stored(small_book, GOOD)
    (small_book.root / "chapters" / "stray.ipynb").write_text("{}")
    changed(chapter, lambda notebook: notebook.cells[2].update(execution_count=7))
    assert chapters.main(small_book.root) == 1
    complaints = capsys.readouterr().out.splitlines()
    assert complaints[0] == "chapters/stray.ipynb is not in book.yml"
    assert "not run once, in order" in complaints[1]
    assert "chapters/01_small: the first code cell must be the set-up cell" in complaints[2]
