"""Every exercise's solution, as printed in its chapter, passes the chapter's check, and a spoiled one is refused."""

import ast
import re

import jupytext
import pytest
from torch.utils._pytree import tree_map

from tools.chapters import ROOT, chapters

SOLUTION = re.compile(r"```python\n(.*?)```", re.DOTALL)
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def cells(chapter):
    return jupytext.read(chapter.source).cells


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


@pytest.mark.parametrize("chapter, name", EXERCISES, ids=lambda value: getattr(value, "name", value))
def test_the_printed_solution_passes_and_a_spoiled_one_is_refused(chapter, name):
    names, solution = definitions(chapter), solutions(chapter)[name]
    exec(solution, names)
    right, check = names[name], names[f"check_{name}"]
    check(right)
    with pytest.raises(AssertionError):
        check(lambda *inputs: tree_map(lambda value: 1.01 * value, right(*inputs)))


def test_there_are_exercises():
    assert {chapter.name for chapter, _ in EXERCISES} >= {"01_distillation"}
