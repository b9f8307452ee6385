"""The chat page: conversations, sides, what is told of answers, links, files, who may what."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import wait
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
import seeded
from chat_stand_in import StandIn, token_of
from hypothesis import given
from hypothesis import strategies as st

from app import chat_bar, chats, sides, token_view
from app.chat_parts import waiting
from app.context import SESSION_NAME, Context
from app.pages import chat
from app.permalink import LONGEST, from_query, to_query
from jobs.chat_types import AnswerView, PoolState, Sampling

CHAT = "c0ffee00c0ffee00"
BASE, OTHER = (["The", " third", "."], ["The", " second", " one", "."])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Context]:
    """The tour's runs, all finished."""
    folder = tmp_path_factory.mktemp("home")
    seeded.fill(folder)
    store, queue = seeded.store_of(folder), seeded.queue_of(folder)
    yield Context(store, queue, folder, (), "127.0.0.1", "", queue)
    store.close()


@pytest.fixture(scope="module")
def known(home) -> tuple[sides.Variant, ...]:
    return sides.variants(home.store, "demo")


@pytest.fixture
def pair(known) -> list[str]:
    """Run ids of the two sides shown by default: 16-bit, and the most different."""
    return [side.run_id for side in sides.chosen(known, ())]


class Page:
    """The page as one browser sees it."""

    def __init__(self, home: Context, pool: StandIn, session: str = "me", host: str = "") -> None:
        fields = {**home.__dict__, "chat": pool, "host": host or home.host}
        self.desk = chat.Desk(Context(**fields))
        self.pool = pool
        self.session = session
        self.params: dict[str, str] = {"chat": CHAT}

    def request(self, session: str = "") -> Any:
        cookies = {SESSION_NAME: session or self.session}
        headers = {"host": "127.0.0.1:7860"}
        client = SimpleNamespace(host="127.0.0.1")
        return SimpleNamespace(
            headers=headers, cookies=cookies, query_params=self.params, client=client
        )

    def do(self, move: str, **data: Any) -> Any:
        """One action; the address follows what it answers, as in the browser."""
        answer = self.desk.perform({"do": move, **data}, self.request())
        for name, value in answer.get("params", {}).items():
            self.params = {k: v for k, v in self.params.items() if k != name}
            self.params |= {name: value} if value else {}
        return answer

    def parts(self, session: str = "") -> list[str]:
        return [str(part) for part in self.desk.screen(self.request(session))]

    @property
    def text(self) -> str:
        return "".join(self.parts())

    def answers(self) -> list[str]:
        """Each answer of the last prompt as HTML."""
        return re.findall(r"<article.*?</article>", self.parts()[3], re.DOTALL)


@pytest.fixture
def page(home, pair) -> Page:
    """Both sides answer at once."""
    return Page(home, StandIn({pair[0]: BASE, pair[1]: OTHER}))


@pytest.fixture
def slow(home, pair) -> Page:
    """Answers grow when `pool.grow` is called."""
    return Page(home, StandIn({pair[0]: BASE, pair[1]: OTHER}, slow=True))


# ---- sides


def test_the_16_bit_model_stands_beside_the_most_different_variant(known):
    base, other = sides.chosen(known, ())
    assert base.baseline
    assert other.divergence == max(v.divergence for v in known if not v.baseline)


def test_one_named_run_gets_its_16_bit_model_beside_it(known):
    named = next(v for v in known if v.family == "gptq")
    assert [v.run_id for v in sides.chosen(known, [named.run_id])][1] == named.run_id
    assert sides.chosen(known, [named.run_id])[0].baseline
    base = known[0]
    assert sides.chosen(known, [base.run_id])[0] is base
    assert len(sides.chosen(known, [base.run_id])) == 2


def test_four_sides_at_most_in_the_order_of_the_address(known):
    ids = [v.run_id for v in known]
    assert [v.run_id for v in sides.chosen(known, ["gone", *ids[3:0:-1], ids[3]])] == ids[3:0:-1]
    assert len(sides.chosen(known, ids)) == sides.MOST
    assert sides.chosen((), ids) == []


