"""The annotations of kdlib, checked at every call while the tests run: types, and shapes as jaxtyping writes them.

beartype checks; it takes an int for a float, as type checkers do.
"""

from pathlib import Path

from beartype import BeartypeConf, beartype

NOT_YET = {"imitation", "learner", "pretraining", "runs", "trainer"}
"""Rooms whose annotations do not hold yet."""

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def rooms() -> list[str]:
    """The modules to check, all but those of `NOT_YET` and the methods."""
    folder = Path(__file__).resolve().parents[1] / "kdlib"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return [f"kdlib.{name}" for name in sorted(names - NOT_YET)]
