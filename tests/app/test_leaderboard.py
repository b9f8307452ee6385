"""The leaderboard over seeded votes: rows, words, table, filters in the URL, files, honesty."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import pandas as pd
import pytest
import seeded
import seeded_votes
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app import leaderboard_routes, leaderboard_rows, leaderboard_table, leaderboard_words
from app.context import Picks
from app.leaderboard_rows import IMPORTED, PUBLISHED, board
from app.pages import leaderboard
from results_db.judging import agreement
from results_db.ratings import bradley_terry
from results_db.votes import Votes

MODEL = Picks(model="demo")
PARTS = 2 + 3 * len(leaderboard.CHARTS)


@pytest.fixture(scope="module")
def ctx(tmp_path_factory) -> Iterator[Any]:
    """Twelve measured variants with votes of people and judge, and imported battles."""
    home = tmp_path_factory.mktemp("home")
    seeded.fill(home)
    store = seeded.store_of(home)
    votes = seeded_votes.cast(home, store)
    votes.cast_all(seeded_votes.imported())
    yield SimpleNamespace(store=store, home=home, votes=votes)
    store.close()


@pytest.fixture
def unvoted(tmp_path) -> Iterator[Any]:
    """Twelve measured variants, no votes."""
    seeded.fill(tmp_path)
    store = seeded.store_of(tmp_path)
    yield SimpleNamespace(store=store, home=tmp_path, votes=Votes(store, tmp_path / "votes.jsonl"))
    store.close()


def picked(**changes: Any) -> Picks:
    return Picks(**{"model": "demo", **changes})


def shown(ctx: Any, picks: Picks = MODEL) -> list[str]:
    """The page's parts."""
    parts = list(leaderboard.screen(ctx, picks))
    assert len(parts) == PARTS
    return parts


def names_in(table: str) -> list[str]:
    """Variants in the order of the table's rows."""
    return re.findall(r'class="recipe name"[^>]*>.*?data-carry>([^<]+)</a>', table)


# ---- rows


def test_every_variant_is_one_row_rated_or_not(ctx):
    found = board(ctx.store, MODEL)
    assert len(found.rows) == 12
    assert found.rows["variant"].is_unique
    assert found.rows["name"].is_unique
    assert found.rows["perplexity"].notna().all()


def test_ratings_are_those_of_the_counted_votes_alone(ctx):
    """Against the plain function over the very votes that were cast, the odd ones left out."""
    found = board(ctx.store, MODEL)
    cast = seeded_votes.made(seeded_votes.strengths(ctx.store), 600, "human", 0)
    battles = pd.DataFrame([(v.model_a, v.model_b, v.winner) for v in cast],
                           columns=["model_a", "model_b", "winner"])  # fmt: skip
    base = found.rows["variant"][found.rows["is_baseline"]].iloc[0]
    expected = bradley_terry(battles, anchor=(base, 1000.0)).set_index("model")
    mine = found.rows.set_index("variant")
    for name in ("rating", "low", "high", "rank"):
        pd.testing.assert_series_equal(
            mine[name], expected.loc[mine.index, name], check_dtype=False, check_names=False
        )


def test_sorted_by_rating_and_the_baseline_is_fixed(ctx):
    table = board(ctx.store, MODEL).rows
    assert table["rating"].is_monotonic_decreasing
    base = table[table["is_baseline"]].iloc[0]
    assert (base["rating"], base["low"], base["high"]) == (1000.0, 1000.0, 1000.0)


def test_judge_and_people_are_apart(ctx):
    apart = board(ctx.store, MODEL)
    assert apart.votes == 600
    assert apart.judge is not None
    assert apart.judge.votes == 200
    assert 0 < apart.agreement["all"] < 1
    mixed = board(ctx.store, picked(voters=("human", "judge")))
    assert mixed.votes == 800
    assert mixed.judge is None
    assert "mix votes of people and the judge" in "".join(leaderboard_words.facts(mixed))
    assert "mix votes" not in "".join(leaderboard_words.facts(apart))