def test_unmeasured_variants_are_told_apart_by_their_bits(known):
    from dataclasses import replace

    plain = [replace(v, divergence=float("nan")) for v in known if not v.baseline]
    assert sides.most_different(plain).bits == min(v.bits for v in plain)


def test_panes_change_places_are_filled_and_emptied(page, known, pair):
    third = next(v.run_id for v in known if v.run_id not in pair)
    page.do("swap", at=1, value=third)
    assert page.params["runs"] == f"{pair[0]}~{third}"
    page.do("swap", at=0, value=third)
    assert page.params["runs"] == f"{third}~{pair[0]}"
    page.do("add", value=pair[1])
    assert page.params["runs"].split("~") == [third, pair[0], pair[1]]
    assert page.text.count('aria-label="Remove ') == 3
    page.params["runs"] += "~gone"
    assert "1 of the runs in this link" in page.text


def test_loading_and_failure_are_told(page, pair):
    page.pool.states = {
        pair[0]: PoolState("ready", bytes=3 << 20),
        pair[1]: PoolState("failed", "block 2 is missing; quantize the run again"),
    }
    heads = page.parts()[1]
    assert "ready, 3.00 MiB" in heads
    assert "block 2 is missing; quantize the run again" in heads
    page.do("warm")
    assert [page.pool.warmed.get(timeout=1) for _ in pair] == pair


# ---- conversations


def test_a_prompt_goes_to_every_side_with_the_same_seed_and_settings(page, pair):
    page.params |= {"temperature": "0.7", "seed": "5", "max_new": "9"}
    answer = page.do("send", text="  Which place?  ")
    assert answer["fill"] == {"prompt": ""}
    assert page.params["q"] == "Which place?"
    assert [(run, sampling) for run, _, sampling, _ in page.pool.asked] == [
        (run, Sampling(0.7, 1.0, 9, 5)) for run in pair
    ]
    first, second = page.answers()
    assert "The third." in first
    assert "The second one." in second
    assert "temperature 0.7, top-p 1, seed 5" in page.text


def test_every_side_remembers_its_own_answers(page, pair):
    page.do("send", text="one")
    page.do("send", text="two")
    for run, messages, _, _ in page.pool.asked[2:]:
        own = "".join(BASE if run == pair[0] else OTHER)
        assert [(m.role, m.content) for m in messages] == [
            ("user", "one"),
            ("assistant", own),
            ("user", "two"),
        ]
    assert page.params["q"] == "one~two"


def test_a_side_that_joins_later_answers_the_earlier_prompts_first(page, pair, known):
    page.do("send", text="one")
    page.do("send", text="two")
    third = next(v.run_id for v in known if v.run_id not in pair)
    page.do("add", value=third)
    page.parts()
    page.parts()
    late = [messages for run, messages, _, _ in page.pool.asked if run == third]
    assert [m[-1].content for m in late] == ["one", "two"]


def test_nothing_is_asked_while_answers_are_under_way(slow):
    slow.do("send", text="one")
    with pytest.raises(ValueError, match="still being answered"):
        slow.do("send", text="two")
    assert slow.params["q"] == "one"
    slow.pool.grow(9)
    slow.do("send", text="two")
    assert slow.params["q"] == "one~two"


def test_stopping_keeps_what_came_and_asks_nothing_more(slow, pair):
    slow.params["q"] = "one~two"
    slow.do("send_all")
    slow.pool.grow(1)
    slow.do("stop", run=pair[1])
    slow.pool.grow(9)
    slow.parts()
    assert [run for run, *_ in slow.pool.asked] == [pair[0], pair[1], pair[0]]
    assert "Not asked." in slow.answers()[1]
    assert "The" in slow.parts()[2]
    slow.do("retry", run=pair[1])
    assert slow.pool.asked[-1][1][-1].content == "two"
    slow.do("stop")
    assert "stopped" in slow.text
    assert 'class="answer busy"' not in slow.text


