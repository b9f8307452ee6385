"""Conformance of every chart: none, one, many rows; pure; and what the Pareto chart must show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pandas as pd
import plotly.graph_objects as go
import pytest
import seeded
import seeded_votes

from app import charts, look, pages, rows, table
from app.charts import pareto
from app.context import Picks
from app.headline import headline
from app.widgets import chart_value
from results_db.store import Store

FOUND = charts.find()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[Store]:
    home = tmp_path_factory.mktemp("seeded")
    seeded.fill(home)
    seeded.bench(home)
    store = seeded.store_of(home)
    seeded_votes.cast(home, store)
    yield store
    store.close()


@pytest.fixture(scope="module")
def run_id(store) -> str:
    return str(store.frame("SELECT run_id FROM layers LIMIT 1")["run_id"].iloc[0])


def table_of(name: str, store: Store, run_id: str, rows_wanted: int | None) -> pd.DataFrame:
    """A chart's rows: all of them, or the first few with their attributes."""
    table = FOUND[name].rows(store, Picks(model="demo", id=run_id))
    cut = table if rows_wanted is None else table.head(rows_wanted).reset_index(drop=True)
    cut.attrs = table.attrs
    return cut


@pytest.mark.parametrize("rows_wanted", [0, 1, None])
@pytest.mark.parametrize("name", sorted(FOUND))
def test_every_chart_draws_none_one_and_many(name, rows_wanted, store, run_id):
    table = table_of(name, store, run_id, rows_wanted)
    assert rows_wanted is None or len(table) == rows_wanted
    figure = FOUND[name].draw(table)
    assert isinstance(figure, go.Figure)
    value = json.loads(chart_value(figure, FOUND[name].say(table)))
    assert value["say"].endswith(".")
    assert "NaN" not in json.dumps(value)


@pytest.mark.parametrize("name", sorted(FOUND))
def test_every_chart_is_pure(name, store, run_id):
    table = table_of(name, store, run_id, None)
    before = table.copy(deep=True)
    first, second = (chart_value(FOUND[name].draw(table), "") for _ in range(2))
    assert first == second
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize("name", sorted(FOUND))
def test_every_chart_names_a_page_and_its_columns(name, store, run_id):
    chart = FOUND[name]
    assert chart.page in {page.name for page in pages.find()}
    assert chart.title
    table = table_of(name, store, run_id, None)
    assert set(chart.columns(table)) <= set(table.columns)


def test_an_empty_store_is_no_error(tmp_path):
    store = Store(tmp_path / "results.duckdb")
    for chart in FOUND.values():
        table = chart.rows(store, Picks())
        assert len(table) == 0
        chart.draw(table)
        assert chart.say(table)
        chart.columns(table)
    store.close()


# ---- Pareto


@pytest.fixture(scope="module")
def points(store) -> pd.DataFrame:
    return pareto.chart_rows(store, Picks(model="demo"))


def by_trace(figure: go.Figure) -> dict[str, list[str]]:
    """{run id: symbol} of every point drawn."""
    found = {}
    for trace in figure.data:
        if trace.customdata is not None:
            symbols = trace.marker.symbol
            symbols = [symbols] * len(trace.x) if isinstance(symbols, str) else symbols
            found |= dict(zip(trace.customdata, symbols, strict=True))
    return found


def test_every_point_is_drawn_once_and_says_which_run_it_is(points):
    drawn = by_trace(pareto.draw(points))
    assert sorted(drawn) == sorted(points["run_id"])


def test_shape_fill_and_star(points):
    drawn = by_trace(pareto.draw(points))
    for row in points.to_dict("records"):
        symbol = drawn[row["run_id"]]
        if row["is_baseline"]:
            assert symbol == "star"
        else:
            assert symbol.startswith(look.SHAPES[row["target"]])
            assert symbol.endswith("-open")  # all seeded runs are simulated


def test_the_front_is_what_nothing_beats(points):
    rivals = points[~points["is_baseline"]]
    for row in rivals.to_dict("records"):
        beaten = ((rivals["x"] <= row["x"]) & (rivals["y"] <= row["y"])
                  & ((rivals["x"] < row["x"]) | (rivals["y"] < row["y"]))).any()  # fmt: skip
        assert row["front"] == (not beaten)


def test_beaten_points_fade(points):
    for trace in pareto.draw(points).data:
        if trace.customdata is not None and trace.name != "16-bit":
            front = points.set_index("run_id").loc[list(trace.customdata), "front"]
            assert trace.opacity == (1.0 if front.all() else pareto.FADED)


