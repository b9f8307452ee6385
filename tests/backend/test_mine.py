"""Mining: answers and distances against plain greedy decoding, resuming, and what is kept."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from app import commands
from app.__main__ import main
from backend import mine as mining
from backend.chat import open_run, prompt_of
from backend.dialogue import Message, Sampling
from backend.mine import Answered, Variant, answer_to, departure, variant_of
from backend.pipeline import Cancelled
from backend.prompts import digest, own_prompts
from backend.spec import MineSpec, ModelRef, RunSpec
from jobs import kinds
from jobs.answers import AnswerCache, Question
from jobs.devices import Place, Slots
from jobs.events import State, read
from jobs.queue import Queue
from jobs.worker import DONE, FAILED, work
from results_db.mined import identical_pairs, telling, variants
from results_db.store import Store

PROMPTS = ("Why?", "Say it again.", "One two three four", "x" * 400)  # the last is over 256 bytes
MAX_NEW = 12


class Memory:
    """Answers in a dict, and how often each was asked for."""

    def __init__(self) -> None:
        self.kept: dict[tuple, Answered] = {}
        self.asked: list[tuple] = []

    def get(self, artifact: str, messages: Any, sampling: Sampling, how: Any) -> Answered | None:
        key = (artifact, tuple(messages), sampling, how.packed, how.run.dtype)
        self.asked.append(key)
        return self.kept.get(key)

    def put(self, artifact: str, messages: Any, sampling: Sampling, given: Answered) -> None:
        self.kept[artifact, tuple(messages), sampling, given.packed, given.dtype] = given


@pytest.fixture(scope="module")
def home(tmp_path_factory, llama_folder) -> Path:
    """A home with a 16-bit run, one at 8 bits, one at 2, and four prompts of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / "runs").mkdir()
    (home / "prompts").mkdir()
    lines = [json.dumps({"id": f"p{i}", "prompt": text}) for i, text in enumerate(PROMPTS)]
    (home / "prompts" / "own.jsonl").write_text("\n".join(lines))
    queue = Queue(home, slots=Slots())
    for bits in (0, 8, 2):
        steps = [{"kind": "rtn", "format": {"kind": "int", "bits": bits}}] if bits else []
        data = {"model": {"id": str(llama_folder), "dtype": "float32"}, "steps": steps}
        finish(queue, queue.submit(RunSpec.model_validate(data), device="cpu"))
    return home


def finish(queue: Queue, run_id: str) -> State:
    """Work off a job's stages in this process."""
    while not queue.view(run_id).state.ended:
        assert work(queue.folder(run_id), Place()) in (DONE, FAILED)
    return queue.view(run_id).state


def run_ids(home: Path) -> dict[str, str]:
    """{recipe: run id} of the home's runs."""
    return {v.recipe: v.run_id for v in Queue(home, slots=Slots()).runs() if v.kind == "run"}


def spec_of(home: Path, llama_folder: Path, **knobs: Any) -> MineSpec:
    """As submitting resolves it, for these prompts alone."""
    queue = Queue(home, slots=Slots())
    model = ModelRef(id=str(llama_folder), dtype="float32")
    names = tuple(f"p{i}" for i in range(len(PROMPTS)))
    asked = {"prompts": names, "max_new": MAX_NEW} | knobs
    return kinds.find("mine").resolve(MineSpec(model=model, **asked), queue)


class Told:
    """What the stage emits; stops it after so many rows."""

    def __init__(self, folder: Path, after: int = 10**6) -> None:
        self.folder, self.after, self.events = folder, after, []

    def __call__(self, type: str, /, **data: Any) -> None:
        self.events.append({"type": type, **data})
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"t": 1.0, "type": type, **data}) + "\n")

    def of(self, type: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == type]

    def stop(self) -> bool:
        return len(self.of("mined")) >= self.after


def mine(spec: MineSpec, home: Path, told: Told, answers: Any) -> None:
    where = {"device": "cpu", "home": home, "emit": told, "should_stop": told.stop}
    mining.mine(spec, told.folder, answers=answers, **where)