def test_agreement_is_that_of_every_vote_held_against_every_other(ctx):
    """Counted in SQL by item here; vote by vote there."""
    cast = {kind: list(seeded_votes.made(seeded_votes.strengths(ctx.store), count, kind, seed))
            for kind, count, seed in (("human", 600, 0), ("judge", 200, 1))}  # fmt: skip
    frames = [pd.DataFrame([vars(vote) for vote in votes]) for votes in cast.values()]
    expected = agreement(*frames)
    mine = board(ctx.store, MODEL).agreement
    assert mine["all"] == pytest.approx(expected.all)
    assert mine["decided"] == pytest.approx(expected.decisive)


def test_same_style_leaves_out_votes_without_answers(unvoted):
    known = seeded_votes.strengths(unvoted.store)
    unvoted.votes.cast_all(seeded_votes.made(known, 150, "human", 1))
    bare = next(seeded_votes.made(known, 1, "human", 2))
    unvoted.votes.cast(seeded_votes.changed(bare, conversation_a=(), conversation_b=()))
    assert board(unvoted.store, MODEL).votes == 151
    found = board(unvoted.store, picked(style=True))
    assert found.votes == found.rows["votes"].sum() / 2 == 150
    assert "Same style" in "".join(leaderboard_words.facts(found))


def test_an_anomalous_voter_is_flagged_and_left_out_by_a_switch(unvoted):
    """Thirty voters agree that one variant is better; one says the opposite a hundred times."""
    better, worse, *_ = seeded_votes.strengths(unvoted.store)
    first = next(seeded_votes.made({better: 0, worse: 0}, 1, "human", 0))
    fields = {"model_a": better, "model_b": worse}
    votes = [
        seeded_votes.changed(first, battle_id=str(n), winner="model_b" if odd else "model_a",
                             judge="odd" if odd else f"voter-{n % 30}", tstamp=float(n), **fields)
        for n in range(500) for odd in [n >= 400]
    ]  # fmt: skip
    unvoted.votes.cast_all(votes)
    found = board(unvoted.store, MODEL)
    assert list(found.anomalous) == ["odd"]
    assert found.votes == 500
    assert "1 voter flagged as anomalous, counted" in "".join(leaderboard_words.facts(found))
    head = shown(unvoted)[0]
    assert "Leave out anomalous voters" in head
    clean = board(unvoted.store, picked(clean=True))
    assert clean.votes == 400
    assert clean.voters == 30
    assert "anomalous, left out" in "".join(leaderboard_words.facts(clean))


def test_what_is_left_out_is_counted_once_under_its_reason(ctx):
    found = board(ctx.store, MODEL)
    assert found.left_out == {"leak": 2, "duplicate": 1, "late": 1, "retracted": 1}
    said = "".join(leaderboard_words.facts(found))
    assert "600 votes" in said
    assert "5 left out" in said
    assert "taken back 1" in said


@pytest.mark.parametrize(
    ("filters", "counts"),
    [
        ({"category": "facts"}, lambda v: v.category == "facts"),
        ({"language": "German"}, lambda v: v.language == "German"),
        (
            {"category": "sums", "language": "English"},
            lambda v: (v.category, v.language) == ("sums", "English"),
        ),
    ],
)
def test_filters_choose_the_votes(ctx, filters, counts):
    cast = list(seeded_votes.made(seeded_votes.strengths(ctx.store), 600, "human", 0))
    assert board(ctx.store, picked(**filters)).votes == sum(map(counts, cast))


def test_imported_battles_are_apart_from_ours(ctx):
    found = board(ctx.store, picked(tab=IMPORTED))
    assert set(found.rows["name"]) == {"alpha-7b", "beta-13b", "gamma-70b"}
    assert found.votes == 60
    assert not found.measured
    table = shown(ctx, picked(tab=IMPORTED))[1]
    assert "Perplexity" not in table
    assert "gamma-70b" in table


