"""The run page's error along the depth and its look inside one matrix, on a walk's own files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import seeded
import torch
from transformers import AutoModelForCausalLM

from app import layer_values
from app.charts import depth, layers, lkd
from app.context import Context, Picks
from app.pages import run
from backend.model.checkpoint import Checkpoint
from backend.pipeline import quantize
from backend.recipes import parse
from jobs.events import State, append

SMOOTH = "smoothquant+rtn(bits=8,symmetric=true)+activations(bits=8,symmetric=true)"
MODULE = "self_attn.q_proj"


def walk(folder: Path, model_folder: Path) -> None:
    """Quantize a tiny model with an outlier channel, as a worker does: files and events."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.model.layers[1].input_layernorm.weight.data[5] *= 60
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))

    def measure(found: Any) -> None:
        fields = {"unit": found.unit, "better": found.better, "n": found.n, "stderr": None}
        about = {"metric_id": "w" * 12, "metric": "quantize", "version": 1, "data": "d"}
        place = {"device": "cpu", "dtype": "float32", "storage": "simulated"}
        append(
            folder,
            "measurement",
            name=found.name,
            value=found.value,
            detail={},
            items_file=None,
            layer=list(found.layer),
            **fields,
            **about,
            **place,
        )

    quantize(
        model,
        parse(SMOOTH),
        ids,
        Checkpoint(folder / "blocks"),
        measure=measure,
        statistics=folder / "statistics",
    )


def fill(home: Path, model_folder: Path) -> str:
    """A seeded home where one finished run has a walk's files -> that run's id."""
    seeded.fill(home)
    queue = seeded.queue_of(home)
    done = [v for v in queue.runs() if v.state is State.DONE and "smoothquant" in v.recipe]
    walk(home / "runs" / done[0].run_id, model_folder)
    return done[0].run_id


@pytest.fixture(scope="module")
def walked(tmp_path_factory, llama_folder) -> Iterator[tuple[Context, str]]:
    home = tmp_path_factory.mktemp("home")
    run_id = fill(home, llama_folder)
    store, queue = seeded.store_of(home), seeded.queue_of(home)
    yield Context(store, queue, home, (), "127.0.0.1", "", queue), run_id
    store.close()


def figure_of(value: str) -> dict[str, Any]:
    return json.loads(value)["figure"]


def test_nothing_is_read_before_a_matrix_is_chosen(walked, monkeypatch):
    ctx, run_id = walked
    monkeypatch.setattr(layer_values, "read", lambda *a: pytest.fail("read without being asked"))
    along, head, *rest = run.inside(ctx, Picks(id=run_id))
    assert figure_of(along)["data"]
    assert layer_values.HINT in head
    assert head.count("<option") == 1 + 3 + 1 + 7  # blocks and matrices, each with "choose"
    assert not any(rest)


def test_a_chosen_matrix_shows_the_outlier_before_and_not_after(walked):
    ctx, run_id = walked
    picks = Picks(id=run_id, block="1", module=MODULE)
    _, head, *figures, numbers = run.inside(ctx, picks)
    assert f"{MODULE} of block 1" in head
    times = [float(t) for t in re.findall(r"([\d.]+) times", head)]
    assert times[0] > 10 > times[1]
    assert len(figures) == layer_values.PLOTS
    peaks = figure_of(figures[2])["data"]
    assert [trace["name"] for trace in peaks] == ["before", "after"]
    assert peaks[0]["y"].index(max(peaks[0]["y"])) == 5
    surfaces = [figure_of(value) for value in figures[4:]]
    assert all(s["data"][0]["type"] == "surface" for s in surfaces)
    ranges = [s["layout"]["scene"]["zaxis"]["range"] for s in surfaces]
    assert ranges[0] == ranges[1]
    tops = [max(map(max, s["data"][0]["z"])) for s in surfaces]
    assert tops[0] > 10 * tops[1]
    assert "excess kurtosis" in numbers
    assert "Output SQNR" in numbers
    assert all(json.loads(value)["say"].endswith(".") for value in figures)


