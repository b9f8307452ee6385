import math

import pandas as pd
import pytest

from results_db import queries

BASE = {"steps": []}


@pytest.fixture
def filled(store, example):
    """A baseline, a quantized run, and a failed run of another model."""
    store.ingest("base", example.spec(**BASE), example.whole(value=5.0), 900)
    store.ingest("gptq", example.spec(), example.whole(value=6.0), 900)
    error = {"type": "ValueError", "message": "no", "todo": "", "traceback": ""}
    lost = [example.submitted(9.0), example.state("failed", 10.0, error=error)]
    store.ingest("lost", example.spec(content="other", model="other"), lost, 90)
    return store


def test_empty_reads_have_their_columns(store):
    assert {"run_id", "is_baseline", "notes"} <= set(queries.runs(store))
    assert {"name", "value", "recipe"} <= set(queries.measurements(store))
    rows = queries.with_baseline(queries.wide(store), ["perplexity"])
    assert rows.empty
    assert {"run_id", "perplexity__delta"} <= set(rows)


def test_named_reads(filled):
    assert queries.runs(filled)["run_id"].tolist() == ["lost", "base", "gptq"]
    assert queries.run(filled, "base")["is_baseline"].tolist() == [True]
    assert queries.run(filled, "nobody").empty
    assert queries.models(filled)[["model", "runs", "done"]].values.tolist() == [
        ["demo", 2, 2],
        ["other", 1, 0],
    ]
    assert len(queries.measurements(filled)) == 6
    assert queries.measurements(filled, "other").empty
    assert queries.layers(filled, "gptq")["value"].tolist() == [0.5, 0.25]
    assert queries.notes(filled, "gptq")["text"].tolist()[0] == "fewer samples than asked"
    scores = queries.items(filled, ["base", "gptq"], "perplexity")
    assert scores.groupby("run_id").size().to_dict() == {"base": 3, "gptq": 3}
    assert queries.items(filled, [], "perplexity").empty


def test_wide_has_one_row_per_run_with_its_conditions(filled):
    rows = queries.wide(filled)
    assert rows["run_id"].tolist() == ["base", "gptq"]
    assert rows["perplexity"].tolist() == [5.0, 6.0]
    gptq = rows.iloc[1]
    assert (gptq["perplexity__n"], gptq["perplexity__stderr"]) == (40, 0.03)
    assert (gptq["perplexity__unit"], gptq["perplexity__better"]) == ("ppl", "lower")
    assert (gptq["perplexity__metric_id"], gptq["perplexity__device"]) == ("m1", "cpu")
    assert (gptq["perplexity__dtype"], gptq["perplexity__version"]) == ("float32", 1)
    assert rows["is_baseline"].tolist() == [True, False]
    assert (gptq["notes"], gptq["state"]) == (2, "done")
    assert gptq["notes_text"] == "fewer samples than asked\ndead columns"
    assert math.isnan(gptq["mean_kld"])
    assert gptq["kld_max"] == math.inf
    assert queries.wide(filled, "other").empty


def test_a_done_run_without_numbers_is_a_blank_row(filled, example):
    store = filled
    store.ingest("bare", example.spec(), [example.state("done")], 10)
    assert "bare" in queries.wide(store)["run_id"].tolist()
    store.ingest("partly", example.spec(), [example.state("running"), example.measured()], 10)
    assert "partly" in queries.wide(store)["run_id"].tolist()


def test_names_keep_to_one_device(store, example):
    """Two names on two devices are two rows; a name with one setting fills both."""
    both = [
        example.measured(name, value, device=device, metric_id=metric_id)
        for name, metric_id in (("perplexity", "m1"), ("mean_kld", "m2"))
        for device, value in (("cpu", 1.0), ("cuda", 2.0))
    ]
    size = example.measured("weight_bytes", 100, device="", metric_id="m3")
    store.ingest("r1", example.spec(), [*both, size], 10)
    rows = queries.wide(store).sort_values("perplexity")
    found = rows[["perplexity", "mean_kld", "weight_bytes"]].values.tolist()
    assert found == [[1.0, 1.0, 100.0], [2.0, 2.0, 100.0]]


def test_settings_of_one_name_are_rows_of_their_own(store, example):
    tasks = [example.measured(f"task{k}", k, metric_id=f"t{k}") for k in range(2)]
    data = [example.measured(value=v, metric_id=d, data=d) for d, v in (("wiki", 1), ("c4", 2))]
    store.ingest("r1", example.spec(), [*tasks, *data], 10)
    rows = queries.wide(store).sort_values("perplexity")
    assert rows["perplexity__data"].tolist() == ["wiki", "c4"]
    assert rows[["task0", "task1"]].values.tolist() == [[0, 1], [0, 1]]


def test_delta_is_against_the_baseline_of_the_same_conditions(filled, example):
    store = filled
    cuda = example.measured(value=9.0, device="cuda")
    store.ingest("cuda", example.spec(), [example.submitted(2.0), cuda], 10)
    foreign = example.measured(value=9.0)
    store.ingest("foreign", example.spec(content="x"), [example.submitted(3.0), foreign], 10)
    rows = queries.with_baseline(queries.wide(store), ["perplexity", "absent"])
    delta = rows.set_index("run_id")["perplexity__delta"]
    assert delta["base"] == 0.0
    assert delta["gptq"] == pytest.approx(0.2, abs=1e-12)
    assert delta[["cuda", "foreign"]].isna().all()
    assert rows["absent__delta"].isna().all()


def test_the_latest_baseline_counts_and_zero_does_not(store, example):
    for t, (run_id, value) in enumerate((("b1", 4.0), ("b2", 8.0), ("b3", 0.0))):
        events = [example.submitted(float(t)), example.measured(value=value)]
        store.ingest(run_id, example.spec(**BASE), events, 10)
    store.ingest("q", example.spec(), [example.submitted(9.0), example.measured(value=4.0)], 10)
    rows = queries.with_baseline(queries.wide(store), ["perplexity"])
    shuffled = queries.with_baseline(queries.wide(store).iloc[::-1], ["perplexity"])
    assert rows.set_index("run_id")["perplexity__delta"]["q"] == -0.5
    pd.testing.assert_frame_equal(shuffled.iloc[::-1], rows)