def test_the_same_picks_are_computed_once(ctx):
    assert board(ctx.store, MODEL) is board(ctx.store, picked(sort="-votes", search="rtn"))
    assert board(ctx.store, MODEL) is not board(ctx.store, picked(style=True))


def test_a_new_vote_is_in_the_next_board(unvoted):
    assert board(unvoted.store, MODEL).votes == 0
    vote = next(seeded_votes.made(seeded_votes.strengths(unvoted.store), 1, "human", 3))
    assert unvoted.votes.cast(vote)
    assert board(unvoted.store, MODEL).votes == 1


def test_a_vote_is_matched_by_what_was_made_not_by_the_text_of_its_recipe(unvoted):
    vote = next(seeded_votes.made(seeded_votes.strengths(unvoted.store), 1, "human", 3))
    end = vote.model_a.rpartition("@")[2]
    unvoted.votes.cast(seeded_votes.changed(vote, model_a=f"demo/written otherwise@{end}"))
    found = board(unvoted.store, MODEL).rows
    assert len(found) == 12
    assert found.set_index("variant")["votes"][vote.model_a] == 1


def test_a_variant_whose_run_is_gone_keeps_its_votes(unvoted):
    vote = next(seeded_votes.made(seeded_votes.strengths(unvoted.store), 1, "human", 3))
    gone = "demo/rtn(bits=5)@0badcafe"
    unvoted.votes.cast(seeded_votes.changed(vote, model_a=gone))
    row = board(unvoted.store, MODEL).rows.set_index("variant").loc[gone]
    assert (row["name"], row["votes"], row["state"]) == ("rtn(bits=5)", 1, "gone")
    assert "rtn(bits=5)" in shown(unvoted)[1]


def test_numbers_measured_otherwise_are_blank_with_the_reason(ctx, monkeypatch):
    wide = leaderboard_rows.rows.wide(ctx.store, "demo")
    odd = wide.index[-1]
    wide.loc[odd, "perplexity__dtype"] = "bfloat16"
    monkeypatch.setattr(leaderboard_rows.rows, "wide", lambda store, model: wide)
    table, names = leaderboard_rows.variants.__wrapped__(ctx.store, -1, "demo")
    assert "perplexity" in names
    blank = table[table["perplexity"].isna()]
    assert list(blank["run_id"]) == [wide.loc[odd, "run_id"]]
    assert "other conditions" in blank["perplexity__why"].iloc[0]


# ---- groups, few votes, separation


def test_few_votes_are_greyed_and_unranked(unvoted):
    known = seeded_votes.strengths(unvoted.store)
    unvoted.votes.cast_all(seeded_votes.made(known, 6, "human", 1))
    found = board(unvoted.store, MODEL)
    assert found.rows["few"][found.rows["votes"] > 0].all()
    table = shown(unvoted)[1]
    assert table.count("few votes") >= 2
    assert 'class="number rank"' not in table


def test_groups_that_no_battle_links_are_listed_apart(unvoted):
    a, b, c, d, *_ = seeded_votes.strengths(unvoted.store)
    for number, (one, other) in enumerate([(a, b)] * 12 + [(c, d)] * 11):
        vote = next(seeded_votes.made({one: 0, other: 0}, 1, "human", number))
        unvoted.votes.cast(seeded_votes.changed(vote, battle_id=str(number)))
    head, table, *_ = shown(unvoted)
    assert "2 groups that no battle links" in head
    assert table.count("Not comparable with those above") == 1
    assert table.count("No votes that count yet") == 1
    pairs = leaderboard_rows.pairs(unvoted.store, MODEL)
    across = pairs[pairs["row"].isin([a, b]) & pairs["column"].isin([c, d])]
    assert across["predicted"].isna().all()


def test_only_wins_are_marked_regularised_and_finite(unvoted):
    a, b, *_ = seeded_votes.strengths(unvoted.store)
    for number in range(20):
        vote = next(seeded_votes.made({a: 0, b: 0}, 1, "human", number))
        won = "model_a" if vote.model_a == a else "model_b"
        unvoted.votes.cast(seeded_votes.changed(vote, battle_id=str(number), winner=won))
    found = board(unvoted.store, MODEL)
    assert found.people.regularised
    assert found.rows["rating"].dropna().between(0, 3000).all()
    head, table, *_ = shown(unvoted)
    assert "<sup" in table
    assert "virtual tie" in head.lower()


