"""tables: every row that a file has arrives, and a fault is named with file, line and what mends it."""

import csv
import errno
import gzip
import json

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib import tables

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n"), min_size=1, max_size=12)
KINDS = ("csv", "tsv", "jsonl", "json", "parquet")


def write(path, columns):
    """What another library writes, tab-separated files by hand: nobody else writes them without quoting."""
    table = pd.DataFrame(columns)
    kind = path.suffix.removesuffix(".gz")
    if kind == ".csv":
        table.to_csv(path, index=False)
    elif kind == ".tsv":
        lines = ["\t".join(columns), *("\t".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_bytes("".join(line + "\n" for line in lines).encode())
    elif kind == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=kind == ".jsonl", force_ascii=False)
    return path


@settings(max_examples=40)
@given(st.lists(st.tuples(LINE, st.integers(-3, 3)), min_size=1, max_size=6), st.sampled_from(KINDS))
def test_what_was_written_is_read(tmp_path_factory, rows, kind):
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    path = write(tmp_path_factory.mktemp("rows") / f"train.{kind}", columns)
    table = tables.read([path], ["text"], ["label"])
    assert table.columns == columns and table.present == ("text", "label") and len(table) == len(rows)


@settings(max_examples=40)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6))
def test_csv_text_may_hold_anything(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("first", "second"), *rows])
    table = tables.read([path], ["first", "second"])
    assert list(zip(*table.columns.values(), strict=True)) == rows


@pytest.mark.parametrize("kind", KINDS)
def test_words_for_nothing_are_text(tmp_path, kind):
    texts = ["null", "NA", "nan", "None", "17", "007", "1e3", "true"]
    path = write(tmp_path / f"train.{kind}", {"text": texts, "label": range(8)})
    assert tables.read([path], ["text"], ["label"]).columns["text"] == texts


def test_tab_separated_rows_have_no_quoting(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KDLIB_PROGRESS", "1")
    texts = ['"open', 'clo"se', '"', '""', "'a'", 'end"', "back\\slash", "comma, and ;", "\u2028line", " spaces "]
    path = write(tmp_path / "dev.tsv", {"text": texts, "label": range(10)})
    assert tables.read([path], ["text"], ["label"]).columns["text"] == texts
    assert capsys.readouterr().err == ""
    pd.DataFrame({"text": ['say "x"', "y"], "label": [0, 1]}).to_csv(path, sep="\t", index=False)
    assert tables.read([path], ["text"]).columns["text"] == ['"say ""x"""', "y"]
    assert "1 texts look as if they were quoted" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_line_ends_and_byte_order_marks(tmp_path, kind, end):
    between = {"csv": ",", "tsv": "\t"}.get(kind)
    lines = [f"text{between}label", f"ä{between}0", f"b{between}1"]
    if kind == "jsonl":
        lines = ['{"text": "ä", "label": 0}', '{"label": 1, "text": "b"}']
    for number, text in enumerate((end.join(lines), end.join(lines) + end, "\ufeff" + end.join([*lines, "", ""]))):
        path = tmp_path / f"train{number}.{kind}"
        path.write_bytes(text.encode())
        assert tables.read([path], ["text"], ["label"]).columns == {"text": ["ä", "b"], "label": [0, 1]}


def test_files_of_a_split_are_joined_and_unpacked(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv.gz"
    first.write_text("text,label\na,1\n")
    second.write_bytes(gzip.compress(b"label,text,more\n2.5,b,x\n"))
    assert tables.read([first, second], ["text"], ["label"]).columns == {"text": ["a", "b"], "label": [1, 2.5]}
    second.write_bytes(gzip.compress(b"label\n2\n"))
    with pytest.raises(ValueError, match=r"b.csv.gz has no column 'text', but a.csv has it"):
        tables.read([first, second], ["text"], ["label"])
    second.write_bytes(gzip.compress(b"label,text\n2,b\n")[:-9])
    with pytest.raises(OSError, match=r"b.csv.gz.*copy it again"):
        tables.read([second], ["text"])


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", " 2 ", ""], [1, 2, None]),
        (["1.0", "-2e0"], [1.0, -2.0]),
        (["1", "x", ""], ["1", "x", None]),
        (["nan", "1"], ["nan", "1"]),
        (["10000000000000000001", "0"], [10**19 + 1, 0]),
        (["٣", "1"], ["٣", "1"]),
    ],
)
def test_a_label_column_of_numbers_holds_numbers(tmp_path, cells, values):
    for kind, between in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"train.{kind}"
        path.write_text("".join(f"{a}{between}{b}\n" for a, b in [("text", "label"), *(("t", c) for c in cells)]))
        found = tables.read([path], ["text"], ["label"]).columns["label"]
        assert found == values and list(map(type, found)) == list(map(type, values))


