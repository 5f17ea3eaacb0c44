"""The book's studies, for the tests of their records."""

from pathlib import Path

from kdlib.study import Study

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "data" / "runs"
STUDIES = {path.stem: Study(path) for path in sorted((ROOT / "experiments").glob("*.yml"))}