def test_no_rank_where_all_intervals_overlap(unvoted):
    known = dict.fromkeys(list(seeded_votes.strengths(unvoted.store))[1:4], 0.0)
    unvoted.votes.cast_all(seeded_votes.made(known, 60, "human", 2))
    table = shown(unvoted)[1]
    assert not board(unvoted.store, MODEL).people.separated
    assert "All intervals overlap" in table


# ---- words


def test_the_headline_names_who_is_clearly_worse(ctx):
    found = board(ctx.store, MODEL)
    said = leaderboard_words.headline(found)
    worst = found.rows.iloc[-1]
    assert worst["high"] < 1000
    assert said.startswith("On demo, people find ")
    assert worst["name"] in said
    assert "worse" in said


def test_the_headline_claims_no_difference_where_intervals_hold_1000(unvoted):
    known = dict.fromkeys(seeded_votes.strengths(unvoted.store), 0.0)
    unvoted.votes.cast_all(seeded_votes.made(known, 200, "human", 4))
    found = board(unvoted.store, MODEL)
    clear = (found.rows["high"] < 1000) | (found.rows["low"] > 1000)
    said = leaderboard_words.headline(found)
    assert clear.any() == any(word in said for word in ("worse", "better"))
    assert "cannot tell" in said


def test_needed_votes_and_fragility_are_said(ctx):
    said = "".join(leaderboard_words.facts(board(ctx.store, MODEL)))
    assert re.search(r"About [\d\u2009]+ more votes between them would tell .+ from .+\.", said)
    assert re.search(r"top rank would pass from .+ to .+ if these \d+ votes \([\d.]+ %\)", said)


def test_ids_never_reach_the_reader(ctx):
    """Votes know variants by long ids; people read names."""
    for part in shown(ctx, picked(interval="bootstrap", style=True)):
        visible = re.sub(r'data-key="[^"]*"', "", part)
        assert not re.search(r"demo/[a-z]+(\(|@)", visible)


def test_nothing_yet_is_one_sentence_and_a_button(unvoted, tmp_path_factory):
    head, table, *charts = shown(unvoted)
    assert "nobody has voted yet" in head
    assert 'href="/arena"' in head
    assert table.count("<tr data-key") == 12
    assert "Perplexity" in table or "perplexity" in table.lower()
    assert not any(charts)
    home = tmp_path_factory.mktemp("bare")
    (home / "runs").mkdir()
    bare = SimpleNamespace(store=seeded.store_of(home), home=home)
    head, *others = shown(bare, Picks())
    assert 'href="/arena"' in head
    assert not any(others)
    head, *others = shown(bare, Picks(tab=IMPORTED))
    assert "No battles were imported" in head
    bare.store.close()


# ---- table


def test_search_family_and_sort(ctx):
    assert len(names_in(shown(ctx)[1])) == 12
    assert all("GPTQ" in name for name in names_in(shown(ctx, picked(search="gptq w"))[1]))
    kept = names_in(shown(ctx, picked(family=("gptq",)))[1])
    assert {name.split()[0] for name in kept} == {"GPTQ", "16-bit"}
    table = board(ctx.store, MODEL).rows
    by_size = names_in(shown(ctx, picked(sort="bits_per_weight"))[1])
    assert by_size == list(table.sort_values("bits_per_weight", kind="stable")["name"])
    falling = names_in(shown(ctx, picked(sort="-perplexity"))[1])
    order = table.sort_values("perplexity", ascending=False, kind="stable")
    assert falling == list(order["name"])


