"""`quantarena judge` from its flags to its tables, on a tiny model and a stand-in endpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "backend"))

from judge_server import judge_server

from app.__main__ import main, parser
from app.judge_command import spec_of

KEY = "sk-test-0123456789abcdef"


def given(*flags: str) -> list[str]:
    return ["judge", "--model", "demo", *flags]


def test_flags_become_a_spec(tmp_path):
    (tmp_path / "own.txt").write_text("Is {answer} right?")
    flags = given(
        *(
            "--judge",
            "gpt",
            "--style",
            "single(longest=500)",
            "--prompt",
            str(tmp_path / "own.txt"),
        ),
        *("--category", "math", "--category", "coding", "--limit", "5", "--prices", "2", "8"),
        *("--max-cost", "1.5", "--per-minute", "60", "--temperature", "0"),
    )
    spec = spec_of(parser().parse_args(flags))
    assert (spec.judge.kind, spec.judge.longest, spec.judge.prompt) == (
        *("single", 500),
        "Is {answer} right?",
    )
    assert (spec.judge_model.model, spec.judge_model.key_variable) == ("gpt", "OPENAI_API_KEY")
    assert spec.questions.categories == ("math", "coding")
    limits = spec.limits
    assert (limits.prompt_price, limits.completion_price, limits.max_cost) == (2, 8, 1.5)
    assert (limits.per_minute, spec.answers.temperature) == (60, 0)
    spec = spec_of(parser().parse_args(given("--judge-run", "r1", "--style", "pairwise")))
    assert (spec.judge_model.kind, spec.judge_model.run) == ("local", "r1")


REFUSED = [
    (["--judge", "m", "--style", "best"], "unknown judge 'best'"),
    (["--judge", "m", "--style", "single,pairwise"], "not one style"),
    (["--judge", "m", "--endpoint", f"https://{KEY}@host/v1"], "base_url holds a user"),
    (["--judge", "m", "--key-variable", KEY], "must end in API_KEY"),
    (["--judge", "m", "--questions", "/no/such/file"], "no such file"),
    (["--judge", "m", "--prompt", "/no/such/file"], "No such file"),
    (["--judge", "m"], "no run of demo is finished"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_bad_flags_get_one_sentence(tmp_path, capsys, flags, words):
    assert main([*given(*flags), "--home", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert "Traceback" not in told.err
    assert KEY not in told.err + told.out


def test_from_the_cost_to_the_tables(home, llama_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    model = ["--model", str(llama_folder)]
    recipe = ["--recipe", "rtn(bits=2,group=32)", "--metrics", "size", "--device", "cpu"]
    assert main(["run", *model, *recipe]) == 0
    (tmp_path / "q.jsonl").write_text('{"turns": ["2 + 2?"]}\n{"turns": ["A word?"]}\n')
    out = tmp_path / "out.json"
    with judge_server("I say [[B]]", key=KEY) as server:
        flags = ["judge", *model, "--judge", "judge", "--style", "pairwise", "--device", "cpu"]
        flags += ["--questions", str(tmp_path / "q.jsonl"), "--max-new", "6", "--json", str(out)]
        capsys.readouterr()
        assert main([*flags, "--estimate", "--prices", "1", "2"]) == 0
        assert "4 requests with about" in capsys.readouterr().err
        assert main(flags) == 2  # another machine's judge, and nobody to agree
        assert "add --yes" in capsys.readouterr().err
        assert server.requests == []
        assert main([*flags, "--endpoint", server.url]) == 0
        assert len(server.requests) == 4
    told = capsys.readouterr()
    assert "games:" in told.out
    assert "second_bias" in told.out
    [entry] = json.loads(out.read_text())
    assert entry["state"] == "done"
    assert [(g["wins"], g["ties"]) for g in entry["games"]] == [(0, 2), (0, 2)]
    assert entry["order"][0]["second_bias"] == 1.0
    assert entry["win_rates"][0]["win_rate"] == 50.0
    assert any("4 times" in note for note in entry["notes"])
    everything = told.out + told.err + out.read_text()
    for path in home.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".txt", ".log"):
            everything += path.read_text(errors="replace")
    assert KEY not in everything
