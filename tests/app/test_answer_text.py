"""Hostile answers: whatever a model writes, only harmless tags come out and every word stays."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.answer_text import LONGEST_MARKDOWN, LONGEST_SHOWN, answer, markdown, plain, visible

TAGS = {
    *("div", "p", "br", "hr", "h4", "h5", "h6", "strong", "em", "s", "u", "small", "code", "pre"),
    *("blockquote", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {
    ("div", "class"),
    ("div", "dir"),
    ("p", "class"),
    ("pre", "tabindex"),
    ("ol", "start"),
    ("th", "style"),
    ("td", "style"),
}
ALIGNMENTS = {"text-align:left", "text-align:center", "text-align:right"}
PIECES = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "</code></pre></div><script>",
    '"><button data-act="{}">',
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&colon;alert(1))",
    "[x](data:text/html,<script>)",
    "[x](vbscript:msgbox)",
    '[x](https://evil.example/?q=1 "t\' onclick=alert(1)")',
    "![x](https://evil.example/pixel.png)",
    '<https://evil.example/a?b="onmouseover=alert(1)>',
    "[r]\n\n[r]: https://evil.example 'title'",
    '```js"><script>alert(1)</script>\nx = 1\n```',
    "| a | b |\n|:--|--:|\n| <b>c</b> | `d` |",
    "\u202egnp.exe\u202c",
    "\x00\x07\x1b[31m\x9b\ud800",
    "1. a\n1. b\n\n99999999. c",
    "> > > quote",
    "**a *b** c*",
    "&lt;script&gt;&#60;img&#62;",
    "<!-- --><![CDATA[ ]]><?php ?>",
]


class Reader(HTMLParser):
    """What a browser would make of it: tags, attributes, text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(str(html))  # Markup would stay Markup and escape what is added to it
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def handle_decl(self, decl):
        raise AssertionError(f"a declaration: {decl}")

    def handle_pi(self, data):
        raise AssertionError(f"an instruction: {data}")


def check(html: str) -> Reader:
    """Only known tags and attributes, whose values come from a short list."""
    read = Reader(html)
    assert set(read.tags) <= TAGS
    for tag, name, value in read.attributes:
        assert (tag, name) in ATTRIBUTES
        assert name != "style" or value in ALIGNMENTS
        assert name not in ("start", "tabindex") or value.isdigit()
    html.encode()  # no lone surrogate is left: the wire to the browser is UTF-8
    return read


@pytest.mark.parametrize("text", PIECES)
def test_hostile_text_becomes_text(text):
    assert check(answer(text)).text.strip()


@given(st.lists(st.sampled_from([*PIECES, "\n\n", "\n", " ", "    ", "- ", "text"]), max_size=12))
@settings(max_examples=200, deadline=None)
def test_no_mixture_of_hostile_pieces_makes_a_tag(parts):
    check(answer("".join(parts)))


@given(st.text(alphabet=st.sampled_from("<>&\"'`*_[]()!#|\\~:-=+ \n\tab1/"), max_size=80))
@settings(max_examples=300, deadline=None)
def test_no_arrangement_of_signs_makes_a_tag(text):
    check(answer(text))


@given(st.text(max_size=60))
def test_plain_text_is_read_back_as_it_was_written(text):
    assert Reader(plain(text)).text == visible(text)


def test_links_are_words_with_their_address_and_lead_nowhere():
    html = markdown("[paper](https://a.example/x?y=1) and <https://b.example>")
    read = check(html)
    assert "a" not in read.tags
    assert "paper (https://a.example/x?y=1) and https://b.example" in read.text
    assert read.text.count("b.example") == 1


def test_words_of_definitions_and_images_are_not_lost():
    text = check(markdown("[1]: https://a.example 'title'\n\n![alt](https://b.example/p.png)")).text
    assert "[1]: https://a.example 'title'" in text
    assert "alt (https://b.example/p.png)" in text


def test_reordering_and_control_characters_are_shown_by_name():
    assert visible("a\u202eb\u2066c") == "a‹U+202E›b‹U+2066›c"
    assert visible("\x00\x1b\r\n\r\t\x9b\ud800") == "␀␛\n\n\t‹U+009B›\ufffd"
    assert visible("שלום, مرحبا, 你好, 👩‍👩‍👧") == "שלום, مرحبا, 你好, 👩‍👩‍👧"


def test_markdown_is_drawn_as_people_expect():
    html = markdown("# Head\n\nline one\nline two **bold**\n\n```python\na < b\n```\n\n3. three")
    assert "<h4>Head</h4>" in html
    assert "line one<br />\nline two <strong>bold</strong>" in html
    assert "<code>a &lt; b\n</code>" in html
    assert '<ol start="3">' in html


def test_long_answers_are_plain_and_very_long_ones_are_cut_with_a_sentence():
    assert "<em>" in answer("*a*".ljust(LONGEST_MARKDOWN))
    assert "<em>" not in answer("*a* ".ljust(LONGEST_MARKDOWN + 1, "x"))
    read = check(answer("<b>" * 350_000))
    assert "850,000 more characters" in read.text
    assert len(read.text) < LONGEST_SHOWN + 100


@pytest.mark.parametrize("piece", ["[", "![", "*a **b ", "`", "> ", "<", "|a|b|\n|-|-|\n", "_a*b"])
def test_nested_signs_up_to_the_limit_are_rendered(piece):
    check(answer((piece * LONGEST_MARKDOWN)[:LONGEST_MARKDOWN]))