LATIN = "text,label\nfine,0\n\nna\xefve,1\n".encode("latin-1")
FAULTS = {
    "latin-1": ("csv", LATIN, r"train.csv, line 4: byte 0xef is not UTF-8.*save it as UTF-8"),
    "latin-1 tabs": ("tsv", LATIN.replace(b",", b"\t"), r"train.tsv, line 4: byte 0xef"),
    "latin-1 json": ("jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"train.jsonl, line 2: byte 0xe9"),
    "utf-16": ("csv", "text,label\nx,0\n".encode("utf-16"), r"train.csv is in UTF-16.*save it as UTF-8"),
    "utf-16 without mark": ("tsv", "text\tlabel\nx\t0\n".encode("utf-16-le"), r"train.tsv is in UTF-16"),
    "utf-16 json": ("json", '[{"text": "x"}]'.encode("utf-16"), r"train.json is in UTF-16"),
    "a comma": ("csv", b"text,label\nx,0\n\nso, so,1\n", r"line 4: 3 fields, the header has 2: put quotation marks"),
    "a field less": ("csv", b"text,label\n\"a\nb\",0\nx\n", r"line 4: 1 fields, the header has 2: complete the row"),
    "an open quote": ("csv", b'text,label\nx,0\n"y,1\nz,0\n', r"row that begins in line 3: .* never closed"),
    "text behind a quote": ("csv", b'text,label\n"so" they say,0\n', r"row that begins in line 2: .*double"),
    "an empty text?": ("csv", b"text\nx\n\ny\n", r"line 3: 0 fields, the header has 1"),
    "semicolons": ("csv", b"text;label\nx;0\n", r"separates its columns by ';', expected commas"),
    "tabs": ("csv", b"text\tlabel\nx\t0\n", r"separates its columns by '\\t'.*save it as .tsv"),
    "two columns of a name": ("csv", b"text,text\nx,0\n", r"has 2 columns called 'text'"),
    "no rows": ("csv", b"text,label\n", r"train.csv has no rows"),
    "blanks": ("csv", b"\n\n", r"train.csv has no rows"),
    "a tab": ("tsv", b"text\tlabel\nx\t0\na\tb\t1\n", r"train.tsv, line 3: 3 fields, the header has 2. .*replace tabs"),
    "a line break": ("tsv", b"text\tlabel\nx\ny\t0\n", r"train.tsv, line 2: 1 fields, the header has 2"),
    "an empty line": ("tsv", b"text\tlabel\nx\t0\n\ny\t0\n", r"train.tsv, line 3: 0 fields, the header has 2"),
    "no rows, tabs": ("tsv", b"text\tlabel\n", r"train.tsv has no rows"),
    "no json": ("jsonl", b'{"text": "x"}\n{"text": x}\n{}\n', r"train.jsonl, line 2 is no JSON .*mend the line"),
    "cut": ("jsonl", b'{"text": "x"}\n{"text": "y', r"train.jsonl is cut short in line 2 .*copy the file again"),
    "cut list": ("json", b'[{"text": "x"},\n{"te', r"train.json is cut short in line 2"),
    "a list in rows": ("jsonl", b'{"text": "x"}\n["y", 1]\n', r"row 1 is no object .*orient='records', lines=True"),
    "pretty": ("json", b'{\n"text": "x",\n"label": 0\n}\n', r"one object over several lines.*orient='records'"),
    "no rows, json": ("json", b"[]", r"train.json has no rows"),
    "no parquet": ("parquet", b"PAR1" + bytes(500) + b"PAR1", r"cannot read .*train.parquet: .*copy it again"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file_its_line_and_its_remedy(tmp_path, fault):
    kind, content, message = FAULTS[fault]
    path = tmp_path / f"train.{kind}"
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        tables.read([path], ["text"], ["label"])
    mendable_by_a_copy = {"cut", "cut list", "no parquet"}
    assert isinstance(caught.value, OSError) == (fault in mendable_by_a_copy)
    assert ("copy" in str(caught.value)) == (fault in mendable_by_a_copy)


@pytest.mark.parametrize("orient", ["columns", "index", "split", "values", "table", "list"])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("rows", [1, 3])
def test_orientations_of_pandas_are_told_from_rows(tmp_path, orient, kind, rows):
    table = pd.DataFrame({"text": ["x"] * rows, "label": [0] * rows})
    text = json.dumps(table.to_dict("list")) if orient == "list" else table.to_json(orient=orient)
    path = tmp_path / f"train.{kind}"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"train.{kind}.*orient='records', lines=True"):
        tables.read([path], ["text"], ["label"])


def test_a_parquet_file_with_a_hole_is_named(tmp_path):
    path = tmp_path / "train.parquet"
    Dataset.from_dict({"text": [f"text {i}" for i in range(2000)], "label": [0] * 2000}).to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + bytes(len(whole) // 2) + whole[20 + len(whole) // 2 :])
    with pytest.raises(OSError, match=r"cannot read .*train.parquet: .*is damaged: copy it again"):
        tables.read([path], ["text"], ["label"])


def test_parquet_keeps_the_names_of_classes_and_ignores_what_nobody_wants(tmp_path):
    path = tmp_path / "train.parquet"
    features = Features({"a.b": Value("large_string"), "a": Value("int8"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"a.b": ["x", None], "a": [1, 2], "label": [1, -1]}, features).to_parquet(path)
    table = tables.read([path], ["a.b"], ["label"])
    assert table.columns == {"a.b": ["x", None], "label": [1, -1]} and table.classes == {"label": ("no", "yes")}
    odd = {"text": ["x"], "label": pd.Categorical(["good"]), "more": [{"deep": [[1], [None, 2]]}]}
    pd.DataFrame(odd).to_parquet(path)
    table = tables.read([path], ["text"], ["label"])
    assert table.columns == {"text": ["x"], "label": ["good"]} and table.present == ("text", "label", "more")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_no_damage(number):
    try:
        try:
            raise OSError(number, "no room")
        except OSError as error:
            raise RuntimeError("could not be prepared") from error
    except RuntimeError as error:
        found = tables.cannot_read("x", error)
    assert found.errno == number and "TMPDIR" in str(found) and "copy it" not in str(found)
    assert "copy it again" in str(tables.cannot_read("x", ValueError("bad")))
