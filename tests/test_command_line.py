"""The command line as a person uses it: what it writes, and one sentence for every bad input."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.__main__ import main
from backend.demo import model_folder
from jobs.home import Ownership


def run(home: Path, *arguments: str) -> int:
    """`quantarena run` in this process -> exit code."""
    return main(["run", "--home", str(home), *map(str, arguments)])


def test_runs_recipes_and_writes_the_documented_json(tmp_path, capsys):
    out = tmp_path / "out.json"
    recipes = ["rtn(bits=4, group=64)", "gptq(bits=3,group=0)"]
    code = run(
        tmp_path / "home",
        *("--model", "demo", "--recipe", recipes[0], "--recipe", recipes[1]),
        *("--metrics", "perplexity(limit=4),divergence(limit=4),size", "--json", out),
    )
    assert code == 0
    runs = json.loads(out.read_text())
    assert [r["recipe"] for r in runs] == ["baseline", "rtn(bits=4,group=64)", recipes[1]]
    for entry in runs:
        assert entry["state"] == "done"
        assert len(entry["fingerprint"]) == 12
        assert entry["storage"] in ("packed", "simulated")
        names = {m["name"] for m in entry["measurements"]}
        assert {"perplexity", "mean_kld", "same_top", "bits_per_weight", "weight_bytes"} <= names
        for m in entry["measurements"]:
            assert {"name", "value", "unit", "better", "n", "stderr", "detail"} <= set(m)
    values = [{m["name"]: m["value"] for m in r["measurements"]} for r in runs]
    assert values[0]["mean_kld"] == pytest.approx(0, abs=1e-6)
    assert values[0]["bits_per_weight"] == 16
    assert 0 < values[1]["mean_kld"] < values[2]["mean_kld"]
    assert "gptq(bits=3,group=0)" in capsys.readouterr().out


def test_a_list_in_a_recipe_is_as_many_runs(tmp_path):
    out = tmp_path / "out.json"
    recipe = "rtn(bits=3..4,group=64)"
    arguments = ("--model", "demo", "--recipe", recipe, "--metrics", "size", "--json", out)
    assert run(tmp_path / "home", *arguments) == 0
    told = [r["recipe"] for r in json.loads(out.read_text())]
    assert told == ["baseline", "rtn(bits=3,group=64)", "rtn(bits=4,group=64)"]


def test_runs_a_local_folder_on_a_text_file(tmp_path, llama_folder, text_file):
    out = tmp_path / "out.json"
    code = run(
        tmp_path / "home",
        *("--model", llama_folder, "--recipe", "rtn(bits=8)", "--text", text_file),
        *("--metrics", "perplexity,size", "--json", out),
    )
    assert code == 0
    baseline, rounded = json.loads(out.read_text())
    values = [{m["name"]: m["value"] for m in r["measurements"]} for r in (baseline, rounded)]
    assert values[1]["perplexity"] == pytest.approx(values[0]["perplexity"], rel=0.05)


def test_the_same_run_again_is_not_done_again(tmp_path):
    arguments = ("--model", "demo", "--recipe", "rtn(bits=8)", "--metrics", "size")
    assert run(tmp_path, *arguments) == 0
    before = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert run(tmp_path, *arguments) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == before


def broken(folder: Path, change) -> Path:
    """A copy of the bundled model with something wrong with it."""
    folder.mkdir()
    for file in model_folder().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    return folder


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(tensors) if n.endswith("q_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_torn_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_a_foreign_tokenizer(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {word: index + 100_000 for word, index in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(data))


BAD_FOLDERS = [
    (with_nan, "q_proj"),
    (with_torn_weights, "model.safetensors"),
    (without_weights, "safetensors"),
    (without_config, "config.json"),
    (with_a_foreign_tokenizer, "tokenizer"),
]


@pytest.mark.parametrize(("change", "word"), BAD_FOLDERS, ids=[c.__name__ for c, _ in BAD_FOLDERS])
def test_a_bad_model_folder_gets_one_sentence(tmp_path, capsys, change, word):
    folder = broken(tmp_path / "model", change)
    code = run(
        tmp_path / "home",
        *("--model", folder, "--recipe", "rtn(bits=4)", "--metrics", "perplexity(limit=1)"),
        *("--json", tmp_path / "out.json"),
    )
    captured = capsys.readouterr()
    assert code == 2, captured
    assert word in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not list(tmp_path.rglob("*.part"))


BAD_ARGUMENTS = [
    (["--recipe", "gptqq(bits=4)"], ["gptqq", "did you mean 'gptq'"]),
    (["--recipe", " "], ["--recipe is empty"]),
    (["--recipe", "gptq(bitz=4)"], ["bitz", "bits"]),
    (["--recipe", "rtn(bits=11)"], ["bits", "11"]),
    (["--recipe", "rtn(bits=4)", "--metrics", "perplexitty"], ["perplexitty", "perplexity"]),
    (["--recipe", "rtn(bits=4)", "--metrics", "speed"], ["speed", "packed"]),
    (["--recipe", "rtn(bits=4)", "--metrics", ""], ["--metrics"]),
    (["--recipe", "rtn(bits=4)", "--text", "/no/such/file"], ["no such file"]),
    (["--recipe", "rtn(bits=4)+gptq(bits=3)"], ["weight step", "rtn, gptq"]),
    (
        ["--recipe", "rtn(bits=4,group=48)", "--storage", "packed", "--metrics", "size"],
        ["group", "48"],
    ),
]


NAMES = [" ".join(arguments) for arguments, _ in BAD_ARGUMENTS]


@pytest.mark.parametrize(("arguments", "words"), BAD_ARGUMENTS, ids=NAMES)
def test_bad_arguments_get_one_sentence(tmp_path, capsys, arguments, words):
    code = run(tmp_path, "--model", "demo", *arguments)
    captured = capsys.readouterr()
    assert code == 2, captured
    for word in words:
        assert word in captured.err
    assert "validation error" not in captured.err
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize("content", ["", "Too short."])
def test_too_short_a_text_gets_one_sentence(tmp_path, capsys, content):
    path = tmp_path / "text.txt"
    path.write_text(content)
    code = run(tmp_path / "home", "--model", "demo", "--metrics", "perplexity", "--text", path)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "text.txt" in captured.err


def test_an_unknown_hub_id_without_network_gets_one_sentence(tmp_path, capsys):
    code = run(tmp_path, "--model", "nobody/nothing-7b", "--metrics", "size")
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "nobody/nothing-7b" in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_a_port_in_use_gets_one_sentence(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--home", str(tmp_path), "--port", port]) == 2
    captured = capsys.readouterr()
    assert port in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_sql_and_export_read_what_run_wrote(tmp_path, capsys):
    assert run(tmp_path, "--model", "demo", "--recipe", "rtn(bits=8)", "--metrics", "size") == 0
    capsys.readouterr()
    question = "select recipe, state from runs order by recipe"
    assert main(["sql", question, "--home", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [
        {"recipe": "baseline", "state": "done"},
        {"recipe": "rtn(bits=8)", "state": "done"},
    ]
    assert main(["sql", "drop table runs", "--home", str(tmp_path)]) == 2
    out = tmp_path / "out"
    assert main(["export", "--format", "parquet", "--home", str(tmp_path), str(out)]) == 0
    assert (out / "runs.parquet").exists()
    (tmp_path / "results.duckdb").unlink()
    assert main(["rebuild", "--home", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["sql", question, "--home", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows


BATTLES = """\
model_a,model_b,winner,judge,turn,anony,language,tstamp
oak,yew,model_a,ann,1,True,English,1700000000.5
yew,'=fir,tie (bothbad),bob,2,False,German,1700000001
oak,'=fir,model_b,ann,1,True,English,1700000002
"""


@pytest.fixture
def battles(tmp_path: Path) -> Path:
    """A file of three battles, one of a model whose name is a formula."""
    file = tmp_path / "battles.csv"
    file.write_text(BATTLES)
    return file


def votes(command: str, home: Path, *arguments: object) -> int:
    return main([command, "--home", str(home), *map(str, arguments)])


def test_battles_go_in_and_out_and_are_checked(tmp_path, battles, capsys):
    home = tmp_path / "home"
    assert votes("check-votes", home) == 0
    assert "0 entries" in capsys.readouterr().out
    assert votes("import-votes", home, battles) == 0
    assert votes("import-votes", home, battles) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "3 battles added, 0 were there already",
        "0 battles added, 3 were there already",
    ]
    assert votes("export-votes", home, tmp_path / "out.csv") == 0
    assert (tmp_path / "out.csv").read_text().splitlines()[2].startswith("yew,'=fir,tie (bothbad),")
    assert votes("export-votes", home, tmp_path / "out.json", "--kind", "human") == 0
    assert json.loads((tmp_path / "out.json").read_text()) == []
    capsys.readouterr()
    assert votes("check-votes", home) == 0
    out = capsys.readouterr().out
    assert "3 entries, 3 votes, 0 retractions" in out
    assert "database: 3 entries, the same" in out


def last_hash(out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith("last hash: ")).split()[-1]


def test_removed_and_changed_votes_are_told(tmp_path, battles, capsys):
    votes("import-votes", tmp_path, battles)
    votes("check-votes", tmp_path)
    noted = last_hash(capsys.readouterr().out)
    assert votes("check-votes", tmp_path, "--expect", noted) == 0
    assert "the first 3 entries" in capsys.readouterr().out
    log = tmp_path / "votes.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]))
    assert votes("check-votes", tmp_path, "--expect", noted) == 1
    out = capsys.readouterr().out
    assert f"wrong: no entry has the hash {noted}" in out
    assert "wrong: the database has 3 entries and the file has 2 whole ones" in out
    log.write_bytes(lines[0] + lines[1].replace(b"yew", b"YEW") + lines[2])
    assert votes("check-votes", tmp_path) == 1
    assert "wrong: line 2: its content was changed after it was written" in capsys.readouterr().out
    assert votes("import-votes", tmp_path, battles) == 2
    assert "broken at line 2" in capsys.readouterr().err


def test_rebuild_makes_the_votes_again(tmp_path, battles, capsys):
    votes("import-votes", tmp_path, battles)
    (tmp_path / "results.duckdb").unlink()
    assert votes("rebuild", tmp_path) == 0
    assert "3 votes and retractions copied" in capsys.readouterr().out
    question = "select model_b, winner from votes order by seq"
    assert main(["sql", question, "--home", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {
        "model_b": "=fir",
        "winner": "tie (bothbad)",
    }
    assert votes("check-votes", tmp_path) == 0
    assert "3 entries, the same" in capsys.readouterr().out


def test_beside_another_process_votes_are_read_and_not_imported(tmp_path, battles, capsys):
    votes("import-votes", tmp_path, battles)
    with Ownership(tmp_path):
        assert votes("import-votes", tmp_path, battles) == 2
        assert "is in use by another QuantArena" in capsys.readouterr().err
        assert votes("export-votes", tmp_path, tmp_path / "out.jsonl") == 0
        assert votes("check-votes", tmp_path) == 0
        assert main(["export", "--home", str(tmp_path), str(tmp_path / "tables")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    assert "'=fir" in (tmp_path / "tables" / "votes.csv").read_text()


BAD_BATTLES = [
    (BATTLES.replace("bob", "bob,bob"), "line 3 has not as many cells"),
    (BATTLES.replace("tie (bothbad)", "both"), "row 2: winner is 'both'"),
    (BATTLES.replace("anony", "anonymous"), "there is no 'anony'"),
]


@pytest.mark.parametrize(("text", "why"), BAD_BATTLES)
def test_a_bad_battle_gets_one_sentence_and_adds_nothing(tmp_path, battles, capsys, text, why):
    battles.write_text(text)
    assert votes("import-votes", tmp_path, battles) == 2
    captured = capsys.readouterr()
    assert why in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "votes.jsonl").exists()


def test_bench_keeps_its_times_in_the_home_and_ends_in_json(tmp_path, capsys):
    arguments = ["int_cpu", "--shapes", "96x128", "--rows", "1,3", "--device", "cpu"]
    assert main(["bench", "--home", str(tmp_path), *arguments]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    timed = [row for row in told["rows"] if row.get("kernel") == "int_cpu"]
    assert {(row["m"], row["n"], row["k"]) for row in timed} == {(1, 96, 128), (3, 96, 128)}
    assert all(row["correct"] and row["median_ms"] > 0 for row in timed)
    assert any(line.startswith("int_cpu int4 g128 m=1 n=96 k=128: ") for line in lines)
    assert any(line.startswith("read: ") for line in lines)
    question = "select count(*) as n from kernel_times where kernel = 'int_cpu'"
    assert main(["sql", "--home", str(tmp_path), "--json", question]) == 0
    assert json.loads(capsys.readouterr().out)[0]["n"] == len(timed)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["int_cpuu"], "did you mean 'int_cpu'"),
        (["int_cpu", "--shapes", "64"], "shapes"),
        (["int_cpu", "--rows", "0"], "rows"),
        (["int_cpu", "--rows", "one"], "--rows takes whole numbers such as 1,8,64, not 'one'"),
    ],
)
def test_bench_refuses_in_a_sentence(tmp_path, capsys, arguments, says):
    assert main(["bench", "--home", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
