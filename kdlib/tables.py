"""Files of rows - CSV, tab-separated, JSON and Parquet - read as they are written, nothing guessed and nothing lost.

pandas and `datasets` drop rows at a stray quotation mark, take the text "null" for nothing and name neither file nor
line of a fault.  Here every row of a file arrives or none does, and an error says where the fault is and what mends it.
"""

import csv
import errno
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from kdlib.progress import notice

NUMBER = re.compile(r"\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
"""What a cell must be, from its first to its last character, to be taken for a number."""
COPY_AGAIN = "The folder is damaged or half copied: copy it again"
_AS_RECORDS = "write one object a row, with pandas df.to_json(path, orient='records', lines=True)"


@dataclass(frozen=True)
class Table:
    """The wanted columns of one split, as Python values in the order of the rows.

    `present` names all columns that are there, also those that nobody wanted and nobody has read.  `classes` holds the
    names of the classes of a column where the data themselves declare them.
    """

    columns: dict[str, list[Any]]
    present: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def format_of(path: Path) -> str | None:
    """The format of a file by its name, "csv", "tsv", "json" or "parquet"; None for any other."""
    return _KINDS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


def read(paths: Sequence[Path], texts: Sequence[str], others: Sequence[str] = ()) -> Table:
    """Read the columns `texts` and `others` of some files, one file after the other; missing columns are left out.

    The format follows from the name, see `format_of`; `.gz` files of text are unpacked.  Tab-separated files have no
    quoting: each line is a row, and a quotation mark is a character as any other, as in the files of GLUE.  CSV files
    have quoting, as spreadsheets and pandas write it.  Both name their columns in the first line, and text that reads
    "null" or "17" is text; of the `others` a column that holds nothing but numbers holds numbers, and an empty cell is
    None.  JSON files hold an object on each line, or one list of objects.  Files of text are in UTF-8.

    Raises ValueError for what its author must mend and OSError for damage that another copy mends, with file and line.
    """
    wanted = (*texts, *others)
    parts = [_READERS[str(format_of(path))](path, wanted) for path in paths]
    columns: dict[str, list[Any]] = {}
    for name in wanted:
        having = [name in part.columns for part in parts]
        if any(having) and not all(having):
            raise ValueError(
                f"{paths[having.index(False)]} has no column {name!r}, but {paths[having.index(True)].name} has it: "
                "the files of a split need the same columns"
            )
        if all(having):
            columns[name] = [value for part in parts for value in part.columns[name]]
            if name in others and format_of(paths[0]) in ("csv", "tsv"):
                columns[name] = _typed(columns[name])
    return Table(columns, parts[0].present, parts[0].classes)


def cannot_read(what: Path | str, error: BaseException, remedy: str = COPY_AGAIN) -> OSError:
    """An OSError with the reason in one line, and a `remedy`, unless the cause is a disk or a limit that is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return OSError(
                seen.errno,
                f"cannot read {what}: there is no room for the temporary copy that reading makes ({one_line(seen)}). "
                "The data may be in order: free some space, raise the limit of file sizes (ulimit -f), or set TMPDIR "
                "to a folder with more room",
            )
        seen = seen.__cause__ or seen.__context__
    return OSError(f"cannot read {what}: {one_line(error.__cause__ or error)}. {remedy}")


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks, cut to a readable length."""
    return " ".join(str(error).split())[:300]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def text_of(path: Path) -> str:
    """The whole text of a UTF-8 file, with or without a byte order mark.

    Raises ValueError with file and line for any other encoding, OSError for a damaged `.gz` file.
    """
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise cannot_read(path, error, "The file is damaged or half copied: copy it again") from error
    return decoded(raw, path)


def decoded(raw: bytes, path: Path, line: int = 1) -> str:
    """Bytes of a file as text; `line` is the number of the first one.  Raises as `text_of` does."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw.count(0) > len(raw) / 4:
        raise ValueError(f"{path} is in UTF-16, expected UTF-8: save it as UTF-8 (a spreadsheet calls it CSV UTF-8)")
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raw = error.object  # without the byte order mark
        line += raw.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8, the file is probably in Latin-1 or "
            "Windows-1252: save it as UTF-8 (a spreadsheet calls it CSV UTF-8)"
        ) from error


def _lines(text: str) -> list[str]:
    """The lines without their ends; other characters that break lines, such as U+2028, are part of the text."""
    if "\n" not in text:
        text = text.replace("\r", "\n")  # files from a Mac of the last century
    return [line.removesuffix("\r") for line in text.split("\n")]


def _typed(cells: list[str]) -> list[Any]:
    """None for empty cells; numbers if all other cells are numbers."""
    if not all(NUMBER.fullmatch(cell) for cell in cells if cell.strip()):
        return [cell if cell.strip() else None for cell in cells]
    return [number(cell) if cell.strip() else None for cell in cells]


def number(cell: str) -> int | float:
    """The value of a text that NUMBER matches; whole numbers of any size are exact."""
    try:
        return int(cell)
    except ValueError:
        return float(cell)


def _header(path: Path, header: list[str], wanted: Iterable[str]) -> dict[str, int]:
    """Where the wanted columns stand."""
    for name in wanted:
        if header.count(name) > 1:
            raise ValueError(f"{path} has {header.count(name)} columns called {name!r}: rename all but one of them")
    return {name: header.index(name) for name in wanted if name in header}


# The default is a text of 131,072 characters; a missing quotation mark is found by other means.
csv.field_size_limit(1 << 30)


def _csv(path: Path, wanted: Sequence[str]) -> Table:
    return _from_rows(path, list(comma_separated(io.StringIO(text_of(path), newline=""), path)), wanted)


def comma_separated(lines: Iterable[str], path: Path) -> Iterator[list[str]]:
    """The fields of each row, the header first; empty lines are none, unless one might be an empty text.

    Raises ValueError with file and line for a row with another number of fields than the header, and for quotation
    marks that leave open where a text ends.
    """
    reader, empty = csv.reader(lines, strict=True), 0
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            at, count = (empty, 0) if empty else (line, len(fields))
            line = reader.line_num + 1
            if not fields:
                empty = empty or (at if len(header) == 1 else 0)
                continue
            if not header:
                header = fields
                if len(header) == 1 and (found := re.search(r"[;\t]", header[0])):
                    save = "save it as .tsv" if found[0] == "\t" else "save it with commas"
                    raise ValueError(f"{path} separates its columns by {found[0]!r}, expected commas: {save}")
            if count != len(header):
                remedy = "put quotation marks around a text that holds a comma"
                if count < len(header):
                    remedy = "complete the row, or put quotation marks around a text that is empty or has several lines"
                raise ValueError(f"{path}, line {at}: {count} fields, the header has {len(header)}: {remedy}")
            yield fields
    except csv.Error as error:
        what = "a quotation mark is opened and never closed" if "end of data" in str(error) else str(error)
        raise ValueError(
            f"{path}, row that begins in line {line}: {what}. Close it, and double the quotation marks inside a quoted "
            'text ("")'
        ) from error


def _tsv(path: Path, wanted: Sequence[str]) -> Table:
    table = _from_rows(path, list(tab_separated(_lines(text_of(path)), path)), wanted)
    quoted = sum(
        isinstance(cell, str) and len(cell) > 2 and cell[0] == cell[-1] == '"' and '""' in cell[1:-1]
        for column in table.columns.values()
        for cell in column
    )
    if quoted:
        notice(
            f"{path}: {quoted} texts look as if they were quoted. Tab-separated files are read without quoting, so "
            "their quotation marks are part of the text; save the file as .csv if they are not meant to be"
        )
    return table


def tab_separated(lines: Iterable[str], path: Path) -> Iterator[list[str]]:
    """The fields of each line, the header first; empty lines at the end are none.

    Raises ValueError with file and line for a line with another number of fields than the header, an empty one too.
    """
    width, empty = 0, 0
    for number, line in enumerate(lines, 1):
        if not line:
            empty = empty or number
            continue
        fields = line.split("\t")
        width = width or len(fields)
        if empty or len(fields) != width:
            at, count = (empty, 0) if empty else (number, len(fields))
            raise ValueError(
                f"{path}, line {at}: {count} fields, the header has {width}. Tab-separated files are read without "
                "quoting, a row a line: replace tabs and line breaks inside texts by spaces, or save the file as .csv"
            )
        yield fields


def _from_rows(path: Path, rows: list[list[str]], wanted: Sequence[str]) -> Table:
    header, rows = rows[0] if rows else [], rows[1:]
    places = _header(path, header, wanted)
    columns = {name: [row[place] for row in rows] for name, place in places.items()}
    if not rows:
        raise ValueError(f"{path} has no rows, only the names of its columns: add rows, or remove the file")
    return Table(columns, tuple(header), {})


# ---------------------------------------------------------------------------------------------------------------------
# JSON and Parquet


def _json(path: Path, wanted: Sequence[str]) -> Table:
    text = text_of(path)
    rows = _whole(path, text) if text.lstrip().startswith("[") else _by_line(path, text)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}: row {number} is no object with column names but {str(row)[:40]!r}: {_AS_RECORDS}"
            )
    if len(rows) == 1:
        inside = [rows[0][name] for name in wanted[:1] if name in rows[0]] or list(rows[0].values())
        if inside and all(isinstance(value, dict | list) for value in inside):
            raise ValueError(f"{path} holds one object with whole columns or all rows inside, not rows: {_AS_RECORDS}")
    if not rows:
        raise ValueError(f"{path} has no rows: add some, or remove the file")
    present = tuple(dict.fromkeys(name for row in rows for name in row))
    return Table({name: [row.get(name) for row in rows] for name in wanted if name in present}, present, {})


def _whole(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(path, text, getattr(error, "lineno", 1), error) from error


def _by_line(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if rows or not _is_json(text):
                raise _no_json(path, text, number, error) from error
            raise ValueError(f"{path} holds one object over several lines, not rows: {_AS_RECORDS}") from error
    return rows


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _no_json(path: Path, text: str, line: int, error: Exception) -> Exception:
    if line >= len(_lines(text)) and not text.endswith(("\n", "]")):
        return OSError(f"{path} is cut short in line {line} ({one_line(error)}): copy the file again, or write it anew")
    return ValueError(f"{path}, line {line} is no JSON ({one_line(error)}): mend the line, or write the file anew")


def _parquet(path: Path, wanted: Sequence[str]) -> Table:
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        _header(path, schema.names, wanted)
        columns = [name for name in wanted if name in schema.names]
        table = file.read(use_threads=False, columns=columns)
        values = {name: table.column(name).to_pylist() for name in columns}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise cannot_read(path, error, "The file is damaged: copy it again, or write it anew") from error
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path} has no rows: add some, or remove the file")
    return Table(values, tuple(schema.names), _declared(schema, columns))


def _declared(schema: pa.Schema, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The names of classes that `datasets` has written into the file."""
    schema = pa.schema([schema.field(name) for name in columns], schema.metadata)
    try:
        features = Features.from_arrow_schema(schema)
    except Exception:  # written by another version, or about columns that nobody has asked for
        return {}
    return {name: tuple(f.names) for name, f in features.items() if isinstance(f, ClassLabel) and name in columns}


_KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_READERS: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    "csv": _csv, "tsv": _tsv, "json": _json, "parquet": _parquet,
}  # fmt: skip