@pytest.fixture(scope="module")
def whole(home, llama_folder, tmp_path_factory) -> tuple[Told, Memory]:
    """All of it, once."""
    told, answers = Told(tmp_path_factory.mktemp("job")), Memory()
    mine(spec_of(home, llama_folder), home, told, answers)
    return told, answers


def opened(home: Path, run_id: str) -> Any:
    folder = home / "runs" / run_id
    spec = RunSpec.model_validate_json((folder / "spec.json").read_text())
    return open_run(spec, folder / "blocks")


def greedy(model: torch.nn.Module, ids: list[int], ends: set[int], room: int) -> list[int]:
    """The likeliest token, again and again, all from scratch."""
    made: list[int] = []
    while len(made) < room:
        logits = model(input_ids=torch.tensor([[*ids, *made]]), use_cache=False).logits[0, -1]
        if int(logits.argmax()) in ends:
            break
        made.append(int(logits.argmax()))
    return made


def test_rows_equal_plain_decoding_and_a_sum_over_the_vocabulary(home, whole):
    """float32 both sides; 1e-5 is far above its rounding here and far below any divergence."""
    told, _ = whole
    rows = {(row["run_id"], row["prompt_id"]): row for row in told.of("mined")}
    assert len(rows) == 9  # three runs and three prompts that fit
    ids = run_ids(home)
    base = opened(home, ids["baseline"]).run
    ends = base.end_tokens()
    for run_id in ids.values():
        run = opened(home, run_id).run
        for number, text in enumerate(PROMPTS[:3]):
            row = rows[run_id, f"p{number}"]
            prompt = prompt_of(base, [Message("user", text)]).ids
            plain = greedy(base.model, prompt, ends, MAX_NEW)
            own = greedy(run.model, prompt, ends, MAX_NEW)
            assert (row["tokens"], row["base_tokens"]) == (len(own), len(plain))
            assert row["identical"] == (base.tokenizer.decode(own) == base.tokenizer.decode(plain))
            shared = [a == b for a, b in zip(own, plain, strict=False)]
            assert row["departs"] == (shared.index(False) if False in shared else len(shared))
            along = torch.tensor([[*prompt, *plain, *([257] if len(plain) < MAX_NEW else [])]])
            rows_at = slice(len(prompt) - 1, along.shape[1] - 1)
            p, q = (
                m(input_ids=along).logits[0, rows_at].double().softmax(-1)
                for m in (base.model, run.model)
            )
            kld = (p * (p.log() - q.log())).sum(-1)
            assert row["kld"] == pytest.approx(float(kld.mean()), abs=1e-5)
            assert row["kld_max"] == pytest.approx(float(kld.max()), abs=1e-5)
            same = (p.argmax(-1) == q.argmax(-1)).double().mean()
            assert row["agreement"] == pytest.approx(float(same))


def test_the_16_bit_run_is_itself_and_two_bits_are_not(home, whole):
    told, _ = whole
    ids = {run_id: recipe for recipe, run_id in run_ids(home).items()}
    for row in told.of("mined"):
        if ids[row["run_id"]] == "baseline":
            assert (row["kld"], row["kld_max"], row["agreement"]) == (0, 0, 1)
            assert row["identical"]
            assert row["departs"] == row["tokens"] == row["base_tokens"]
        assert (row["dtype"], row["storage"] in ("packed", "simulated")) == ("float32", True)
        assert (row["category"], row["language"], row["max_new"]) == ("own", "English", MAX_NEW)
    klds = {recipe: [] for recipe in ids.values()}
    for row in told.of("mined"):
        klds[ids[row["run_id"]]].append(row["kld"])
    zero, few, many = (sum(k) for r, k in sorted(klds.items(), key=lambda item: sum(item[1])))
    assert 0 == zero < few < many


def test_a_prompt_that_does_not_fit_is_left_out_and_said_so(whole):
    (note,) = whole[0].of("note")
    assert "prompt p3 is left out" in note["text"]
    assert "context" in note["text"]