def test_column_groups_switch_off(ctx):
    table = shown(ctx)[1]
    for group in ("People", "Judge", "Automatic", "Cost"):
        assert f"<span>{group}</span>" in table
    less = shown(ctx, picked(hide=("judge", "cost")))[1]
    assert "<span>Judge</span>" not in less
    assert "Bits/weight" not in less
    assert "<span>People</span>" in less


def test_online_elo_is_a_column_when_asked(ctx):
    assert "Online Elo" not in shown(ctx)[1].split("</thead>")[0]
    assert "Online Elo" in shown(ctx, picked(elo=True))[1].split("</thead>")[0]
    assert board(ctx.store, picked(elo=True)).rows["elo"].notna().all()


def test_dots_stand_where_the_numbers_put_them(ctx):
    found = board(ctx.store, MODEL)
    scale = leaderboard_table.scale_of(found)
    assert scale is not None
    assert scale.at(scale.low) == 0
    assert scale.at(scale.high) == 100
    assert scale.at((scale.low + scale.high) / 2) == pytest.approx(50, abs=0.01)
    ends = found.rows[["low", "high", "judge_low", "judge_high"]]
    assert scale.low < ends.min().min()
    assert scale.high > ends.max().max()


def test_what_others_wrote_is_text_never_markup(unvoted):
    hostile = "<img src=x onerror=alert(1)>"
    vote = next(seeded_votes.imported(1))
    odd = seeded_votes.changed(vote, model_a=hostile, judge=hostile, language=hostile)
    unvoted.votes.cast(odd)
    every = tuple(leaderboard.CHARTS)
    for picks in (
        picked(tab=IMPORTED, tables=every),
        picked(search=hostile, category=hostile, language=hostile, family=(hostile,)),
        picked(tab=PUBLISHED, search=hostile, printed=hostile, metric=hostile),
    ):
        for part in shown(unvoted, picks):
            text = part if not part.startswith("{") else json.loads(part)["say"]
            assert "<img" not in text or part.startswith("{")
            for trace in re.findall(r'"text": \[[^\]]*\]', part):
                assert "<img" not in trace


# ---- charts


def test_matrices_mirror(ctx):
    """Win fractions and predictions of a pair add up to 1, counts are the same both ways."""
    pairs = leaderboard_rows.pairs(ctx.store, MODEL)
    both = pairs.merge(pairs, left_on=["row", "column"], right_on=["column", "row"])
    off = both[both["row_x"] != both["column_x"]]
    assert (off["battles_x"] == off["battles_y"]).all()
    assert (off["wins_x"] == off["losses_y"]).all()
    known = off.dropna(subset=["win_fraction_x"])
    assert list(known["win_fraction_x"] + known["win_fraction_y"]) == pytest.approx(
        [1] * len(known)
    )
    assert list(off["predicted_x"] + off["predicted_y"]) == pytest.approx([1] * len(off))
    assert pairs["battles"].sum() == 2 * 600


def test_rows_of_the_matrices_are_in_order_of_rating(ctx):
    order = list(leaderboard_rows.rated(ctx.store, MODEL)["variant"])
    assert list(dict.fromkeys(leaderboard_rows.pairs(ctx.store, MODEL)["row"])) == order


def test_battle_counts_with_and_without_ties(ctx):
    chart = leaderboard.CHARTS["battle_counts"]
    both = chart.rows(ctx.store, MODEL)["value"].sum()
    decided = chart.rows(ctx.store, picked(ties="without"))["value"].sum()
    ties = leaderboard_rows.pairs(ctx.store, MODEL)["ties"].sum()
    assert both - decided == ties > 0


def test_the_vote_mix_counts_every_vote_once_from_the_left(ctx):
    mix = leaderboard_rows.vote_mix(ctx.store, MODEL)
    outcomes = list(leaderboard_rows.OUTCOMES)
    left, variants = mix.iloc[0], mix.iloc[1:]
    assert left[outcomes].sum() == 600
    assert variants[outcomes].sum().sum() == 2 * 600
    assert variants["won"].sum() == variants["lost"].sum() == left["won"] + left["lost"]
    assert 0 <= left["p"] <= 1


