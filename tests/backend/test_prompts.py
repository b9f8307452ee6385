"""The pool: what comes along is whole and right, what a user adds is checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend import prompts
from backend.demo import tasks_folder
from backend.demo.words import TERMS
from backend.prompts import (
    CATEGORIES,
    LANGUAGES,
    LONGEST_TEXT,
    Prompt,
    by_id,
    digest,
    pool,
    prompt_of,
    suggested,
)

ROOT = Path(__file__).parents[2]
MODELS = ["", "demo", "demo-outliers", "org/other"]


def write(home: Path, *lines: object, name: str = "mine.jsonl") -> Path:
    folder = home / "prompts"
    folder.mkdir(exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("model", MODELS)
def test_every_prompt_is_whole_and_named_once(model):
    found = pool(model)
    assert len(found) >= 80
    assert len({p.id for p in found}) == len(found)
    assert len({p.turns[0] for p in found}) == len(found)
    assert {p.category for p in found} <= set(CATEGORIES)
    assert {p.language for p in found} <= set(LANGUAGES.values())


def test_the_general_pool_covers_categories_languages_and_turns():
    found = pool()
    by_category = Counter(p.category for p in found)
    assert set(by_category) == set(CATEGORIES)
    assert all(by_category[name] >= 7 for name in CATEGORIES[:8])
    assert {p.language for p in found} == set(LANGUAGES.values())
    for prompt in found:
        checked = prompt.category in ("math", "reasoning", "coding", "retrieval", "copying")
        assert len(prompt.references) == len(prompt.turns) or not checked, prompt.id
        assert prompt.id.startswith(prompt.category)
    assert sum(len(p.turns) > 1 for p in found) >= 50
    (race,) = by_id(found, ["reasoning-race"])
    assert "third" in race.references[0]
    assert "fourth" in race.references[0]
    (distillation,) = by_id(found, ["stem-distillation"])
    assert "short introduction to knowledge distillation" in distillation.turns[0]


def reference(name: str, turn: int = 0) -> str:
    return by_id(pool(), [name])[0].references[turn]


@pytest.mark.parametrize(
    ("name", "turn", "value"),
    [
        ("math-discount", 0, 240 / Fraction(4, 5)),
        ("math-discount", 1, 240 * Fraction(6, 5)),
        ("math-handshakes", 0, next(n for n in range(99) if n * (n - 1) // 2 == 78)),
        ("math-handshakes", 1, 15 * 14 // 2),
        ("math-marbles", 0, Fraction(3, 8) * Fraction(2, 7)),
        ("math-marbles", 1, 2 * Fraction(3, 8) * Fraction(5, 7)),
        ("math-remainder", 0, 7**100 % 5),
        ("math-remainder", 1, 7**100 % 13),
        ("math-rectangle", 1, next(d for d in range(99) if d * d == 8 * 8 + 15 * 15)),
        ("math-sequence", 1, 50 * 51),
        ("math-interest", 1, next(n for n in range(99) if 1.05**n >= 2)),
        ("math-order", 0, 17 * 24 - 396 // 12),
        ("math-harina", 0, 450 * 10 // 6),
    ],
)
def test_references_of_sums_are_right(name, turn, value):
    assert str(value) in reference(name, turn)


@pytest.mark.parametrize(
    ("name", "turn", "call", "cases"),
    [
        ("coding-palindrome", 0, "is_palindrome", {"Never odd, or even!": True, "ab": False}),
        ("coding-palindrome", 1, "is_palindrome", {"Never odd, or even!": True, "ab": False}),
        ("coding-voyelles", 0, "voyelles", {"Été à Paris": 5, "": 0}),
    ],
)
def test_references_in_python_do_what_is_asked(name, turn, call, cases):
    made: dict = {}
    exec(reference(name, turn), made)
    assert {given: made[call](given) for given in cases} == cases


def test_the_referenced_search_finds_the_first_of_equals():
    made: dict = {}
    exec(reference("coding-search", 1), made)
    for a in ([], [1], [1, 1, 2], [0, 2, 2, 2, 5]):
        for x in range(-1, 7):
            assert made["find"](a, x) == (a.index(x) if x in a else -1)


def test_what_is_to_be_copied_stands_in_the_question():
    number, backwards = by_id(pool(), ["copying-number"])[0].references
    assert number in by_id(pool(), ["copying-number"])[0].turns[0]
    assert backwards.replace(" ", "") == number.replace(" ", "")[::-1]
    (locker,) = by_id(pool(), ["retrieval-locker"])
    assert (
        f"Locker Juniper belongs to Tomas and opens with {locker.references[0]}."
        in (locker.turns[0])
    )
    owned = [s.split()[1] for s in locker.turns[0].split(". ") if "belongs to Pavel" in s]
    assert locker.references[1] == ", ".join(owned)


def test_the_bundled_model_is_asked_what_it_was_taught():
    found = pool("demo")
    assert found == pool("demo-outliers") != pool("other")
    assert not any("<|" in text for p in found for text in (*p.turns, *p.references))
    skills = {path.stem for path in tasks_folder().glob("*.jsonl")}
    for skill in skills:
        held_out = (tasks_folder() / f"{skill}.jsonl").read_text(encoding="utf-8")
        asked = [p for p in found if p.id.startswith(f"demo-{skill}-")]
        assert 5 <= len(asked) <= 12
        for prompt in asked:
            assert json.dumps(prompt.turns[0])[1:-1] in held_out
            assert json.dumps(prompt.references[0])[1:-1] in held_out
    explained = [p.references[0] for p in found if p.category == "stem"]
    assert explained == list(TERMS.values())


@pytest.mark.parametrize("model", MODELS)
def test_suggestions_are_a_handful_of_the_pool(model):
    shown = suggested(model)
    assert 6 <= len(shown) <= 8
    assert all(prompt in pool(model) for prompt in shown)
    assert len({p.category for p in shown}) >= 5


def test_own_prompts_join_the_pool(tmp_path):
    write(tmp_path, {"turns": ["Why?", "And why not?"], "references": ["Because."]}, "")
    write(
        tmp_path,
        {"prompt": "Warum?", "language": "DE", "category": "math", "id": "w"},
        name="b.jsonl",
    )
    first, second = pool("", tmp_path)[-2:]
    assert second.id.startswith("own-")
    assert (second.category, second.language) == ("own", "English")
    assert (second.turns, second.references) == (("Why?", "And why not?"), ("Because.",))
    assert first == Prompt("w", "math", "German", ("Warum?",))
    assert pool("demo", tmp_path)[-2:] == [first, second]
    assert pool("", tmp_path / "elsewhere") == pool()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2"),
        ("[]", "a prompt is a JSON object, and this is a list"),
        ({"turns": []}, "1 to 8 turns, not 0"),
        ({"turns": ["x"] * 9}, "1 to 8 turns, not 9"),
        ({"turns": ["x", " "]}, "empty"),
        ({"turns": "\ud800"}, "half a character"),
        ({"turns": {"a": 1}}, "a text or a list of texts"),
        ({"turns": ["x" * (LONGEST_TEXT + 1)]}, "16,001 characters"),
        ({"prompt": "x", "references": ["a", "b"]}, "more references than turns"),
        ({"prompt": "x", "id": "../x"}, "prompt id '../x'"),
        ({"prompt": "x", "category": "a\nb"}, "category"),
        ({"prompt": "x", "langage": "de"}, "did you mean 'language'"),
        ({"prompt": "x", "id": "reasoning-race"}, "two prompts have the id"),
    ],
)
def test_what_is_no_prompt_is_refused_in_a_sentence(tmp_path, line, complaint):
    path = write(tmp_path, {"prompt": "fine"}, line)
    with pytest.raises(ValueError) as refused:
        pool("", tmp_path)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "two prompts" in complaint or f"{path}, line 2" in str(refused.value)


def test_own_files_are_bounded(tmp_path, monkeypatch):
    path = write(tmp_path, *({"prompt": f"number {i}"} for i in range(5)))
    monkeypatch.setattr(prompts, "MOST_OWN", 4)
    with pytest.raises(ValueError, match="more than 4 prompts"):
        pool("", tmp_path)
    monkeypatch.setattr(prompts, "LARGEST_FILE", 10)
    with pytest.raises(ValueError, match="is larger than"):
        pool("", tmp_path)
    monkeypatch.undo()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        pool("", tmp_path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["id", "turns", "prompt", "category", "language", "references", "x"]
                ),
                inner,
                max_size=6,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_prompt_or_a_value_error(entry):
    try:
        made = prompt_of(entry)
    except ValueError:
        return
    assert made.turns
    assert all(turn.strip() for turn in made.turns)


def test_the_digest_follows_what_is_asked():
    one, other = Prompt("a", "math", "English", ("x",)), Prompt("a", "math", "English", ("y",))
    assert digest([one]) == digest([Prompt("a", "chat", "German", ("x",), ("r",))])
    assert len({digest([one]), digest([other]), digest([one, other]), digest([])}) == 4
    with pytest.raises(ValueError, match="did you mean 'reasoning-race'"):
        by_id(pool(), ["reasoning-rice"])


def test_the_server_can_read_the_pool_without_torch():
    code = "import sys; from backend.prompts import pool; pool(), pool('demo')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], cwd=ROOT
    )
    assert done.returncode == 0
