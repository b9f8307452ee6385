"""The Kernels page: ratios, what has none and why, roofline, the empty page, what is in print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import seeded

from app import kernel_rows
from app.charts import kernel_speed, roofline
from app.context import Context, Picks
from app.pages import kernels
from backend import published
from results_db import queries


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> Iterator[tuple[Context, str]]:
    home = tmp_path_factory.mktemp("timed")
    job = seeded.bench(home)
    store, queue = seeded.store_of(home), seeded.queue_of(home)
    yield Context(store, queue, home, (), "127.0.0.1", "", queue), job
    store.close()


def text(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", str(html)))


def test_derived_numbers_are_what_their_definitions_say(timed):
    table = kernel_rows.of_job(timed[0].store, Picks())
    row = table[(table["kernel"] == "int_cpu") & (table["m"] == 64) & (table["n"] == 4096)].iloc[0]
    moved = 4096 * 4096 * 4.25 / 8 + 2 * 64 * (4096 + 4096)
    assert row["bytes"] == moved
    assert row["intensity"] == pytest.approx(2 * 64 * 4096 * 4096 / moved)
    assert row["gbps"] == pytest.approx(moved / row["median_ms"] / 1e6)
    assert row["tflops"] == pytest.approx(2 * 64 * 4096**2 / row["median_ms"] / 1e9)
    assert table.attrs["job"] == timed[1]
    assert table.attrs["ceilings"] == {"read": 20.0, "bf16 product": 0.4}


@pytest.mark.parametrize(
    ("weight", "act", "says"),
    [
        ({"kind": "int", "bits": 4, "group": 128, "symmetric": False}, None, "INT4 g128 (k)"),
        (
            {"kind": "int", "bits": 8, "group": 0, "symmetric": True},
            {"kind": "int", "bits": 8, "group": 0, "symmetric": True},
            "INT8 sym × INT8 sym (k)",
        ),
        ({"kind": "codebook", "table": "nf4", "group": 64, "double_quant": True}, None,
         "NF4 g64 double (k)"),
        ({"kind": "minifloat", "type": "fp8_e4m3", "group": 0}, None, "FP8 E4M3 (k)"),
        ({"kind": "gguf", "type": "Q4_K", "bits": 4, "group": 256}, None, "Q4_K (k)"),
        ({"kind": "float16", "beside": ["keep"], "bucket": 4}, None, "FP16 2:4 (k)"),
        ({"kind": "float32", "beside": ["keep"], "bucket": 0}, None, "FP32 pruned (k)"),
        ({"kind": "spqr", "bits": 3, "group": 16, "beside": ["outliers"]}, None,
         "SpQR3 g16 + outliers (k)"),
    ],
)  # fmt: skip
def test_products_have_the_fields_names(weight, act, says):
    assert kernel_rows.named("k", weight, act) == says


def test_the_table_has_ratios_and_says_why_one_is_missing(timed):
    _, table, *_ = kernels.screen(timed[0], Picks())
    lines = {text(line).strip().split(" (")[0]: line for line in str(table).split("<tr>")[1:]}
    assert "4.00×" in lines["INT4 g128"]
    assert lines["INT8 sym × INT8 sym"].count("unsteady") == 2
    assert lines["NF4 g64"].count(">wrong<") == 2
    assert "wrong by 0.40: no time" in lines["NF4 g64"]
    assert "of the bandwidth" in lines["INT4 g128"]


def test_attention_has_a_table_of_its_own(timed):
    _, tables, *_ = kernels.screen(timed[0], Picks())
    products, caches = str(tables).split("Decode attention on a packed cache")
    assert "kv_decode" not in products
    lines = {text(line).strip().split(" (")[0]: line for line in caches.split("<tr>")[1:]}
    assert "bf16 ms 3.00" in lines
    assert "0.25×" in lines["KIVI2 g32"]
    assert f"{4096 * 2048 * 3.4 / 8 / 12e-3 / 1e9:.3g} GB/s" in lines["KIVI2 g32"]
    assert ">wrong<" in lines["INT8 sym"]
    assert "4\u2009096 tokens" in caches
    assert "1 sequence<" in caches


def test_attention_is_in_no_chart_and_no_choice(timed):
    table = kernel_rows.of_job(timed[0].store, Picks())
    assert not table["kernel"].isin(kernel_rows.ATTENTION).any()
    assert kernel_rows.shapes(table) == ["14336x4096", "4096x4096"]


def test_a_job_of_attention_alone_shows_its_table(tmp_path):
    seeded.bench(tmp_path, only_caches=True)
    store, queue = seeded.store_of(tmp_path), seeded.queue_of(tmp_path)
    ctx = Context(store, queue, tmp_path, (), "127.0.0.1", "", queue)
    head, tables, *charts, _ = kernels.screen(ctx, Picks())
    assert "How fast is attention on packed caches?" in head
    assert "EPYC" in head
    assert "KIVI2 g32" in tables
    assert "Product" not in tables
    assert not any(charts)
    store.close()


def test_the_headline_is_the_best_at_a_single_token(timed):
    head = text(kernels.screen(timed[0], Picks())[0])
    assert "INT4 g128 (int_cpu) is 4.0 times as fast as bf16 for a single token." in head
    for part in ("EPYC", "2 threads", "torch 2.13.0", "reading 20 GB/s", "Time kernels here"):
        assert part in head


def test_who_may_not_start_a_job_has_no_button(timed):
    assert "Time kernels here" not in kernels.screen(timed[0], Picks(), trusted=False)[0]


def test_the_charts_show_the_chosen_shape(timed):
    store = timed[0].store
    table = kernel_speed.chart_rows(store, Picks(shape="4096x4096"))
    assert table.attrs["shape"] == "4096x4096"
    assert set(table["format"]) == {
        "INT4 g128 (int_cpu)",
        "INT8 sym × INT8 sym (int_act_cpu)",
        "NF4 g64 (codebook)",
    }
    assert kernel_speed.chart_rows(store, Picks(shape="1x1")).attrs["shape"] == "14336x4096"
    roof = roofline.chart_rows(store, Picks(shape="4096x4096"))
    figure = roofline.draw(roof)
    line = next(trace for trace in figure.data if trace.name == "measured ceilings")
    assert max(line.y) == 0.4
    assert line.y[0] == pytest.approx(20e-3 * line.x[0])
    colours = {t.name: t.marker.color for t in figure.data if t.mode == "markers"}
    speeds = {t.name: t.line.color for t in kernel_speed.draw(table).data}
    assert {name: colours[name] for name in speeds} == speeds
    assert "% of the 20 GB/s that reading memory reaches here" in roofline.say(roof)


def test_an_empty_home_has_one_button_and_what_is_in_print(tmp_path):
    store, queue = seeded.store_of(tmp_path), seeded.queue_of(tmp_path)
    ctx = Context(store, queue, tmp_path, (), "127.0.0.1", "", queue)
    head, table, *charts, printed = kernels.screen(ctx, Picks())
    assert head.count("<button") == 1
    assert table == ""
    assert not any(charts)
    assert "In print" in printed
    store.close()


def test_printed_ratios_are_those_of_the_source():
    page = str(kernels.published_part())
    table = published.results()
    table = table[(table["table"] == kernels.PRINTED) & (table["metric"] == "speedup")]
    assert all(f"{value:.2f}×" in page for value in table["value"])
    assert "Published, other hardware" in page
    assert "12\u2009288" in page


def test_a_later_job_is_shown_first_and_the_earlier_can_be_chosen(tmp_path):
    first, second = seeded.bench(tmp_path), seeded.bench(tmp_path, asked=1.0)
    store, queue = seeded.store_of(tmp_path), seeded.queue_of(tmp_path)
    assert queries.kernel_jobs(store)["job_id"].tolist()[0] == second
    assert kernel_rows.of_job(store, Picks(id=first)).attrs["job"] == first
    ctx = Context(store, queue, tmp_path, (), "127.0.0.1", "", queue)
    assert "Job whose times are shown" in kernels.screen(ctx, Picks())[0]
    chart = json.loads(kernels.screen(ctx, Picks())[3])
    assert chart["say"].endswith(".")
    store.close()