def test_a_selected_point_never_fades_and_has_a_ring(store, points):
    beaten = points[~points["front"] & ~points["is_baseline"]]["run_id"].iloc[0]
    figure = pareto.draw(pareto.chart_rows(store, Picks(model="demo", runs=(beaten,))))
    trace = next(t for t in figure.data if t.customdata is not None and beaten in t.customdata)
    at = list(trace.customdata).index(beaten)
    assert trace.opacity == 1.0
    assert trace.marker.opacity[at] == 1.0
    assert [len(t.x) for t in figure.data if t.name == "selected"] == [1]


def test_intervals_are_95_per_cent(points):
    figure = pareto.draw(points)
    row = points[~points["is_baseline"]].iloc[0]
    trace = next(
        t for t in figure.data if t.customdata is not None and row["run_id"] in t.customdata
    )
    at = list(trace.customdata).index(row["run_id"])
    assert trace.error_y.array[at] == pytest.approx(row["y_half"])


def test_axes_say_what_is_better(points):
    figure = pareto.draw(points)
    assert figure.layout.xaxis.title.text == "Bits per weight (lower is better)"
    assert figure.layout.yaxis.title.text == "Perplexity (lower is better)"


def test_log_axes_over_a_decade_and_when_asked():
    table = pd.DataFrame({"a": [1.0, 11.0], "b": [1.0, 2.0], "c": [0.0, 100.0]})
    assert rows.axis(table, "a").log
    assert not rows.axis(table, "b").log
    assert rows.axis(table, "b", "log").log
    assert not rows.axis(table, "a", "linear").log
    assert not rows.axis(table, "c", "log").log, "zero has no logarithm"


def test_labels_cover_neither_points_nor_each_other(points):
    x, y = points.attrs["x"], points.attrs["y"]
    spots = pareto._pixels(points, x, y)
    boxes = []
    for label in pareto.front_labels(points, x, y):
        at = points.index[points["name"] == label["text"]][0]
        side = next(s for s in pareto.SIDES if (s[0], s[1], s[2], -s[3]) == (
            label["xanchor"], label["yanchor"], label["xshift"], label["yshift"]))  # fmt: skip
        boxes.append(pareto._label_box(*spots[at], label["text"], side))
    assert boxes
    for number, box in enumerate(boxes):
        assert not any(box.meets(other) for other in boxes[:number])


def test_names_and_notes_are_text_never_markup():
    record = {
        "text": "<img src=x onerror=alert(1)>", "packed": True, "perplexity": 2.0,
        "perplexity__n": 3, "notes_text": "<script>alert(1)</script>",
    }  # fmt: skip
    shown = pareto.hover(record, [rows.Axis("perplexity", "", "lower")])
    assert "<img" not in shown
    assert "<script" not in shown


def test_zoom_comes_from_the_url_and_nonsense_is_ignored(store):
    zoomed = pareto.draw(pareto.chart_rows(store, Picks(zoom=("0.4", "0.8", "7", "9"))))
    assert tuple(zoomed.layout.xaxis.range) == (0.4, 0.8)
    assert tuple(zoomed.layout.yaxis.range) == (7, 9)
    free = pareto.draw(pareto.chart_rows(store, Picks(zoom=("x", "nan"))))
    assert all(math.isfinite(v) for v in free.layout.xaxis.range)


def test_infinite_values_do_not_break_the_picture(store):
    table = pareto.chart_rows(store, Picks(model="demo"))
    table.loc[table.index[-1], "y"] = math.inf
    assert all(math.isfinite(v) for v in pareto.draw(table).layout.yaxis.range)


# ---- like with like


def test_unlike_rows_are_never_drawn_together(store):
    wide = rows.wide(store, "demo")
    odd = wide.index[~wide["is_baseline"].astype(bool)][:3]
    wide.loc[odd, "perplexity__n"] = 999
    choice = pareto.points(wide, Picks()).attrs["choice"]
    assert [s.rows for s in choice.sets] == [len(wide) - 3, 3]
    assert len(choice.rows) == len(wide) - 3
    other = pareto.points(wide, Picks(set=choice.sets[1].key))
    assert len(other) == 3
    assert "999" in other.attrs["choice"].sets[1].text


