"""Published values laid over the Compare chart: where they match, and one sentence where not."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import seeded

from app import published_rows, published_table, rows
from app.charts import pareto
from app.context import Picks
from app.pages import compare
from jobs import folders
from jobs.events import read
from results_db.store import Store

OPT = "facebook/opt-125m"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Any:
    home = tmp_path_factory.mktemp("home")
    seeded.fill(home)
    return home


def store_of(home: Any, path: Any, model: str, dataset: str) -> Store:
    """The seeded results as if they were of another model, its perplexity on another text."""
    store = Store(path / "results.duckdb")
    for run_id in folders.run_ids(home):
        folder = home / "runs" / run_id
        spec = json.loads((folder / folders.SPEC).read_text())
        spec["model"]["id"] = model
        events, offset = read(folder, 0)
        told = [{**e, "detail": {"dataset": dataset}} if e["type"] == "measurement" else e
                for e in events]  # fmt: skip
        store.ingest(run_id, json.dumps(spec), told, offset)
    return store


@pytest.fixture(scope="module")
def store(home, tmp_path_factory) -> Iterator[Store]:
    store = store_of(home, tmp_path_factory.mktemp("opt"), OPT, "wikitext2")
    yield store
    store.close()


def over(store: Store, model: str = OPT, **picks: Any) -> published_rows.Published:
    view = pareto.points(rows.wide(store, model), Picks(model=model, **picks))
    return published_rows.over(store, model, view.attrs["x"], view.attrs["y"])


def parts(store: Store, **picks: Any) -> list[str]:
    ctx = SimpleNamespace(store=store, runs=SimpleNamespace(runs=list))
    return list(compare.screen(ctx, Picks(model=OPT, **picks)))  # type: ignore[arg-type]


def test_matching_values_are_found_with_their_source(store):
    found = over(store)
    assert found.why == ""
    assert {16.0, 4.0, 3.0} <= set(found.rows["x"])
    assert 27.65 in set(found.rows["y"])
    assert any("2210.17323" in source for source in found.sources)
    assert found.rows["hover"].str.contains("Published").all()


def test_axes_may_be_exchanged(store):
    a, b = over(store), over(store, x="perplexity", y="bits_per_weight")
    assert sorted(zip(a.rows["x"], a.rows["y"], strict=True)) == sorted(
        zip(b.rows["y"], b.rows["x"], strict=True)
    )


def test_shares_come_in_our_units(home, tmp_path):
    model = "meta-llama/Llama-3.1-8B-Instruct"
    store = store_of(home, tmp_path, model, "")
    axes = (rows.Axis("bits_per_weight", "bits", "lower"),
            rows.Axis("mmlu/acc,none", "fraction", "higher"))  # fmt: skip
    found = published_rows.over(store, model, *axes)
    assert len(found.rows)
    assert found.rows["y"].between(0, 1).all()
    store.close()


@pytest.mark.parametrize(
    ("picks", "says"),
    [
        ({"x": "weight_bytes"}, "choose Bits per weight"),
        ({"y": "mean_kld"}, "No published mean KL divergence"),
    ],
)
def test_where_nothing_matches_one_sentence_says_why(store, picks, says):
    found = over(store, **picks)
    assert not len(found.rows)
    assert says in found.why
    head = parts(store, published=True, **picks)[0]
    assert says in head


def test_another_text_or_model_has_none(home, tmp_path):
    store = store_of(home, tmp_path, OPT, "demo")
    assert "on the bundled text" in over(store).why
    assert "of demo" in published_rows.over(store, "demo", *axes_of(store)).why
    store.close()


def axes_of(store: Store) -> tuple[rows.Axis, rows.Axis]:
    view = pareto.points(rows.wide(store, OPT), Picks(model=OPT))
    return view.attrs["x"], view.attrs["y"]


def crosses(chart: str) -> list[dict[str, Any]]:
    traces = json.loads(chart)["figure"]["data"]
    return [t | {"y": numbers(t["y"])} for t in traces if t.get("name") == "published"]


def numbers(values: Any) -> list[float]:
    """An array as Plotly writes it: a list, or the bytes of one."""
    if isinstance(values, list):
        return values
    return list(np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).astype(float))


def test_crosses_are_off_until_asked_for_and_never_joined(store):
    head, above, chart, *_ = parts(store)
    assert crosses(chart) == []
    assert "crosses" not in head
    assert 'aria-pressed="false"' in above.split("Published values")[0].rsplit("<button", 1)[1]
    head, _, chart, _, side, _ = parts(store, published=True)
    (trace,) = crosses(chart)
    assert trace["mode"] == "markers"
    assert trace["marker"]["symbol"] == "x-thin"
    assert "customdata" not in trace, "a click selects measured runs only"
    assert "measured elsewhere" in head
    assert "published, measured elsewhere" in side
    assert f"{len(trace['y'])} published values" in json.loads(chart)["say"]


def test_the_axes_make_room_for_both(store):
    chart = json.loads(parts(store, published=True)[2])["figure"]
    (trace,) = crosses(parts(store, published=True)[2])
    axis = chart["layout"]["yaxis"]
    assert axis["type"] == "log", "3-bit rounding to nearest of OPT-125M is over a decade off"
    assert axis["range"][0] < math.log10(min(trace["y"]))
    assert axis["range"][1] > math.log10(max(trace["y"]))


def test_measured_points_and_front_stay_as_they_were(store):
    def measured(**picks: Any) -> list[Any]:
        chart = json.loads(parts(store, **picks)[2])["figure"]["data"]
        return [(t["x"], t["y"]) for t in chart if t.get("name") != "published"]

    assert measured() == measured(published=True)


def test_crosses_as_a_table_are_apart(store):
    below = parts(store, published=True, table=True)[3]
    assert below.count("<table>") == 2
    assert "Published, measured elsewhere" in below
    assert "2210.17323" in below


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (("gptq", 4, 16, 16, 128), "GPTQ W4A16 g128"),
        (("smoothquant", 8, 8, 16, 0), "SmoothQuant W8A8"),
        (("gptq+qrazor", 4, 16, 16, 32), "GPTQ + QRazor W4A16 g32"),
        (("kivi", 16, 16, 2, 32), "KIVI W16A16KV2 g32"),
        (("fp16", 16, 16, 16, math.nan), "16-bit"),
        (("", math.nan, math.nan, math.nan, math.nan), "no method"),
    ],
)
def test_published_recipes_have_short_names(record, name):
    keys = ("method", "w_bits", "a_bits", "kv_bits", "group")
    assert published_rows.name_of(dict(zip(keys, record, strict=True))) == name


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("arc_easy_acc", "ARC easy accuracy"),
        ("wikitext2_ppl", "Perplexity, WikiText-2"),
        ("latency_ms", "Latency"),
        ("glue_mnli", "GLUE mnli"),
    ],
)
def test_metrics_have_readable_names(metric, name):
    assert published_table.metric_name(metric) == name