@pytest.mark.parametrize("name", sorted(leaderboard.CHARTS))
def test_every_chart_as_a_table(ctx, name):
    at = list(leaderboard.CHARTS).index(name)
    title, figure, said = shown(ctx, picked(tables=(name,)))[2 + 3 * at : 5 + 3 * at]
    assert "Show as chart" in title
    assert figure == ""
    assert "<table>" in said
    assert "nan" not in said.lower().replace("nanc", "")


# ---- published


def test_the_published_tab_is_apart_and_narrows(ctx):
    head, table, *charts = shown(ctx, picked(tab=PUBLISHED))
    assert "measured elsewhere" in head
    assert not any(charts)
    assert "first 300 of" in table
    narrow = picked(tab=PUBLISHED, printed="OPT-125M", metric="wikitext2_ppl", method="gptq")
    table = shown(ctx, narrow)[1]
    body = table.split("<tbody>")[1]
    assert set(re.findall(r'<th scope="row">([^<]+)</th>', body)) == {"OPT-125M"}
    assert "arXiv:2210.17323" in body
    found = shown(ctx, picked(tab=PUBLISHED, search="qrazor w4a4 g16"))[1]
    assert "QRazor" in found
    rising = shown(ctx, picked(tab=PUBLISHED, sort="value", metric="mmlu_acc"))[1]
    values = [float(v) for v in re.findall(r'class="number">([\d.]+) <small>%', rising)]
    assert values == sorted(values)
    assert "No published number" in shown(ctx, picked(tab=PUBLISHED, search="zzz"))[1]


# ---- URL, pace, files


def test_every_choice_lives_in_the_url():
    picks = picked(
        tab=IMPORTED, voters=("human", "judge"), category="facts", language="German", clean=True,
        style=True, interval="bootstrap", elo=True, ties="without", hide=("judge",),
        tables=("ratings",), sort="-rating", search="w4", family=("gptq",),
    )  # fmt: skip
    assert Picks.read(dict(parse_qsl(picks.query()[1:]))) == picks


def test_a_slow_page_follows_less_often():
    pace = leaderboard.Pace(rest=20)
    assert pace.follow(1, now=0.0) == 1
    pace.drawn(now=10.0, took_s=0.5)
    assert pace.follow(2, now=15.0) == 1
    assert pace.follow(3, now=20.0) == 3


@pytest.fixture
def client(ctx) -> TestClient:
    app = FastAPI()
    leaderboard_routes.add_routes(app, ctx)
    return TestClient(app)


READERS = {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}


@pytest.mark.parametrize("kind", sorted(READERS))
def test_files_hold_what_is_shown(client, ctx, kind):
    query = picked(search="gptq", sort="perplexity", hide=("judge",)).query()
    answer = client.get(f"/download/leaderboard.{kind}{query}")
    assert f"quantarena-leaderboard.{kind}" in answer.headers["content-disposition"]
    frame = READERS[kind](io.BytesIO(answer.content))
    assert list(frame["name"]) == names_in(shown(ctx, Picks.read(dict(parse_qsl(query[1:]))))[1])
    assert {"rating", "low", "high", "perplexity", "bits_per_weight"} <= set(frame.columns)
    assert "judge_rating" not in frame


@pytest.mark.parametrize("kind", sorted(READERS))
def test_battles_and_published_numbers_as_files(client, kind):
    frame = READERS[kind](io.BytesIO(client.get(f"/download/battles.{kind}").content))
    assert len(frame) == 600 + 200 + 60
    assert {"model_a", "model_b", "winner", "tstamp"} <= set(frame.columns)
    answer = client.get(f"/download/published.{kind}?printed=OPT-125M")
    frame = READERS[kind](io.BytesIO(answer.content))
    assert set(frame["model"]) == {"OPT-125M"}


def test_an_unknown_format_is_one_sentence(client):
    answer = client.get("/download/leaderboard.xls")
    assert answer.status_code == 404
    assert "no format 'xls'" in answer.json()["error"]