def test_a_failed_side_says_why_and_can_be_asked_again(slow, pair):
    slow.do("send", text="one")
    slow.pool.told[1].fail("the process ended; it may have run out of memory")
    slow.pool.told[0].grow(9)
    assert "it may have run out of memory" in slow.answers()[1]
    slow.do("send", text="two")
    assert "Not asked: its answer above failed." in slow.answers()[1]
    slow.pool.grow(9)
    slow.parts()
    assert [run for run, *_ in slow.pool.asked].count(pair[1]) == 1, "not tried again by itself"
    slow.do("retry", run=pair[1])
    for _ in range(2):
        slow.pool.grow(9)
        slow.parts()
    assert [m[-1].content for run, m, _, _ in slow.pool.asked if run == pair[1]] == [
        "one",
        "one",
        "two",
    ]
    assert "The second one." in slow.answers()[1]


def test_a_refused_prompt_leaves_no_trace_and_a_refusing_side_says_why(page, pair):
    page.pool.refuses = dict.fromkeys(pair, "200 answers wait for this model; try again later")
    with pytest.raises(ValueError, match="200 answers wait"):
        page.do("send", text="one")
    assert 'class="turn"' not in page.text
    page.pool.refuses = {pair[1]: "200 answers wait for this model; try again later"}
    page.do("send", text="one")
    assert "200 answers wait" in page.answers()[1]
    page.pool.refuses = {}
    page.do("retry", run=pair[1])
    assert "The second one." in page.answers()[1]


def test_again_takes_changed_settings_or_the_next_seed(page, pair):
    page.do("send", text="one")
    with pytest.raises(ValueError, match="same again"):
        page.do("again")
    page.params["temperature"] = "1"
    page.do("again")
    assert page.pool.asked[-1][2] == Sampling(1.0, 1.0, 256, 0)
    page.do("again")
    assert page.params["seed"] == "1"
    assert [sampling.seed for _, _, sampling, _ in page.pool.asked[-2:]] == [1, 1]
    assert len(page.desk.chats.find("me", CHAT).turns) == 1


def test_a_copied_address_shows_nobody_elses_words(page):
    page.do("send", text="my secret")
    assert "The third." in page.text
    theirs = "".join(page.parts(session="somebody else"))
    assert "The third." not in theirs
    assert "This link carries this prompt" in theirs
    assert "my secret" in theirs  # the prompt is in the address, the answers are not


def test_a_link_offers_to_ask_the_same_again(slow, pair):
    slow.params["q"] = to_query(["one", "two"])
    assert "Ask these prompts" in slow.text
    slow.do("send_all")
    slow.pool.grow(9)
    slow.parts()
    slow.pool.grow(9)
    slow.parts()
    prompts = [messages[-1].content for _, messages, _, _ in slow.pool.asked]
    assert prompts == ["one", "one", "two", "two"]
    with pytest.raises(ValueError, match="begun already"):
        slow.do("send_all")


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5))
def test_prompts_survive_the_address(prompts):
    text = to_query(prompts)
    assert from_query(text) == prompts or len(text) == 0


def test_long_conversations_do_not_fit_a_link():
    assert to_query(["x" * LONGEST]) == "x" * LONGEST
    assert to_query(["x" * (LONGEST + 1)]) == ""
    assert to_query(["ü" * LONGEST]) == ""  # each becomes six characters


def test_limits_are_said_in_one_sentence(page, monkeypatch):
    for bad, words in [("   ", "write something"), ("x" * 8001, "at most 8,000")]:
        with pytest.raises(ValueError, match=words):
            page.do("send", text=bad)
    page.params["chat"] = "../../etc"
    with pytest.raises(ValueError, match="holds no conversation"):
        page.do("send", text="hello")
    page.params["chat"] = CHAT
    monkeypatch.setattr(chats, "MOST_TURNS", 1)
    page.do("send", text="one")
    with pytest.raises(ValueError, match="ends after 1 prompts"):
        page.do("send", text="two")
    page.session = ""
    with pytest.raises(ValueError, match="cookie"):
        page.do("send", text="two")


