"""A chapter with a form: its parameters, and a run of it with others."""

import ast
import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import jupytext
import matplotlib
from matplotlib import pyplot as plt
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook


def offered(chapter: Path) -> dict[str, Any]:
    """The names and defaults in the cell that papermill replaces."""
    (cell,) = [cell for cell in jupytext.read(chapter).cells if "parameters" in cell.metadata.get("tags", [])]
    assignments = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def perform(chapter: Path, folder: Path, **parameters: Any) -> str:
    """Run a chapter from its source, runs under `folder`; return what it printed.

    Without a kernel, whose start takes longer than a small run: the cells in turn, in this process.

    papermill puts the parameters in; every figure is drawn; what a cell raises is raised here.
    """
    parameters = {"output_dir": str(folder / "runs"), "device": "cpu", **parameters}
    written = folder / "chapter.ipynb"
    jupytext.write(jupytext.read(chapter), written)
    notebook = parameterize_notebook(load_notebook_node(str(written)), parameters)
    printed, names = io.StringIO(), {"__name__": "__main__"}
    with (
        contextlib.redirect_stdout(printed),
        contextlib.chdir(folder),
        matplotlib.rc_context(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # as in a kernel: a library's, about a library
        for number, cell in enumerate(notebook.cells, start=1):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{chapter.name}, cell {number}", "exec"), names)
                for figure in map(plt.figure, plt.get_fignums()):
                    figure.canvas.draw()
                plt.close("all")
    return printed.getvalue()
