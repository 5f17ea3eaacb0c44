"""Every exercise's check: it takes the printed solution, refuses a spoiled one, and knows an empty answer."""

import ast
import functools
import re

import jupytext
import pytest
from torch.utils._pytree import tree_map

from tools.chapters import ROOT, chapters

SOLUTION = re.compile(r"```python\n(.*?)```", re.DOTALL)
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


@functools.cache
def cells(chapter):
    return jupytext.read(chapter.source).cells


@functools.cache
def definitions(chapter):
    """The chapter's imports, functions, classes and literal constants, without running its experiments."""
    body = []
    for cell in cells(chapter):
        if cell.cell_type == "code" and "exercise" not in cell.metadata.get("tags", []):
            body += [node for node in ast.parse(cell.source).body if isinstance(node, KEPT) or is_literal(node)]
    names = {}
    exec(compile(ast.Module(body, type_ignores=[]), chapter.name, "exec"), names)
    return names


def is_literal(node):
    """Whether a statement gives names literal values; a literal put into a table needs the table."""
    if not isinstance(node, ast.Assign) or not all(isinstance(t, ast.Name | ast.Tuple) for t in node.targets):
        return False
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return True


def solutions(chapter):
    """The printed solutions by the name of the function that they define."""
    text = "\n".join(cell.source for cell in cells(chapter) if cell.cell_type == "markdown")
    found = SOLUTION.findall(text.partition("## Solutions")[2])
    return {ast.parse(source).body[-1].name: source for source in found}


def asked(chapter):
    """The functions that the exercises ask for."""
    stubs = [ast.parse(cell.source) for cell in cells(chapter) if "exercise" in cell.metadata.get("tags", [])]
    return [node.name for stub in stubs for node in stub.body if isinstance(node, ast.FunctionDef)]


EXERCISES = [(chapter, name) for chapter in chapters(ROOT) for name in asked(chapter) if not name.startswith("check_")]


EMPTY = (None, NotImplemented)  # what a stub returns that nobody has touched

each_exercise = pytest.mark.parametrize("chapter, name", EXERCISES, ids=lambda value: getattr(value, "name", value))


def check_of(chapter, name):
    """The check of an exercise, and the printed solution."""
    names = dict(definitions(chapter))
    exec(solutions(chapter)[name], names)
    return names[f"check_{name}"], names[name]


@each_exercise
def test_the_printed_solution_passes_and_a_spoiled_one_is_refused(chapter, name, monkeypatch):
    monkeypatch.setenv("KDLIB_STRICT", "1")
    check, right = check_of(chapter, name)
    check(right)
    with pytest.raises(AssertionError):
        check(lambda *inputs: tree_map(lambda value: 1.01 * value, right(*inputs)))


@each_exercise
def test_whoever_grades_gets_a_refusal_of_an_empty_answer(chapter, name, monkeypatch):
    """Graders count a cell that raises nothing as solved."""
    monkeypatch.setenv("KDLIB_STRICT", "1")
    check, _ = check_of(chapter, name)
    for nothing in EMPTY:
        with pytest.raises(AssertionError, match="no answer yet"):
            check(lambda *inputs, nothing=nothing: nothing)


@each_exercise
def test_whoever_reads_is_told_not_yet_and_the_chapter_goes_on(chapter, name, monkeypatch, capsys):
    monkeypatch.delenv("KDLIB_STRICT", raising=False)
    check, _ = check_of(chapter, name)
    capsys.readouterr()
    for nothing in EMPTY:
        assert check(lambda *inputs, nothing=nothing: nothing) is None
        assert capsys.readouterr().out == "not yet\n"


def test_every_exercise_has_a_check_and_a_printed_solution():
    """A stub without either would have no test above that could fail."""
    for chapter in {chapter.name: chapter for chapter, _ in EXERCISES}.values():
        assert set(asked(chapter)) == set(solutions(chapter)), chapter.name


def test_there_are_exercises():
    assert {chapter.name for chapter, _ in EXERCISES} >= {"01_distillation"}