def test_a_visitor_without_token_may_chat_but_not_start_runs(home, pair):
    page = Page(home, StandIn(dict.fromkeys(pair, BASE)), host="0.0.0.0")
    page.do("send", text="hello")
    assert "The third." in page.text
    with pytest.raises(PermissionError, match="token"):
        page.do("tour")


def test_a_visitor_who_asks_too_fast_is_told_when_to_go_on(home, pair):
    page = Page(home, StandIn(dict.fromkeys(pair, BASE)), host="0.0.0.0")
    for count in range(10):
        page.params["chat"] = f"{count:010d}"
        page.do("send", text="hello")
    page.params["chat"] = "0000000099"
    with pytest.raises(ValueError, match="10/min is the limit of typed prompts"):
        page.do("send", text="hello")


def test_conversations_are_bounded_and_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(chats, "KEPT_EACH", 3)
    kept = chats.Chats(StandIn({"a": BASE}))
    for count in range(5):
        kept.open("me", f"{count:010d}")
    kept.open("you", "0000000000")
    assert [kept.find("me", f"{c:010d}") is None for c in range(5)] == [True, True] + [False] * 3
    assert kept.find("you", "0000000000") is not None
    monkeypatch.setattr(chats, "KEPT", 2)
    kept.open("they", "0000000000")
    assert kept.find("me", "0000000004") is None


def test_a_session_has_few_conversations_under_way_at_once():
    kept = chats.Chats(StandIn({"a": BASE}, slow=True))
    for count in range(chats.BUSY_EACH):
        kept.open("me", f"{count:010d}").ask(["hi"], Sampling(), ["a"])
    with pytest.raises(ValueError, match="still being answered"):
        kept.open("me", "0000000009")
    kept.open("you", "0000000009")
    kept.open("me", "0000000000").stop()
    kept.open("me", "0000000009")


# ---- what is told of an answer


def test_numbers_under_an_answer(page):
    page.do("send", text="one")
    base, other = page.answers()
    assert "<dt>Tokens</dt><dd>3</dd>" in base
    assert "by itself" in base
    assert "50 tokens/s" in base
    assert "0.10 s" in base
    assert "As 16-bit for" not in base
    assert "1 token</span>" in other.split("As 16-bit for")[1]


def test_a_simulated_answer_has_a_dash_for_its_speed_and_says_why(slow, pair):
    slow.do("send", text="one")
    told = slow.pool.told[1]
    told.grow(2)
    told._view = told._view.__class__(**{**told._view.__dict__, "packed": False})
    told.grow(9)
    told._view = told._view.__class__(**{**told._view.__dict__, "packed": False})
    text = slow.answers()[1]
    assert "tokens/s" not in text
    assert text.count("simulated: slower than the real thing by construction") == 2


def test_waiting_is_told_with_the_place_in_line():
    assert waiting(AnswerView(position=3)) == "In line: 3 answers of this model first."
    assert waiting(AnswerView(position=1)) == "In line: 1 answer of this model first."
    assert waiting(AnswerView(state="loading")) == "Loading the model…"


def test_divergence_index_grows_until_they_part(slow):
    slow.do("send", text="one")
    slow.pool.grow(1)
    assert "1 so far" in slow.answers()[1]
    slow.pool.grow(1)
    assert "1 token</span>" in slow.answers()[1]


def test_equal_answers_are_said_to_be_equal(home, pair):
    page = Page(home, StandIn(dict.fromkeys(pair, BASE)))
    page.params["part"] = "1"
    page.do("send", text="one")
    assert "all 3" in page.answers()[1]
    assert "The same tokens as the 16-bit answer." in page.answers()[1]


