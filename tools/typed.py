"""The annotations of kdlib, checked at every call while the tests run: types, and shapes as jaxtyping writes them.

beartype checks; it takes an int for a float, as type checkers do.
"""

from pathlib import Path

from beartype import BeartypeConf, beartype

EXCEPT = {"engine"}
"""Rooms that are left out: a check of the engine's protocol would look at names that are found by reading all data."""

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def rooms() -> list[str]:
    """The modules to check."""
    root = Path(__file__).resolve().parents[1]
    paths = [path.relative_to(root).with_suffix("") for path in (root / "kdlib").rglob("*.py")]
    return sorted(".".join(path.parts) for path in paths if path.name not in {"__init__", "__main__", *EXCEPT})
