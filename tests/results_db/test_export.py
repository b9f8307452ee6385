import json

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from results_db.export import WRITERS, export

TABLES = {"runs", "measurements", "items", "layers", "notes", "schema_version"}
TABLES |= {
    "votes",
    "retractions",
    "mined",
    "judged_answers",
    "verdicts",
    "kernel_times",
    "ceilings",
}


@pytest.mark.parametrize("format", sorted(WRITERS))
def test_every_table_is_one_file(store, example, tmp_path, format):
    store.ingest("r1", example.spec(), example.whole(), 900)
    files = export(store, tmp_path / "out", format)
    assert {file.name for file in files} == {f"{name}.{format}" for name in TABLES}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in files}
    assert export(store, tmp_path / "out", format) == files


def test_parquet_gives_back_the_very_tables(store, example, tmp_path):
    store.ingest("r1", example.spec(), example.whole(), 900)
    export(store, tmp_path, "parquet")
    for name, table in store.snapshot().items():
        again = parquet.read_table(tmp_path / f"{name}.parquet")
        assert again.schema.equals(table.schema)
        assert repr(again.to_pylist()) == repr(table.to_pylist())  # NaN != NaN, their text is


def test_csv_keeps_missing_nan_and_infinity_apart(store, example, tmp_path):
    store.ingest("r1", example.spec(), [*example.whole(), example.note('two\n"lines"')], 900)
    export(store, tmp_path, "csv")
    found = pd.read_csv(tmp_path / "measurements.csv", index_col="name", keep_default_na=False)
    assert found["value"].to_dict() == {"perplexity": "7.25", "mean_kld": "", "kld_max": "inf"}
    assert found["stderr"]["kld_max"] == "nan"
    assert 'two\n"lines"' in pd.read_csv(tmp_path / "notes.csv")["text"].tolist()


def test_json_is_strict_and_opens_what_was_json(store, example, tmp_path):
    store.ingest("r1", example.spec(), example.whole(), 900)
    export(store, tmp_path, "json")
    text = (tmp_path / "measurements.json").read_text()
    rows = json.loads(text, parse_constant=pytest.fail)
    assert {row["name"]: row["value"] for row in rows} == {
        "perplexity": 7.25,
        "mean_kld": None,
        "kld_max": "inf",
    }
    (run,) = json.loads((tmp_path / "runs.json").read_text())
    assert run["spec"]["model"]["id"] == "demo"
    assert run["finished"] == "1970-01-01T00:00:06Z"


def test_an_empty_database_exports_empty_tables(store, tmp_path):
    for format in WRITERS:
        export(store, tmp_path, format)
    assert json.loads((tmp_path / "runs.json").read_text()) == []
    assert pd.read_csv(tmp_path / "runs.csv").empty


def test_a_failed_export_leaves_the_old_file(store, example, tmp_path, monkeypatch):
    store.ingest("r1", example.spec(), example.whole(), 900)
    export(store, tmp_path, "parquet")
    before = (tmp_path / "runs.parquet").read_bytes()

    def torn(table: pa.Table, file) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setitem(WRITERS, "parquet", torn)
    with pytest.raises(OSError, match="disk full"):
        export(store, tmp_path, "parquet")
    assert (tmp_path / "runs.parquet").read_bytes() == before


def test_unknown_formats_are_named(store, tmp_path):
    with pytest.raises(ValueError, match="csv, json, parquet"):
        export(store, tmp_path, "xlsx")