# ---- where they part


def scored(page: Page) -> None:
    """Wait until every comparison that was asked for has ended."""
    turns = page.desk.chats.find("me", CHAT).turns
    made = [attempts[-1] for turn in turns for attempts in turn.attempts.values()]
    assert not wait([f for attempt in made for f in attempt.scores.values()], 30).not_done


def test_tokens_are_coloured_and_the_first_that_differs_is_marked(page, pair):
    page.params["part"] = "1"
    page.do("send", text="one")
    page.parts()
    scored(page)
    base, other = page.answers()
    assert set(page.pool.scored) == {(run, pair[0]) for run in pair}
    classes = re.findall(r'<span class="(tok[^"]*)" data-at', other)
    assert classes == ["tok k0", "tok k1 parts", "tok k2", "tok k3"]
    assert re.findall(r'<span class="(tok[^"]*)" data-at', base) == ["tok", "tok parts", "tok"]
    assert "Token 2 is “ second” where 16-bit says “ third”." in other
    assert "highest 1.00 at token 4" in other
    assert "KL divergence from the 16-bit model" in page.text
    data = json.loads(re.search(r'data-tokens="([^"]*)"', other)[1].replace("&#34;", '"'))
    assert data["parts"][:2] == [1, token_of(" third")]
    assert data["texts"][data["base"][0][0][1]] == " eight"
    assert len(data["kld"]) == len(data["own"]) == 4


def test_an_answer_that_ends_sooner_is_marked_at_its_end(home, pair):
    page = Page(home, StandIn({pair[0]: BASE, pair[1]: BASE[:2]}))
    page.params["part"] = "1"
    page.do("send", text="one")
    assert "ends here; 16-bit goes on with “.”" in page.answers()[1]


def test_a_failed_comparison_is_one_sentence(page, monkeypatch):
    def fails(*args: Any) -> Any:
        raise ValueError("prompt and answer take 1,100 tokens, the model's context is 1,024")

    monkeypatch.setattr(page.pool, "score", fails)
    page.params["part"] = "1"
    page.do("send", text="one")
    page.parts()
    scored(page)
    assert "The comparison failed: prompt and answer take" in page.answers()[1]


def test_an_answer_continues_with_the_other_token_and_comes_back(page, pair):
    page.params["part"] = "1"
    page.do("send", text="one")
    page.parts()
    scored(page)
    page.do("fork", run=pair[1], at=1, token=token_of(" third"))
    assert page.pool.asked[-1][0] == pair[1]
    assert page.pool.asked[-1][3] == (token_of("The"), token_of(" third"))
    assert "with “ third” instead of “ second”" in page.answers()[1]
    assert "4, 2 kept" in page.answers()[1]
    page.do("unfork", run=pair[1])
    assert "instead of" not in page.answers()[1]
    with pytest.raises(ValueError, match="not offered"):
        page.do("fork", run=pair[1], at=1, token=999_999)
    page.do("fork", run=pair[1], at=3, token=8)


def test_only_the_last_answer_is_continued_another_way(page, pair):
    page.params["part"] = "1"
    page.do("send", text="one")
    page.do("send", text="two")
    assert "data-fork" in page.parts()[3]
    page.params["turn"] = "1"
    past = page.parts()[2]
    assert "data-tokens" in past
    assert "data-fork" not in past
    assert "data-tokens" not in page.parts()[3]
    assert "Show its tokens" in page.parts()[3]


def test_without_a_16_bit_run_colours_say_what_they_need(home, known):
    from dataclasses import replace

    lonely = [replace(v, content="other") for v in known if not v.baseline][:2]
    scene = chat.Scene(lonely, lonely, {}, None, True)
    why = chat.chat_parts.divergence(scene, SimpleNamespace(view=AnswerView()), lonely[0])[1]
    assert "finished 16-bit run" in why