def test_progress_rises_to_one(whole):
    shares = [event["fraction"] for event in whole[0].of("progress")]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    items = " ".join(event["item"] for event in whole[0].of("progress"))
    assert "16-bit answers, p0" in items
    assert "variant 3 of 3, p2" in items


def test_a_stopped_job_goes_on_where_it_stopped(home, llama_folder, whole, tmp_path):
    spec, answers = spec_of(home, llama_folder), Memory()
    told = Told(tmp_path, after=4)
    with pytest.raises(Cancelled):
        mine(spec, home, told, answers)
    assert len(told.of("mined")) == 4
    told.after = 10**6
    answers.kept.clear()  # the 16-bit answers may have gone from the cache: they are made again
    mine(spec, home, told, answers)
    assert told.of("mined") == whole[0].of("mined")
    mine(spec, home, told, answers)  # nothing is left
    assert told.of("mined") == whole[0].of("mined")


def test_answers_given_before_are_not_made_again(home, llama_folder, whole, tmp_path, monkeypatch):
    told = Told(tmp_path)
    monkeypatch.setattr(mining, "answer", lambda *given: pytest.fail("it was answered before"))
    mine(spec_of(home, llama_folder, prompts=("p0", "p2")), home, told, whole[1])
    first = [row for row in whole[0].of("mined") if row["prompt_id"] in ("p0", "p2")]
    assert told.of("mined") == first


def test_a_long_answer_stops_when_told_to(home, llama_folder):
    plain = opened(home, run_ids(home)["baseline"])
    looks = iter([False, False, True])
    with pytest.raises(Cancelled):
        answer_to(plain, [Message("user", "Why?")], Sampling(), lambda: next(looks))


