"""The annotations of kdlib, checked at every call while the tests run: types, and shapes as jaxtyping writes them.

beartype checks; it takes an int for a float, as type checkers do.
"""

import ast
from pathlib import Path

from beartype import BeartypeConf, beartype

EXCEPT = {"engine"}
"""Rooms that are left out: a check of the engine's protocol would look at names that are found by reading all data."""

ROOT = Path(__file__).resolve().parents[1]

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def rooms() -> list[str]:
    """The modules to check."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "kdlib").rglob("*.py")]
    return sorted(".".join(path.parts) for path in paths if path.name not in {"__init__", "__main__", *EXCEPT})


def import_libraries() -> None:
    """Import what kdlib's modules import of others; to be called before jaxtyping's hook is there.

    What is first imported below a module that jaxtyping rewrites is compiled anew, as if it were rewritten, too: ten
    seconds in every process that may not write bytecode.
    """
    for path in sorted((ROOT / "kdlib").rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if names and all(name.partition(".")[0] not in ("kdlib", "__future__") for name in names):
                exec(compile(ast.Module([node], []), str(path), "exec"), {})
