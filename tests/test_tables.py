"""Rows of JSONL, CSV and Parquet files: bad rows in their places, columns kept, types of Parquet."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loramix.errors import InvalidData, MissingExtra, UsageError
from loramix.formats.table_output import json_line, kept_name, output_kind, output_row, write_rows
from loramix.formats.tables import kind_of, read_rows
from loramix.runtime.batch import run_batch


def rows_of(data: bytes, name: str, column: str = "q") -> list[tuple[int, Any]]:
    kind = kind_of(name)
    assert kind is not None
    return list(read_rows(io.BytesIO(data), name, kind, column))


def test_csv_as_spreadsheets_write_it() -> None:
    text = 'q,id,note\r\n"a, ""b""\r\nsecond line",1,x\r\n\r\nplain,2,\r\n'
    for data in (
        text.encode(),
        b"\xef\xbb\xbf" + text.encode(),
        text.encode("utf-16"),
        gzip.compress(text.encode()),
    ):
        assert rows_of(data, "in.csv") == [
            (1, {"q": 'a, "b"\r\nsecond line', "id": "1", "note": "x"}),
            (2, {"q": "plain", "id": "2", "note": ""}),
        ]
    assert rows_of(b"id\tq\n1\ta,b\n", "in.tsv.gz") == [(1, {"id": "1", "q": "a,b"})]


def test_a_bad_row_of_csv_is_an_error_in_its_place() -> None:
    data = (
        b'q,id\none,1\ntwo,2,3\nfour\n\xff\xfe,5\n"six" x,6\nseven,7\n' + b"x" * (1 << 20) + b"x,8\nnine,9\n"
    )
    found = rows_of(data, "in.csv")
    assert [number for number, _ in found] == list(range(1, 9))
    good = {number: row["q"] for number, row in found if isinstance(row, dict)}
    assert good == {1: "one", 6: "seven", 8: "nine"}
    bad = {number: str(row) for number, row in found if isinstance(row, InvalidData)}
    assert (
        "has 3 fields, the header has 2" in bad[2]
        and "not UTF-8" in bad[4]
        and "not CSV" in bad[5]
        and bad[7]
    )


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"text,id\na,1\n", "in.csv", "no column 'q' .it has 'text', 'id'.; give --column"),
        (b"", "in.csv", "no column 'q' .it has none."),
        (b"q,q\na,1\n", "in.csv", "two columns 'q'"),
        (b"PK\x03\x04" + bytes(40), "in.csv", "cannot be read"),
        (b"not parquet", "in.parquet", "not a Parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(data: bytes, name: str, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(InvalidData, match=message):
        rows_of(data, name)


def test_json_of_any_kind_is_a_row_or_an_error() -> None:
    deep = b'{"q": ' + b"[" * 150 + b"]" * 150 + b"}"
    found = rows_of(b'{"q": "a", "x": NaN, "s": "\\ud800"}\n\n' + deep + b"\n", "in.jsonl")
    assert found[0][0] == 1 and found[1][0] == 3
    line = json_line(output_row(1, found[0][1], {"text": "b"}))
    assert json.loads(line) == {"line": 1, "q": "a", "x": None, "s": "\ud800", "text": "b"}
    assert "deeper than" in str(found[1][1])


def test_names_of_the_output_that_are_taken() -> None:
    names = ["text", "input_text", "label", "labels", "line", "inputtext", "error"]
    kept = [kept_name(name) for name in names]
    assert kept == [
        "input_text",
        "input_input_text",
        "label",
        "input_labels",
        "input_line",
        "inputtext",
        "input_error",
    ]
    with pytest.raises(UsageError, match="answers are written as"):
        output_kind("out.csv")
    assert output_kind("out.parquet") == "parquet" and output_kind("out") == "jsonl"


def test_parquet_keeps_the_types_of_parquet() -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)
    columns = {
        "q": pa.array(["a", "b", None]),
        "n": pa.array([1, None, 3], pa.int32()),
        "x": pa.array([1.5, float("nan"), None]),
        "t": pa.array([moment, None, moment], pa.timestamp("ns")),
        "raw": pa.array([b"\x00\xff", None, b""]),
        "kind": pa.array(["u", "v", "u"]).dictionary_encode(),
        "tags": pa.array([["k"], [], None]),
        "deep": pa.array([{"a": 1}, None, {"a": 2}]),
    }
    file, out = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.table(columns), file)
    rows = rows_of(file.getvalue(), "in.parquet")
    answers = [output_row(n, row, {"text": "t", "usage": {"prompt_tokens": 3}}) for n, row in rows]
    write_rows(out, "parquet", answers, list(columns), pa.table(columns).schema)
    found = pq.read_table(out)
    assert found["line"].to_pylist() == [1, 2, 3]
    for name in columns:
        wanted = pa.timestamp("us") if name == "t" else columns[name].type
        assert found[name].type == wanted, name
        same = [str(value) for value in found[name].to_pylist()]
        assert same == [str(value) for value in columns[name].cast(wanted).to_pylist()], name
    assert found["usage"].to_pylist() == ['{"prompt_tokens": 3}'] * 3
    line = json.loads(json_line(answers[0]))
    assert (line["t"], line["raw"]) == ("2026-01-02T03:04:05.678901", "00ff")


def test_a_batch_of_csv_and_parquet_is_that_of_jsonl(tiny_engine: Any, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    data = [{"q": q, "id": str(i), "text": "x"} for i, q in enumerate(["the sunny day", "", "rain"])]
    (tmp_path / "in.jsonl").write_bytes(b"".join(map(json_line, data)))
    (tmp_path / "in.csv").write_text("q,id,text\n" + "".join(f"{','.join(row.values())}\n" for row in data))
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "in.parquet")
    found = []
    for source in ("in.jsonl", "in.csv", "in.parquet"):
        for out in ("out.jsonl", "out.parquet"):
            counts = run_batch(tiny_engine, tmp_path / source, tmp_path / out, column="q", max_tokens=4)
            assert counts == {"lines": 3, "answered": 2, "errors": 1}
            if out == "out.jsonl":
                rows = [
                    json.loads(line) for line in (tmp_path / out).read_text(encoding="utf-8").splitlines()
                ]
            else:
                rows = pq.read_table(tmp_path / out).to_pylist()
            found.append(
                [(r["line"], r["id"], r["q"], r["input_text"], r.get("text"), r.get("error")) for r in rows]
            )
            (tmp_path / out).unlink()
    assert all(rows == found[0] for rows in found) and found[0][1][5] is not None
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".jsonl", ".parquet"]


def test_parquet_without_pyarrow_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'loramix\[parquet\]'"):
        rows_of(b"PAR1", "in.parquet")
    assert rows_of(b"q\na\n", "in.csv") == [(1, {"q": "a"})]
