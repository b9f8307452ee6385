"""Cached answers: who gets one, who does not, and what a broken disk costs."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from jobs.answers import AnswerCache, Question, restored, stored
from jobs.chat_types import AnswerView, Message, Piece, Sampling

ASKED = Question("abc123", (Message("user", "hi"),), Sampling(temperature=1.0, seed=3), (5, 6))
GIVEN = AnswerView(
    state="done",
    text="ha é",
    pieces=(Piece(5, "h"), Piece(6, "a "), Piece(7, ""), Piece(8, "é")),
    given=2,
    ttft_s=0.25,
    seconds=1.25,
    finish="length",
    dropped=1,
    notes=("a note",),
    packed=True,
    dtype="bfloat16",
    version=9,
)
MODE = "packed-bfloat16"


@pytest.fixture
def cache(tmp_path) -> AnswerCache:
    return AnswerCache(tmp_path)


def test_an_answer_comes_back_as_it_was(cache):
    cache.put(ASKED, MODE, GIVEN)
    found = cache.get(ASKED, MODE)
    assert found == replace(GIVEN, cached=True, version=0)
    assert (found.speed, found.new_tokens) == (1.0, 2)  # one token in the second after the first


@pytest.mark.parametrize(
    "other",
    [
        replace(ASKED, artifact_id="abc124"),
        replace(ASKED, messages=(Message("system", "hi"),)),
        replace(ASKED, messages=(Message("user", "hi"), Message("assistant", ""))),
        replace(ASKED, messages=(Message("user", "hi "),)),
        replace(ASKED, sampling=Sampling(temperature=1.0, seed=4)),
        replace(ASKED, sampling=Sampling(temperature=1.0, seed=3, max_new=255)),
        replace(ASKED, sampling=Sampling(temperature=0.0)),
        replace(ASKED, prefix=(5,)),
        replace(ASKED, prefix=()),
    ],
)
def test_everything_that_decides_an_answer_is_in_its_key(cache, other):
    cache.put(ASKED, MODE, GIVEN)
    assert cache.get(other, MODE) is None
    assert cache.get(ASKED, "simulated-float32") is None


def test_greedy_answers_do_not_depend_on_the_seed(cache):
    cache.put(replace(ASKED, sampling=Sampling(seed=1)), MODE, GIVEN)
    assert cache.get(replace(ASKED, sampling=Sampling(seed=2, top_p=0.5)), MODE)


def test_devices_do_not_share(cache, tmp_path):
    cache.put(ASKED, MODE, GIVEN)
    assert AnswerCache(tmp_path).get(ASKED, MODE)
    assert AnswerCache(tmp_path, device="cuda:1").get(ASKED, MODE) is None


@pytest.mark.parametrize("state", ["stopped", "failed", "running"])
def test_only_finished_answers_are_kept(cache, state):
    cache.put(ASKED, MODE, replace(GIVEN, state=state))
    assert cache.get(ASKED, MODE) is None


def test_how_an_artifact_is_held_is_known_from_its_last_answer(cache):
    assert cache.mode("abc123") == ""
    cache.put(ASKED, "simulated-float32", GIVEN)
    assert cache.mode("abc123") == "simulated-float32"
    cache.put(ASKED, MODE, GIVEN)
    older = cache.folder / "cpu" / "abc123" / "simulated-float32"
    os.utime(older, (1, 1))
    assert cache.mode("abc123") == MODE


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pieces": [[1]]}', "null"])
def test_files_that_cannot_be_read_are_not_there(cache, content):
    cache.put(ASKED, MODE, GIVEN)
    (path,) = cache.folder.glob("*/*/*/*.json")
    path.write_text(content)
    assert cache.get(ASKED, MODE) is None
    cache.put(ASKED, MODE, GIVEN)
    assert cache.get(ASKED, MODE)


def test_a_text_that_is_not_its_pieces_is_no_answer():
    data = json.loads(json.dumps(stored(GIVEN)))
    assert restored(data).text == GIVEN.text
    with pytest.raises(ValueError, match="not that of the pieces"):
        restored({**data, "text": "other"})


def test_a_disk_that_refuses_costs_the_cache_only(cache):
    cache.folder.parent.mkdir(parents=True)
    cache.folder.write_text("a file where the folder should be")
    cache.put(ASKED, MODE, GIVEN)
    assert cache.get(ASKED, MODE) is None


def test_the_least_recently_used_go_first(tmp_path):
    questions = [replace(ASKED, artifact_id=f"{n:06x}") for n in range(12)]
    probe = AnswerCache(tmp_path / "probe")
    probe.put(ASKED, MODE, GIVEN)
    (one,) = probe.folder.glob("*/*/*/*")
    cache = AnswerCache(tmp_path, limit_bytes=10 * one.stat().st_size)
    for number, question in enumerate(questions[:10]):
        cache.put(question, MODE, GIVEN)
        os.utime(cache._path(question, MODE), (number, number))
    assert all(cache._path(question, MODE).exists() for question in questions[:10])
    assert cache.get(questions[0], MODE)  # used just now
    for question in questions[10:]:
        cache.put(question, MODE, GIVEN)
    left = {question.artifact_id for question in questions if cache._path(question, MODE).exists()}
    assert {"000000", "00000a", "00000b"} <= left
    assert {"000001", "000002"}.isdisjoint(left)
    assert sum(path.stat().st_size for path in cache.folder.glob("*/*/*/*")) <= cache.limit_bytes
    assert AnswerCache(tmp_path).get(questions[11], MODE)
