"""A chapter with a form: its parameters, and a run of it as users run it, by papermill."""

import ast
from pathlib import Path
from typing import Any

import jupytext
import papermill


def offered(chapter: Path) -> dict[str, Any]:
    """The names and defaults in the cell that papermill replaces."""
    (cell,) = [cell for cell in jupytext.read(chapter).cells if "parameters" in cell.metadata.get("tags", [])]
    assignments = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def execute(chapter: Path, folder: Path, **parameters: Any) -> str:
    """Run a chapter from its source, runs under `folder`; return the executed notebook's printed text."""
    notebook, out = folder / "chapter.ipynb", folder / "out.ipynb"
    jupytext.write(jupytext.read(chapter), notebook)
    parameters = {"output_dir": str(folder / "runs"), "device": "cpu", **parameters}
    papermill.execute_notebook(
        notebook, out, parameters, cwd=folder, kernel_name="python3", progress_bar=False, log_output=False
    )
    outputs = [output for cell in jupytext.read(out).cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)