def test_one_of_block_and_module_is_enough_and_nonsense_is_forgiven(walked):
    ctx, run_id = walked
    _, head, *_ = run.inside(ctx, Picks(id=run_id, block="2"))
    assert f"{MODULE} of block 2" in head
    _, head, *_ = run.inside(ctx, Picks(id=run_id, module="mlp.down_proj"))
    assert "mlp.down_proj of block 0" in head
    _, head, *_ = run.inside(ctx, Picks(id=run_id, block="<b>", module="../../spec.json"))
    assert "<b>" not in head


def test_the_heat_map_marks_the_cell_and_says_what_a_click_sets(walked):
    ctx, run_id = walked
    heat = layers.rows(ctx.store, Picks(id=run_id, block="1", module=MODULE))
    assert "" not in set(heat["module"])
    fig = layers.draw(heat)
    assert fig.layout.meta == {"params": ["block", "module"]}
    assert fig.data[0].customdata[1][0] == f"1~{MODULE}"
    assert len(fig.layout.shapes) == 1
    assert not layers.draw(layers.rows(ctx.store, Picks(id=run_id))).layout.shapes


def test_runs_without_files_show_no_panel_and_the_16_bit_run_says_why(walked):
    ctx, run_id = walked
    done = [v for v in ctx.runs.runs() if v.state is State.DONE]
    other = next(v.run_id for v in done if v.spec.steps and v.run_id != run_id)
    assert not any(run.inside(ctx, Picks(id=other))[1:])
    plain = next(v.run_id for v in done if not v.spec.steps)
    assert layer_values.NO_BASELINE in run.screen(ctx, Picks(id=plain))[1]
    assert not any(run.inside(ctx, Picks(id=plain)))
    assert not any(run.inside(ctx, Picks(id="nothing")))


def test_depth_names_the_end_and_the_worst_block_and_leaves_infinity_out(walked):
    ctx, run_id = walked
    table = depth.chart_rows(ctx.store, Picks(id=run_id))
    assert set(table["name"]) == set(depth.LINES)
    assert len(table) == len(depth.LINES) * 4 - 2  # seeded matrices have 4 blocks, the walk 3
    worst = table[table["name"] == "block_sqnr"].sort_values("value").iloc[0]
    assert f"Block {worst['block']} alone loses most: {worst['value']:.1f} dB" in depth.say(table)
    lossless = pd.DataFrame(
        {"name": ["block_sqnr"], "block": [0], "value": [float("inf")], "line": ["x"]}
    )
    assert depth.draw(lossless).data[1].y == (None,)
    assert "none" in depth.say(lossless)


def curve(*losses: float, block: int = 0) -> pd.DataFrame:
    steps = [5 * at for at in range(len(losses))]
    return pd.DataFrame({"block": block, "step": steps, "value": losses})


def test_the_kept_step_of_a_distilled_block_is_ringed_and_its_gain_told():
    table = pd.concat([curve(0.4, 0.1, 0.2), curve(0.2, 0.3, block=1)], ignore_index=True)
    lines = lkd.draw(table).data
    assert [line.name for line in lines] == ["block 0", "block 1"]
    assert lines[0].marker.symbol == ("circle", "circle-open", "circle")
    assert lines[1].marker.symbol == ("circle-open", "circle")
    said = lkd.say(table)
    assert "62.5 % of the held-out" in said
    assert "least in block 1, where 100.0 % is left" in said
    assert "25.0 %" in lkd.say(table[table["block"] == 0])
    lossless = lkd.draw(curve(0.1, 0.0))
    assert lossless.data[0].y == (0.1, None)  # a log axis has no place for 0


def test_a_distilled_run_shows_its_curves_or_their_table(walked):
    ctx, run_id = walked
    head, chart, said = run.lessons(ctx, Picks(id=run_id))
    assert "Show as table" in head
    assert len(figure_of(chart)["data"]) == 4
    assert "ringed" in said
    head, chart, said = run.lessons(ctx, Picks(id=run_id, tables=("lkd",)))
    assert "Show as chart" in head
    assert not chart
    assert said.count("<tr") == 1 + 6
    assert said.count("<b>") == 4
    assert "lkd_loss" not in layers.rows(ctx.store, Picks(id=run_id)).attrs["names"]
    plain = next(v.run_id for v in ctx.runs.runs() if v.state is State.DONE and not v.spec.steps)
    assert run.lessons(ctx, Picks(id=plain)) == ["", "", ""]
