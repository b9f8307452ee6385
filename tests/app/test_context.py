"""Picks and the URL, and who may change anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.context import Context, Picks

WORD = st.text(st.characters(codec="utf-8", exclude_characters="~"), min_size=1, max_size=12)
LIST = st.lists(WORD, max_size=4).map(tuple)
PICKS = st.builds(
    Picks,
    model=WORD | st.just(""),
    x=WORD | st.just(""),
    xscale=st.sampled_from(["", "log", "linear"]),
    zoom=st.just(()) | st.just(("0.1", "1.2", "-3", "4e-05")),
    family=LIST,
    bits=LIST,
    columns=LIST,
    runs=LIST,
    packed=st.booleans(),
    front=st.booleans(),
    table=st.booleans(),
    search=WORD | st.just(""),
    sort=st.just("-perplexity__delta") | st.just(""),
)


@given(PICKS)
def test_picks_survive_the_url(picks):
    query = picks.query()
    assert Picks.read(dict(parse_qsl(query.removeprefix("?"), keep_blank_values=True))) == picks


def test_default_picks_leave_no_trace_in_the_url():
    assert Picks().query() == ""


def test_a_change_keeps_the_rest():
    assert Picks(x="mean_kld", runs=("a", "b")).query(x="") == "?runs=a~b"


def test_names_with_commas_stay_whole():
    picks = Picks(columns=("arc_easy/acc,none", "perplexity"))
    assert Picks.read(dict(parse_qsl(picks.query()[1:]))) == picks


def test_unknown_parameters_are_left_alone():
    assert Picks.read({"nonsense": "1", "x": "size"}) == Picks(x="size")


# ---- who may do what


def visit(host: str, **headers: str) -> Any:
    cookies = {"quantarena_token": headers.pop("cookie_token", "")}
    query = {"token": headers.pop("query_token", "")}
    return SimpleNamespace(headers={"host": host, **headers}, cookies=cookies, query_params=query)


def context(host: str, token: str = "") -> Context:
    nothing: Any = object()
    return Context(nothing, nothing, Path(), (), host, token, nothing)


@pytest.mark.parametrize(
    ("host", "token", "who", "may"),
    [
        ("127.0.0.1", "", visit("127.0.0.1:7860"), True),
        ("127.0.0.1", "", visit("localhost:7860"), True),
        ("::1", "", visit("[::1]:7860"), True),
        ("127.0.0.1", "", visit("evil.example:7860"), False),  # a name that resolves to loopback
        ("127.0.0.1", "", visit("127.0.0.1:7860", origin="https://evil.example"), False),
        ("127.0.0.1", "", visit("127.0.0.1:7860", origin="http://localhost:7860"), True),
        ("0.0.0.0", "secret", visit("192.168.0.5:7860"), False),
        ("0.0.0.0", "secret", visit("127.0.0.1:7860"), False),
        ("0.0.0.0", "secret", visit("192.168.0.5:7860", cookie_token="secret"), True),
        ("0.0.0.0", "secret", visit("192.168.0.5:7860", cookie_token="Secret"), False),
        ("0.0.0.0", "secret", visit("192.168.0.5:7860", query_token="secret"), True),
        ("0.0.0.0", "secret", visit("x:1", authorization="Bearer secret"), True),
        ("0.0.0.0", "", visit("192.168.0.5:7860", query_token=""), False),
    ],
)
def test_who_may_change_anything(host, token, who, may):
    assert context(host, token).trusted(who) is may
    if may:
        assert context(host, token).change(who)
    else:
        with pytest.raises(PermissionError, match="look but not change"):
            context(host, token).change(who)