def test_filters_keep_the_baseline(store):
    wide = rows.wide(store, "demo")
    kept = rows.kept(wide, Picks(family=("gptq",), bits=("3",)))
    assert set(kept["family"]) == {"gptq", "baseline"}
    assert not len(rows.kept(wide, Picks(packed=True)).query("not is_baseline"))
    assert len(rows.kept(wide, Picks(search=["smooth", "w8a8"][0])).query("not is_baseline")) == 1


# ---- the sentence


def test_the_sentence_says_who_is_as_good_and_who_is_ahead(store):
    view = pareto.chart_rows(store, Picks(model="demo"))
    said = headline(view.attrs["choice"].rows, "demo", view.attrs["x"], view.attrs["y"])
    assert said.startswith("On demo, ")
    assert "GPTQ" in said
    assert "clearly ahead" in said


def test_the_sentence_claims_nothing_where_intervals_touch(store):
    view = pareto.chart_rows(store, Picks(model="demo"))
    shown = view.attrs["choice"].rows.assign(perplexity__stderr=50.0)
    said = headline(shown, "demo", view.attrs["x"], view.attrs["y"])
    assert "ahead" not in said


# ---- numbers as text


@pytest.mark.parametrize(
    ("name", "value", "unit", "text"),
    [
        ("perplexity", 7.28431, "", "7.284"),
        ("perplexity", 12345.6, "", "12346"),
        ("mean_kld", 0.012345, "nats", "0.0123"),
        ("mean_kld", 0.00012345, "nats", "1.23e-04"),
        ("bits_per_weight", 4.25, "bits", "4.25"),
        ("weight_bytes", 1706240, "bytes", "1.63 MiB"),
        ("weight_bytes", 3 * 2**30, "bytes", "3.00 GiB"),
        ("decode_tps", 1234.6, "tokens/s", "1\u2009235"),
        ("same_top", 0.8912, "share", "89.1 %"),
        ("perplexity", math.inf, "", "∞"),
        ("perplexity", math.nan, "", "–"),
        ("perplexity", None, "", "–"),
        ("ttft_ms", 12.345, "ms", "12.3"),
        ("demo/acc", 1.0, "share", "100.0 %"),
    ],
)
def test_numbers(name, value, unit, text):
    assert look.quantity(name, value, unit) == text


@pytest.mark.parametrize(
    ("name", "value", "base", "unit", "text"),
    [
        ("perplexity", 7.7, 7.0, "", "+10 %"),
        ("perplexity", 7.07, 7.0, "", "+1.0 %"),
        ("perplexity", 700.0, 7.0, "", "×100"),
        ("weight_bytes", 30, 100, "bytes", "−70 %"),
        ("demo/acc", 0.9, 0.95, "share", "−5.0 pt"),
        ("demo/acc", 0.95, 0.95, "share", "0 pt"),
        ("mean_kld", 0.1, 0.0, "nats", ""),
        ("perplexity", math.inf, 7.0, "", ""),
    ],
)
def test_differences(name, value, base, unit, text):
    assert look.delta(name, value, base, unit) == text


def test_bases_are_those_measured_alike(store):
    wide = rows.with_bases(rows.wide(store, "demo"), ["perplexity", "demo_sums/acc,none"])
    base = wide[wide["is_baseline"].astype(bool)].iloc[0]
    assert (wide["perplexity__base"] == base["perplexity"]).all()
    wide = rows.wide(store, "demo")
    wide.loc[wide.index[-1], "perplexity__dtype"] = "bfloat16"
    assert math.isnan(rows.with_bases(wide, ["perplexity"])["perplexity__base"].iloc[-1])


@pytest.mark.parametrize(
    ("value", "errors", "says"),
    [(1.0, (0.0, 0.02), ""), (0.5, (0.05, 0.02), "worse"), (0.0, (0.0, 0.0), "worse")],
)
def test_a_difference_is_coloured_only_if_its_interval_excludes_zero(value, errors, says):
    record = {
        "acc": value,
        "acc__base": 0.98,
        "acc__better": "higher",
        "acc__stderr": errors[0],
        "acc__base_stderr": errors[1],
    }
    assert table.verdict(record, "acc") == says


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[700_000, 1_700_000], [3e9, 16e9], [512.0], [0.0], []])
def test_byte_ticks_are_few_round_and_inside(values, log):
    ticks = pareto.byte_ticks(pd.Series(values, dtype=float), log)
    assert len(ticks) <= 14
    assert all(0.85 * min(values) <= tick <= 1.15 * max(values) for tick in ticks)
    if len(values) > 1:
        assert len(ticks) >= 2