def test_sampled_answers_follow_the_seed(home):
    plain = opened(home, run_ids(home)["baseline"])
    asked = [Message("user", "Why?")]
    made = [answer_to(plain, asked, Sampling(5.0, 1.0, 12, seed)).tokens for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_a_model_without_a_template_is_cut_where_it_speaks_for_the_user(home):
    plain = opened(home, run_ids(home)["baseline"])
    plain.run.tokenizer.chat_template = None
    given = answer_to(plain, [Message("user", "Why?")], Sampling(max_new=8))
    assert "no chat template" in given.notes[-1]
    assert len(given.pieces) == 8
    text = plain.run.tokenizer.decode(given.tokens, skip_special_tokens=True)
    assert given.text == text


def test_a_variant_that_cannot_be_opened_fails_the_job_after_the_others(
    home, llama_folder, tmp_path, monkeypatch
):
    broken = next(run_id for recipe, run_id in run_ids(home).items() if "bits=8" in recipe)
    real = mining.variant_of

    def without_blocks(home: Path, run_id: str, model: ModelRef) -> Variant:
        found = real(home, run_id, model)
        gone = tmp_path / "gone"
        return Variant(run_id, found.spec, gone) if run_id == broken else found

    monkeypatch.setattr(mining, "variant_of", without_blocks)
    told = Told(tmp_path)
    with pytest.raises(ValueError, match=f"1 of 3 variants could not be asked.*{broken}"):
        mine(spec_of(home, llama_folder), home, told, Memory())
    assert {row["run_id"] for row in told.of("mined")} == set(run_ids(home).values()) - {broken}


def test_changed_prompts_and_strange_runs_are_refused(home, llama_folder, tmp_path):
    spec = spec_of(home, llama_folder)
    assert spec.pool == digest(own_prompts(home))
    with pytest.raises(ValueError, match="prompts have changed"):
        mine(spec.model_copy(update={"pool": "0"}), home, Told(tmp_path), Memory())
    other = spec.model.model_copy(update={"content": "other"})
    with pytest.raises(ValueError, match="is one of"):
        variant_of(home, spec.runs[0], other)
    with pytest.raises(ValueError, match="cannot be read"):
        variant_of(home, "20260101-000000-abcdef", spec.model)
    with pytest.raises(ValueError, match="there is no prompt 'px'"):
        spec_of(home, llama_folder, prompts=("px",))


def test_departure_is_the_first_difference():
    assert departure([1, 2, 3], [1, 2, 4]) == 2
    assert departure([1, 2], [1, 2, 4]) == departure([1, 2], [1, 2]) == 2
    assert departure([], [1]) == departure([5], [1]) == 0


def test_a_whole_job_ends_in_tables_and_in_the_chat_s_answers(home, llama_folder, tmp_path):
    """Submitted, done by the worker, stored, and what a battle would ask is there at once."""
    queue = Queue(home, slots=Slots())
    model = ModelRef(id=str(llama_folder), dtype="float32")
    asked = MineSpec(model=model, prompts=("p0", "p1", "p2"), max_new=MAX_NEW)
    job = queue.submit(asked, device="cpu")
    assert queue.view(job).recipe == "Mine 3 prompts on 3 variants"
    assert queue.submit(asked, device="cpu") == job
    assert finish(queue, job) is State.DONE, queue.view(job).error
    cache = AnswerCache(home)
    with closing(Store(tmp_path / "results.duckdb")) as store:
        events, offset = read(queue.folder(job))
        store.ingest(job, (queue.folder(job) / "spec.json").read_text(), events, offset)
        rows = store.frame("FROM mined").to_dict("records")
        assert len(rows) == 9
        for row in rows:
            assert row["job_id"] == job
            mode = f"{row['storage']}-{row['dtype']}"
            question = Question(
                row["artifact_id"], (Message("user", row["prompt"]),), Sampling(max_new=MAX_NEW)
            )
            view = cache.get(question, mode)
            assert view is not None
            assert (view.cached, view.state) == (True, "done")
            assert len(view.tokens) == row["tokens"]
            assert cache.mode(row["artifact_id"]) == mode
        ids = run_ids(home)
        two = next(run_id for recipe, run_id in ids.items() if "bits=2" in recipe)
        found = telling(store, str(llama_folder), ids["baseline"], two)
        alike = identical_pairs(store, str(llama_folder), [ids["baseline"], two])
        assert len(found) + len(alike) == 3
        assert found["divergence"].is_monotonic_decreasing
        assert len(variants(store, str(llama_folder))) == 3


def test_the_command_prints_a_line_per_variant(home, llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "show_progress", lambda queue, ids: finish(queue, *ids))
    words = ["mine", "--model", str(llama_folder), "--dtype", "float32", "--home", str(home)]
    words += ["--prompts", "p1", "p3", "--max-new", "4", "--device", "cpu"]
    assert main([*words, "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == [
        *("recipe", "prompts", "identical", "departs", "kld", "agreement")
    ]
    assert "prompt p3 is left out" in printed
    first, *others = json.loads((tmp_path / "out.json").read_text())
    assert (first["recipe"], first["prompts"], first["identical"], first["kld"]) == (
        *("baseline", 1, 1, 0),
    )
    assert len(others) == 2
    assert main([*words, "--runs", "20260101-000000-abcdef"]) == 2
    assert "there is no run '20260101-000000-abcdef'" in capsys.readouterr().err


def test_numbers_that_are_none_survive_the_way_into_the_database(tmp_path):
    """A model of NaN weights has NaN divergences: results, unlike a missing number."""
    from jobs.events import append

    row: dict[str, Any] = dict.fromkeys(("departs", "tokens", "base_tokens", "max_new", "seed"), 0)
    words = ("run_id", "artifact_id", "prompt_id", "category", "language", "prompt", "finish")
    row |= dict.fromkeys((*words, "answer_hash", "device", "dtype", "storage"), "x")
    row |= {"temperature": 0.0, "top_p": 1.0, "identical": False}
    append(tmp_path, "mined", **row, kld=math.nan, kld_max=math.inf, agreement=None)
    with closing(Store(tmp_path / "results.duckdb")) as store:
        text = json.dumps({"kind": "mine", "model": {"id": "demo"}})
        store.ingest("job", text, *read(tmp_path))
        (found,) = store.snapshot()["mined"].to_pylist()
    assert math.isnan(found["kld"])
    assert (found["kld_max"], found["agreement"]) == (math.inf, None)
