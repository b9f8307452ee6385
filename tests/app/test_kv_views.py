"""Memory against context, the cube of bits and windows, and keys and values, from measurements."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import seeded
import torch
from hypothesis import given
from hypothesis import strategies as st

from app import cube_view, kv_values, memory_view
from app.charts import memory
from app.context import Context, Picks
from app.form import expand
from app.pages import compare, run
from app.recipe_words import recipe_of
from backend.cache.growth import Part
from backend.kv_statistics import FILE
from backend.metrics import METRICS
from backend.recipes import parse, read_calls
from backend.spec import ModelRef, RunSpec
from backend.statistics import summarize, write
from jobs.events import append

MIB = 2**20
PLAIN = Part(512.0, 512.0, layers=4)
KV4 = Part(512.0, 128.0, layers=4)
KIVI2 = Part(512.0, 96.0, layers=4, block=32, residual=32)
RECIPES = {  # recipe -> weights in bytes, parts of its cache, perplexity by window
    "": (8 * MIB, PLAIN, {256: 9.0, 512: 8.0}),
    "kv_cache": (8 * MIB, KV4, {256: 9.1, 512: 8.2}),
    "kivi(bits=2)": (8 * MIB, KIVI2, {256: 9.9, 512: 9.6}),
    "rtn(bits=4)": (2 * MIB, PLAIN, {256: 9.3, 512: 8.4}),
    "rtn(bits=4)+kivi(bits=2)": (2 * MIB, KIVI2, {256: 10.5, 512: 10.2}),
    "gptq(bits=4)+kivi(bits=2)": (2 * MIB, KIVI2, {256: 10.1, 512: 9.9}),
}


def event(kind: str, name: str, value: float, better: str, detail: Any = None) -> dict[str, Any]:
    """A measurement as a worker writes it."""
    unit = "bytes" if kind == "size" else ""
    return {
        "metric_id": f"{kind}-{(detail or {}).get('window', 0)}",
        "metric": kind,
        "version": 1,
        "name": name,
        "value": value,
        "unit": unit,
        "better": better,
        "n": 1 if kind == "size" else 8000,
        "stderr": None if kind == "size" else 0.05,
        "layer": None,
        "detail": detail or {},
        "device": "cpu",
        "dtype": "float32",
        "storage": "simulated",
        "data": "d",
        "items_file": None,
    }


def fill(home: Path) -> dict[str, str]:
    """Every recipe measured in a home -> {recipe: its run}."""
    queue, ids = seeded.queue_of(home), {}
    for recipe, (weights, part, perplexity) in RECIPES.items():
        spec = RunSpec(
            model=ModelRef(id="demo"),
            steps=parse(recipe) if recipe else (),
            metrics=(METRICS.build({"kind": "size"}),),
        )
        text = recipe_of(json.dumps(spec.model_dump(mode="json"))).text
        ids[recipe] = queue.submit(spec, recipe=text, device="cpu")
        folder = home / "runs" / ids[recipe]
        append(folder, "state", state="running")
        append(folder, "measurement", **event("size", "weight_bytes", weights, "lower"))
        cache = seeded.cache_event(part, 1024)
        append(folder, cache.pop("type"), **cache)
        for window, value in perplexity.items():
            told = {"window": window, "dataset": "demo", "bos": "as_is"}
            found = event("perplexity", "perplexity", value, "lower", told)
            append(folder, "measurement", **found)
        append(folder, "state", state="done")
    return ids


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Iterator[tuple[Context, dict[str, str]]]:
    home = tmp_path_factory.mktemp("caches")
    ids = fill(home)
    store, queue = seeded.store_of(home), seeded.queue_of(home)
    yield Context(store, queue, home, (), "127.0.0.1", "", queue), ids
    store.close()


# ---- memory against context ----------------------------------------------------------------


def test_what_fits_is_the_longest_context_whose_bytes_do(measured):
    table = memory.chart_rows(measured[0].store, Picks(model="demo", budget="9 MiB"))
    names = dict(zip(table["run_id"], table["longest"], strict=True))
    assert names[measured[1][""]] == MIB // (4 * 512)
    assert names[measured[1]["kv_cache"]] == MIB // (4 * 128)
    for record in table.to_dict("records"):
        room = 9 * MIB - record["weights"]
        (part,) = record["parts"]
        fits = record["longest"]
        assert all(part.bytes_at(n) <= room for n in range(max(0, fits - 64), fits + 1))
        assert any(part.bytes_at(n) > room for n in range(fits + 1, fits + 2))


def test_rtn_alone_is_drawn_only_where_it_is_selected(measured):
    ctx, ids = measured
    drawn = set(memory.chart_rows(ctx.store, Picks(model="demo"))["run_id"])
    assert drawn == set(ids.values()) - {ids["rtn(bits=4)"]}
    chosen = Picks(model="demo", runs=(ids["rtn(bits=4)"],))
    assert set(memory.chart_rows(ctx.store, chosen)["run_id"]) == set(ids.values())


def test_the_budget_without_one_is_what_16_bits_take_at_their_context(measured):
    table = memory.chart_rows(measured[0].store, Picks(model="demo"))
    assert table.attrs["budget"] == 8 * MIB + 1024 * 4 * 512
    assert not table.attrs["asked"]
    base = table[table["is_baseline"]]
    assert base["longest"].tolist() == [1024]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4 GiB", 4 * 2**30),
        ("512mb", 512e6),
        ("24", 24 * 2**30),
        ("1,5 g", 1.5 * 2**30),
        ("0", None),
        ("-1 GiB", None),
        ("lots", None),
        ("", None),
    ],
)
def test_a_budget_is_read_as_people_write_it(text, size):
    assert memory.in_bytes(text) == size


@given(st.text(max_size=20))
def test_no_budget_breaks_the_reader(text):
    assert (memory.in_bytes(text) or 1) > 0


def test_an_unreadable_budget_is_told_and_shown_as_data(measured):
    head, chart, _ = memory_view.parts(measured[0].store, Picks(model="demo", budget="<b>much</b>"))
    assert "is no amount of memory" in head
    assert "<b>much</b>" not in head
    assert json.loads(chart)["say"].startswith("In 10.0 MiB")


def test_the_sentence_compares_with_16_bits(measured):
    table = memory.chart_rows(measured[0].store, Picks(model="demo", budget="9 MiB"))
    assert re.match(r"In 9.00 MiB, .*W4KV2.* has room for .* times as much", memory.say(table))
    tight = memory.chart_rows(measured[0].store, Picks(model="demo", budget="3 MiB"))
    assert "the 16-bit model does not fit at all" in memory.say(tight)
    none = memory.chart_rows(measured[0].store, Picks(model="demo", budget="1 MiB"))
    assert "the weights alone take more" in memory.say(none)


def test_the_lines_and_rings_are_where_the_numbers_say(measured):
    figure = memory.draw(memory.chart_rows(measured[0].store, Picks(model="demo", budget="9 MiB")))
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    rings = [trace for trace in figure.data if trace.mode == "markers"]
    assert len(lines) == 5
    assert all(ring.y[0] == 9 * MIB for ring in rings)
    assert rings
    assert len({(line.line.color, line.line.dash) for line in lines}) == len(lines)


def test_the_table_has_a_line_for_every_recipe(measured):
    picks = Picks(model="demo", budget="9 MiB", tables=(memory_view.NAME,))
    head, chart, table = memory_view.parts(measured[0].store, picks)
    assert chart == ""
    assert "Show as chart" in head
    assert table.count("<tr>") == 6
    assert "At 1\u2009024 tokens" in table


def test_runs_of_an_earlier_version_are_told(measured):
    details = memory.details(measured[0].store, "demo")
    wide = memory.rows.wide(measured[0].store, "demo")
    one = measured[1]["kv_cache"]
    table = memory.lines(wide, {r: {} if r == one else d for r, d in details.items()}, Picks())
    assert table.attrs["old"] == 1
    assert one not in set(table["run_id"])


def test_before_the_first_kv_recipe_there_is_a_link_that_fills_it(tmp_path):
    seeded.fill(tmp_path)
    store = seeded.store_of(tmp_path)
    head, chart, _ = memory_view.parts(store, Picks(model="demo"))
    assert chart == ""
    (address,) = re.findall(r'href="(/new[^"]*)"', head)
    asked = parse_qs(urlparse(address.replace("&amp;", "&")).query)
    assert all(parse(line) for line in asked["recipes"][0].splitlines())
    assert all(read_calls(line) for line in asked["metrics"][0].splitlines())
    store.close()


# ---- weight bits x KV bits x context ---------------------------------------------------------


def test_cells_are_the_best_recipe_of_each_pair_and_window(measured):
    table = cube_view.cells(measured[0].store, Picks(model="demo", cube="perplexity"))
    cells = {(r["window"], r["bits"], r["kv_bits"]): r for r in table.to_dict("records")}
    assert cells[256, "16", "16"]["value"] == 9.0
    assert cells[512, "4", "2"]["value"] == 9.9
    assert cells[512, "4", "2"]["run_id"] == measured[1]["gptq(bits=4)+kivi(bits=2)"]
    assert cells[512, "4", "2"]["tried"] == 2
    assert len(cells) == 2 * 5


def test_the_cube_has_a_panel_per_window_and_says_what_bits_cost(measured):
    part = str(cube_view.part(measured[0].store, Picks(model="demo")))
    assert part.count("<caption>") == 2
    assert "perplexity changes by +10 % on 256 tokens with 2-bit keys and values" in part
    assert "+20 % on 512 tokens" in part
    assert "not measured" in part  # 4-bit weights with KV4
    assert "Measure a whole sweep" in part


def test_the_sweep_it_offers_is_every_pair():
    lines = [one for line in cube_view.SWEEP.splitlines() for one in expand(line)]
    told = {
        (r.bits, r.kv_bits)
        for line in lines
        for r in [recipe_of(json.dumps({"steps": [s.data() for s in parse(line)]}))]
    }
    pairs = {(w, kv) for w in ("16", "8", "4", "3") for kv in ("16", "8", "4", "2")}
    assert told == pairs - {("16", "16")}
    for text in cube_view.sweep_metrics(1024).splitlines():
        assert read_calls(text)


# ---- the pages -----------------------------------------------------------------------------


def test_chips_and_marks_have_the_names_people_know(measured):
    ctx, _ = measured
    page = "".join(compare.screen(ctx, Picks(model="demo")))
    buttons = re.findall(r"<button[^>]*class=\"chip\"[^>]*>(.*?)</button>", page)
    texts = {re.sub(r"<[^>]*>", "", button) for button in buttons}
    assert {"KV cache", "KIVI", "RTN", "weights + KV cache"} <= texts
    assert "kv_cache" not in texts
    assert "weights + KV cache" in page


def test_a_run_of_the_cache_alone_has_no_errors_by_layer_and_says_so(measured):
    ctx, ids = measured
    shown = "".join(run.inside(ctx, Picks(model="demo", id=ids["kivi(bits=2)"])))
    above = "".join(run.screen(ctx, Picks(model="demo", id=ids["kivi(bits=2)"])))
    assert run.ONLY_CACHE in shown + above


def test_numbers_of_one_metric_say_which_settings_they_are_of(measured):
    ctx, ids = measured
    page = "".join(run.screen(ctx, Picks(model="demo", id=ids["kv_cache"])))
    assert "window 256" in page
    assert "window 512" in page


def test_keys_and_values_are_drawn_per_block(tmp_path):
    generator = torch.Generator().manual_seed(0)
    found = {}
    for block, times in ((0, 3.0), (1, 30.0)):
        for what in ("keys before RoPE", "keys", "values"):
            x = torch.rand(64, 32, generator=generator) + 0.5
            x[:, 7] *= times if what != "values" else 1
            found[f"{what}/{block}"] = summarize(x)
    write(tmp_path / FILE, found, {"heads": 2})
    head, keys, values, numbers = kv_values.parts(tmp_path, Picks())
    assert "block 1" in head  # the one that stands out most
    assert re.search(r"block 1: (29|3\d)\.\d in keys before RoPE", head)
    assert len(json.loads(keys)["figure"]["data"]) == 2
    assert len(json.loads(values)["figure"]["data"]) == 1
    assert numbers.count("<tr") == 3
    assert "Dotted lines divide heads." in numbers
    assert "block 0: " in kv_values.parts(tmp_path, Picks(kvblock="0"))[0]
    assert kv_values.parts(tmp_path / "none", Picks()) == [""] * 4