@pytest.mark.parametrize(
    ("kld", "level"), [(0, 0), (0.0099, 0), (0.01, 1), (0.1, 2), (0.5, 3), (1.99, 3), (2, 4)]
)
def test_levels_of_divergence(kld, level):
    assert token_view.level(kld) == level


# ---- settings, files, hostile text


class Seen(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_settings_are_bounded_and_what_was_wrong_is_said():
    sampling, problems = chat_bar.sampling_of(
        {"temperature": "9", "top_p": "nonsense", "max_new": "1.5", "seed": "-3"}
    )
    assert sampling == Sampling(2.0, 1.0, 256, 0)
    assert len(problems) == 4
    assert chat_bar.sampling_of({}) == (Sampling(), [])
    assert chat_bar.sampling_of({"temperature": "nan"})[0] == Sampling()


@given(st.dictionaries(st.sampled_from(["temperature", "top_p", "max_new", "seed"]), st.text()))
def test_any_address_gives_settings_that_hold(params):
    assert isinstance(chat_bar.sampling_of(params)[0], Sampling)  # which checks its own bounds
    chat.Wanted.read(params)


def test_files_hold_everything_that_was_said(page, pair):
    with pytest.raises(ValueError, match="no longer kept"):
        page.do("save", kind="json")
    page.do("send", text="# not a heading\n> one")
    data = json.loads(page.do("save", kind="json")["save"]["text"])
    assert [side["run_id"] for side in data["sides"]] == pair
    assert data["turns"][0]["prompt"] == "# not a heading\n> one"
    assert data["turns"][0]["answers"][1]["tokens"] == [token_of(text) for text in OTHER]
    assert data["turns"][0]["sampling"]["seed"] == 0
    text = page.do("save", kind="md")["save"]["text"]
    assert "> # not a heading\n> > one" in text
    assert "> The second one." in text
    with pytest.raises(ValueError, match="no format"):
        page.do("save", kind="exe")


@pytest.mark.parametrize("part", ["", "1"])
def test_hostile_prompts_and_answers_are_text(home, pair, part):
    bad = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "\u202e\x00", "'</div>"]
    page = Page(home, StandIn(dict.fromkeys(pair, bad)))
    page.params["part"] = part
    page.do("send", text=bad[0] + bad[1])
    page.parts()
    if part:
        scored(page)
    seen = Seen(page.text)
    assert not seen.tags & {"script", "img", "iframe", "object", "style", "form", "link"}
    assert not any(name.startswith("on") for name in seen.attributes)
    assert "<script>alert(1)</script>" in seen.text
    assert "\u202e" not in seen.text
    assert "‹U+202E›␀" in seen.text


def test_a_very_long_answer_is_shown_in_part(home, pair):
    page = Page(home, StandIn({run: ["x" * 1_000_000] for run in pair}))
    page.do("send", text="go on")
    assert len(page.text) < 500_000
    assert "800,000 more characters" in page.text
    assert "data-copy" not in page.text


# ---- empty and closed


def test_an_empty_home_offers_the_tour(tmp_path):
    (tmp_path / "runs").mkdir()
    store, queue = seeded.store_of(tmp_path), seeded.queue_of(tmp_path)
    page = Page(Context(store, queue, tmp_path, (), "127.0.0.1", "", queue), StandIn({}))
    head, *others = page.parts()
    assert "First tour" in head
    assert not any(others)
    page.do("tour")
    assert "is being made" in page.parts()[0]
    store.close()


def test_a_server_without_chat_says_so(home):
    desk = chat.Desk(home)
    head, *others = desk.screen(
        SimpleNamespace(query_params={}, cookies={}, headers={}, client=None)
    )
    assert "without chat" in head
    assert not any(others)


def test_the_stamp_moves_with_every_token_and_rests_otherwise(slow):
    slow.do("send", text="one")
    seen = slow.desk.stamp(slow.request())
    assert slow.desk.stamp(slow.request()) == seen
    slow.pool.grow(1)
    assert slow.desk.stamp(slow.request()) != seen
