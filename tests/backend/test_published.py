"""Published results as shipped: complete, sourced, and agreeing with what they say."""

from __future__ import annotations

import math
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from backend import published
from backend.metrics import METRICS

M = "meta-llama/Llama-3.1-8B-Instruct"


def perplexities(table: str, **where: object) -> dict[str, float]:
    """{method: WikiText-2 perplexity} of one printed table."""
    rows = published.results()
    rows = rows[(rows["table"] == table) & (rows["metric"] == "wikitext2_ppl")]
    for name, value in where.items():
        rows = rows[(rows[name] == value) | rows["method"].eq("fp16")]
    return dict(zip(rows["method"], rows["value"], strict=True))


def test_every_number_says_what_it_is_and_where_it_was_printed():
    rows = published.results()
    assert len(rows) > 1000
    for name in ("model", "metric", "source", "read_in", "table"):
        assert (rows[name] != "").all(), name
    assert rows["value"].map(math.isfinite).all()
    assert set(rows["better"]) == {"higher", "lower"}
    assert not rows["source"].str.match(r"\d{3}").any()


def test_nothing_is_listed_twice_or_only_repeated():
    rows = published.results()
    assert not rows.duplicated().any()
    assert not rows["table"].str.contains("sample-conversation").any()
    assert not rows["note"].str.contains("direction not meaningful").any()


def test_effective_bits_follow_from_the_group():
    """QRazor keeps 3 more bits per group of g codes: 4 + 3 / g."""
    rows = published.results()
    razored = rows[(rows["method"] == "qrazor") & rows["effective_bits"].notna()]
    assert len(razored)
    for group, bits in zip(razored["group"], razored["effective_bits"], strict=True):
        # Two decimals; one table prints 4.06 for 4.047.
        assert bits == pytest.approx(4 + 3 / group, abs=0.014)


def test_printed_speedups_are_the_ratio_of_printed_latencies():
    rows = published.results()
    kernels = rows[rows["table"] == "LUT-GEMM kernel latency"]
    times = kernels[kernels["metric"] == "latency_ms"]
    base = times[times["method"] == "fp16"].set_index("settings")["value"]
    key = ["settings", "method", "w_bits"]
    both = times.merge(kernels[kernels["metric"] == "speedup"], on=key, suffixes=("", "_times"))
    assert len(both) == 28
    for settings, took, factor in zip(
        both["settings"], both["value"], both["value_times"], strict=True
    ):
        assert base[settings] / took == pytest.approx(factor, abs=0.0051)


def test_known_orderings():
    order = perplexities("LLM.int8() perplexity")
    assert order["fp16"] < order["smoothquant"] < order["llm_int8"] < order["rtn"]
    for bits in (4.0, 3.0):
        table = perplexities("SpQR perplexity", w_bits=bits)
        assert table["fp16"] < table["gptq"] < table["rtn"]


@pytest.mark.parametrize("hub_id", sorted(published.HUB_IDS.values()))
def test_a_model_is_known_by_its_hub_id(hub_id):
    name = published.same_model(hub_id)
    assert published.HUB_IDS[name] == hub_id
    assert published.same_model(f"{hub_id}@0123abc") == name
    assert name in set(published.results()["model"])


@pytest.mark.parametrize("model", ["demo", "", "facebook/opt-125m-mine", "org/"])
def test_other_models_have_no_published_results(model):
    assert published.same_model(model) == ""
    assert not len(published.beside(model, "perplexity", "wikitext2"))


def test_beside_gives_the_same_measurement_in_our_units():
    rows = published.beside(M, "perplexity", "wikitext2")
    assert set(rows["metric"]) == {"wikitext2_ppl"}
    assert 7.22 in set(rows["value"])
    spqr = rows[rows["method"] == "spqr"]
    assert set(spqr["bits"]) == {3.07, 3.99}, "effective bits, not those of the codes"
    shares = published.beside(M, "mmlu/acc,none")
    assert len(shares)
    assert shares["value"].between(0, 1).all()


@pytest.mark.parametrize(
    ("name", "dataset"), [("perplexity", "demo"), ("perplexity", ""), ("mean_kld", "wikitext2")]
)
def test_another_text_or_measurement_has_none(name, dataset):
    assert not len(published.beside(M, name, dataset))


def test_every_measure_we_match_exists_on_both_sides():
    printed, yields = set(published.results()["metric"]), METRICS.load()["perplexity"].yields
    for (name, dataset), metric in published.MEASURES.items():
        assert metric in printed
        assert (name in yields) == bool(dataset), "only perplexity is one measure per text"


def test_the_file_ships_with_the_package():
    root = Path(published.__file__).parent.parent
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert any(
        fnmatch(published.FILE.name, pattern) for pattern in patterns["package-data"]["backend"]
    )
