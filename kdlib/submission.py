"""A GLUE submission: one zip of the predictions that finished runs have left, for gluebenchmark.com.

    done = submission.write([cola_record, rte_record, mnli_record], "submission.zip")
    print(done.missing)

The server takes a zip with all eleven files only, and counts their rows.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib import files, glue, models, runs
from kdlib.engine import STUDENT
from kdlib.records import RunRecord

ROWS = {
    "CoLA.tsv": 1063,
    "SST-2.tsv": 1821,
    "MRPC.tsv": 1725,
    "STS-B.tsv": 1379,
    "QQP.tsv": 390965,
    "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847,
    "QNLI.tsv": 5463,
    "RTE.tsv": 3000,
    "WNLI.tsv": 146,
    "AX.tsv": 1104,
}
"""The files that the server expects, with their rows."""
AX = "AX.tsv"


@dataclass(frozen=True)
class Submission:
    """The zip, which run answers which of its files, and what the server will miss, with the reason."""

    path: Path
    answered: dict[str, str]
    missing: dict[str, str]


def write(records: Sequence[RunRecord], path: Path | str) -> Submission:
    """Put the predictions of finished runs into one zip, named as the server wants them.

    The diagnostics, AX, are answered here by the student of the run on MNLI, from the same source as its data.  A
    submission that lacks something is written as well: `missing` says what.

    Raises ValueError for two runs that answer the same file, for a run that answers none, and for predictions whose
    rows are not those of GLUE's test split.
    """
    found: dict[str, tuple[str, str]] = {}
    missing = dict.fromkeys(ROWS, "no run on this task was given")
    for record in records:
        own = sorted(file for file in record.folder.glob("*.tsv") if file.name in ROWS and file.name != AX)
        if not own:
            raise ValueError(
                f"{record.run_id} has no predictions that the GLUE server takes: give runs on GLUE's own tasks with "
                "predict_test=True"
            )
        for file in own:
            if file.name in found:
                raise ValueError(f"{found[file.name][0]} and {record.run_id} both answer {file.name}: give one of them")
            found[file.name] = record.run_id, file.read_text()
        if record.config["task"] == "mnli":
            try:
                found[AX] = record.run_id, diagnostics(record).read_text()
            except (ValueError, OSError) as error:
                missing[AX] = str(error)
    for name, (run_id, text) in found.items():
        if (rows := len(text.splitlines()) - 1) != ROWS[name]:
            raise ValueError(f"{name} of {run_id} has {rows} rows, GLUE's test split has {ROWS[name]}")
    path = Path(path)
    with files.written(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ROWS:
            if name in found:
                archive.writestr(name, found[name][1])
    left = {name: reason for name, reason in missing.items() if name not in found}
    return Submission(path, {name: found[name][0] for name in ROWS if name in found}, left)


def diagnostics(record: RunRecord) -> Path:
    """Let the student of a run on MNLI answer GLUE's diagnostic pairs; return the path of AX.tsv in its folder.

    Raises what `glue.load_test` and `models.load` raise.
    """
    config = runs.configure(**record.config)
    task, student = glue.DIAGNOSTICS, str(record.folder / STUDENT)
    rows = glue.load_test(config.source, task)
    reader = models.load_tokenizer(student)
    encoded = glue.encode(rows, task, reader, config.max_length)
    outputs = models.predict(models.load(student, task, reader), encoded, description="predicting ax")
    return glue.write_predictions(record.folder, task, outputs)
