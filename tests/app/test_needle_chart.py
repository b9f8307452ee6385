"""The needle heat map of a run and its difference to another, from stored measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import seeded

from app.charts import needle
from app.context import Context, Picks
from app.pages import run
from jobs.events import State, append

LENGTHS, DEPTHS, REPEATS = [256, 1024], [0.0, 50.0, 100.0], 4
OTHER_SETTING = "o" * 12
SETTING = "n" * 12


def event(scores: Sequence[float], setting: str, **detail: Any) -> dict[str, Any]:
    """A measurement of the metric as a worker writes it."""
    cells = np.reshape(scores, (len(LENGTHS), len(DEPTHS), REPEATS)).mean(2)
    count = len(scores)
    about = {
        "lengths": LENGTHS,
        "depths": DEPTHS,
        "repeats": REPEATS,
        "needles": 1,
        "cells": cells.tolist(),
        "left_out": {"4096": "longer than the context of 2048"},
        "keys": ["47x291"] * count,
        "answers": [" 47x291." if score else " <b>47</b>" for score in scores],
    }
    return {
        "metric_id": setting,
        "metric": "needle",
        "version": 1,
        "name": "needle",
        "value": float(np.mean(scores)),
        "unit": "share",
        "better": "higher",
        "n": count,
        "stderr": 0.1,
        "layer": None,
        "detail": about | detail,
        "device": "cpu",
        "dtype": "float32",
        "storage": "simulated",
        "data": "d",
        "items_file": None,
    }


SOUND = [1.0] * 24
LOSING = [*[1.0] * 12, *[0, 1, 1, 0], *[0, 0, 0, 1], *[1.0] * 4]  # the long ones at 0 and 50 %
SHARES = {
    "rounded_keys": [0.5] * 24,
    "rounded_values": [0.7] * 24,
    "needle_rounded": [*[1.0] * 20, *[0.0] * 4],
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Iterator[tuple[Context, dict[str, str]]]:
    """A seeded home with runs that found all, lost some, and were asked for something else."""
    home = tmp_path_factory.mktemp("home")
    seeded.fill(home)
    queue = seeded.queue_of(home)
    done = [v for v in queue.runs() if v.state is State.DONE]
    ids = dict(zip(("sound", "losing", "apart"), (v.run_id for v in done), strict=False))
    append(home / "runs" / ids["sound"], "measurement", **event(SOUND, SETTING))
    append(home / "runs" / ids["losing"], "measurement", **event(LOSING, SETTING, **SHARES))
    append(home / "runs" / ids["apart"], "measurement", **event(SOUND, OTHER_SETTING))
    store = seeded.store_of(home)
    yield Context(store, queue, home, (), "127.0.0.1", "", queue), ids
    store.close()


def rows_of(asked, name: str, against: str = "") -> pd.DataFrame:
    ctx, ids = asked
    return needle.chart_rows(ctx.store, Picks(id=ids[name], against=ids.get(against, against)))


def cell(table: pd.DataFrame, length: int, depth: float) -> pd.Series:
    return table[(table["length"] == length) & (table["depth"] == depth)].iloc[0]


def test_cells_are_the_shares_of_their_answers(asked):
    table = rows_of(asked, "losing")
    assert len(table) == (len(LENGTHS) + 1) * len(DEPTHS)
    assert cell(table, 1024, 0)["value"] == 0.5
    assert cell(table, 1024, 50)["value"] == 0.25
    assert cell(table, 1024, 50)["n"] == REPEATS
    assert cell(table, 1024, 50)["rounded"] == pytest.approx(0.6)
    assert pd.isna(cell(table, 4096, 50)["value"])
    assert rows_of(asked, "sound")["rounded"].isna().all()


def test_the_picture_has_lengths_across_depths_down_and_means(asked):
    table = rows_of(asked, "losing")
    (heat,) = needle.draw(table).data
    assert [str(x).replace("\u2009", "") for x in heat.x] == ["256", "1024", "4096", "mean"]
    assert list(heat.y) == ["0 %", "50 %", "100 %", "mean"]
    assert [list(line) for line in heat.z] == [
        [1.0, 0.5, None, 0.75],
        [1.0, 0.25, None, 0.625],
        [1.0, 1.0, None, 1.0],
        [1.0, pytest.approx(1.75 / 3), None, pytest.approx(4.75 / 6)],
    ]
    assert tuple(heat.text[0]) == ("100", "50", "", "75")
    assert tuple(heat.text[2]) == ("100", "100*", "", "100")  # that needle was still in 16 bits
    assert needle.draw(table).layout.yaxis.autorange == "reversed"


def test_a_cell_tells_its_wrong_answers_and_no_markup_of_theirs(asked):
    (heat,) = needle.draw(rows_of(asked, "losing")).data
    told = heat.customdata[1][1]
    assert "47x291 → &lt;b&gt;47&lt;/b&gt;" in told
    assert "<b>47</b>" not in told
    assert "60.0 % of the cache was rounded" in told
    assert heat.customdata[0][2] == "not asked"


def test_the_difference_is_this_run_less_the_other(asked):
    table = rows_of(asked, "losing", "sound")
    assert needle.shown(table) == "difference"
    assert cell(table, 1024, 50)["difference"] == -0.75
    (heat,) = needle.draw(table).data
    assert (heat.zmin, heat.zmax) == (-1, 1)
    assert tuple(heat.text[1]) == ("0", "−75", "", "−38")
    back = rows_of(asked, "sound", "losing")
    assert back["difference"].tolist()[:6] == (-table["difference"]).tolist()[:6]
    assert "+75" in needle.draw(back).data[0].text[1]
    assert "2 of 6 cells lose keys and 0 gain some" in needle.say(table)
    assert "20.8 points fewer than" in needle.say(table)
    assert set(needle.columns(table)) <= set(table.columns)


def test_other_prompts_have_no_difference(asked):
    table = rows_of(asked, "losing", "apart")
    assert needle.shown(table) == "value"
    assert "did not answer the same prompts" in needle.say(table)
    assert needle.shown(rows_of(asked, "losing", "no-such-run")) == "value"


def test_the_sentence_says_how_far_keys_are_found(asked):
    said = needle.say(rows_of(asked, "losing"))
    assert "finds 79.2 % of 24 keys: at least 90 % up to 256 tokens" in said
    assert "the least, 58.3 %, at 1\u2009024 tokens" in said
    assert "In 1 cell, marked *, the key was among the tokens in 16 bits." in said
    assert "4\u2009096 tokens were not asked: longer than the context of 2048." in said
    sound = needle.say(rows_of(asked, "sound"))
    assert "finds 100.0 % of 24 keys, at least 100.0 % at every length up to" in sound
    assert "marked" not in sound


def test_the_page_offers_runs_that_answered_the_same_and_keeps_the_choice(asked):
    ctx, ids = asked
    picks = Picks(id=ids["losing"])
    head, chart, said = run.needles(ctx, picks)
    assert f'value="{ids["sound"]}"' in head
    assert f'value="{ids["apart"]}"' not in head
    assert json.loads(chart)["say"].endswith(".")
    assert not said
    chosen = run.needles(ctx, Picks(id=ids["losing"], against=ids["sound"]))
    assert "selected" in chosen[0].split(f'value="{ids["sound"]}"')[1].split(">")[0]
    assert json.loads(chosen[1])["figure"]["data"][0]["zmin"] == -1


def test_the_table_has_the_numbers_of_the_picture(asked):
    ctx, ids = asked
    head, chart, said = run.needles(ctx, Picks(id=ids["losing"], tables=("needle",)))
    assert "Show as chart" in head
    assert not chart
    assert said.count("<tr") == 1 + len(DEPTHS) + 1
    for number in ("50", "25", "100", "–"):
        assert f">{number}</td>" in said


def test_a_run_without_needles_shows_nothing(asked):
    ctx, _ = asked
    assert run.needles(ctx, Picks(id="nothing")) == ["", "", ""]
    assert needle.runs_alike(ctx.store, "nothing") == []
    assert (
        needle.say(needle.chart_rows(ctx.store, Picks())) == "This run was not asked for needles."
    )
