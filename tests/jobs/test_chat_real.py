"""Real models in real chat processes: what they say, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from scene import DEADLINE_S, HERE, ROOT, wait_for

from backend import chat
from backend.execute import BLOCKS
from backend.metrics.divergence import divergence
from backend.recipes import parse
from backend.spec import RunSpec
from jobs import warm, worker
from jobs.chat import ChatPool
from jobs.chat_types import AnswerView, Message, Sampling
from jobs.devices import Place, Slots
from jobs.events import State, state_of
from jobs.launch import WarmLauncher
from jobs.queue import Queue

PRELOAD = (*warm.CHAT_PRELOAD, "chat_gated")


@dataclass(frozen=True)
class Chats:
    """A home with finished runs, and a pool on it."""

    home: Path
    pool: ChatPool
    base: str
    packed: str
    simulated: str
    changed: str  # its model has other files now

    def opened(self, run_id: str, dtype: torch.dtype | None = None) -> chat.Opened:
        """The run in this process."""
        folder = self.home / "runs" / run_id
        return chat.open_run(worker.read_spec(folder), folder / BLOCKS, dtype=dtype)

    def pid(self, run_id: str) -> int:
        """Of the run's process."""

        def known() -> int | None:
            living = self.pool._processes.living()
            return next((pid for name, pid in living.items() if name.startswith(run_id)), None)

        return int(wait_for(known))


def finished(queue: Queue, model: Path, recipe: str) -> str:
    """A run of the recipe, done in this process."""
    steps = parse(recipe) if recipe else ()
    spec = {"model": {"id": str(model)}, "steps": steps, "metrics": [{"kind": "size"}]}
    run_id = queue.submit(RunSpec.model_validate(spec))
    for made in (*queue.view(run_id).waits, run_id):
        folder = queue.folder(made)
        while not state_of(folder).ended:
            worker.work(folder, Place(), worker.Stop(folder))
        assert state_of(folder) is State.DONE, queue.view(made).error
    return run_id


@pytest.fixture(scope="module")
def chats(tmp_path_factory, llama_folder) -> Iterator[Chats]:
    home = tmp_path_factory.mktemp("home")
    (home / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        launcher = WarmLauncher(home, PRELOAD, "warm-chat.log")
        launcher.open()
    other = tmp_path_factory.mktemp("model") / "other"
    shutil.copytree(llama_folder, other)
    queue = Queue(home, slots=Slots())
    recipes = ("", "rtn(bits=3,group=32)", "gptq(bits=3,group=32,act_order=true)")
    made = [finished(queue, llama_folder, recipe) for recipe in recipes]
    changed = finished(queue, other, "")
    (other / "generation_config.json").write_text("{}")
    pool = ChatPool(home, launcher=launcher)
    yield Chats(home, pool, *made, changed)
    pool.close()


def ask(text: str) -> list[Message]:
    return [Message("user", text)]


def started(answer) -> AnswerView:
    view = answer.view()
    while not view.pieces:
        assert not view.ended, view.error
        view = answer.wait_change(view.version, DEADLINE_S)
    return view


@pytest.mark.parametrize("kind", ["base", "packed", "simulated"])
def test_answers_are_those_of_the_model(chats, kind):
    run_id, messages = getattr(chats, kind), ask("tell me")
    sampling = Sampling(temperature=2.0, max_new=24, seed=5)
    view = chats.pool.generate(run_id, messages, sampling).wait(DEADLINE_S)
    assert (view.state, view.error) == ("done", "")
    opened = chats.opened(run_id)
    ids = chat.prompt_of(opened.run, messages).ids
    tokens = list(chat.answer(opened.run, ids, sampling))
    assert list(view.tokens) == tokens
    assert view.text == chat.decoded(opened.run.tokenizer, tokens)
    assert (view.packed, view.dtype) == (opened.packed, opened.run.dtype)
    assert (view.packed, view.notes) == (kind != "simulated", opened.notes)
    assert (view.speed is not None) == (view.packed and len(tokens) > 1)
    assert chats.pool.state(run_id).bytes > 1 << 20
    kept = view.tokens[:3]
    greedy = Sampling(max_new=4)
    more = chats.pool.generate(run_id, messages, greedy, prefix=kept).wait(DEADLINE_S)
    assert list(more.tokens) == [*kept, *chat.answer(opened.run, ids, greedy, kept)]
    assert more.given == 3


@pytest.mark.parametrize("kind", ["base", "packed", "simulated"])
def test_scores_are_those_of_both_models_in_one_dtype(chats, kind):
    run_id, messages = getattr(chats, kind), ask("tell me")
    tokens = [5, 250, 17, 80, 3]
    found = chats.pool.score(run_id, chats.base, messages, tokens)
    own = chats.opened(run_id).run
    base = chats.opened(chats.base, getattr(torch, own.dtype)).run
    ids = chat.prompt_of(own, messages).ids
    rows = [r.logits(torch.tensor([[*ids, *tokens]]))[0, len(ids) - 1 : -1] for r in (base, own)]
    wanted = divergence(*rows, torch.tensor(tokens))
    assert found.dtype == own.dtype
    assert found.mean_kld == pytest.approx(wanted["mean_kld"], rel=1e-3)
    assert found.mean_base_nll == pytest.approx(torch.tensor(wanted["perplexity_base"]).log())
    assert (max(found.kld) == 0) == (kind == "base")
    assert [top[0].token for top in found.top] == rows[1].argmax(-1).tolist()
    assert [top[0].token for top in found.base_top] == rows[0].argmax(-1).tolist()
    assert {len(top) for top in found.top} == {5}
    assert not list((chats.home / "chat").glob("score-*"))


def test_a_running_answer_stops(chats):
    answer = chats.pool.generate(chats.base, ask("long"), Sampling(temperature=1.0, max_new=200))
    started(answer)
    answer.stop()
    view = answer.wait(DEADLINE_S)
    assert view.finish in ("stopped", "length", "end")  # a fast machine may be done before
    assert (view.state == "stopped") == (view.finish == "stopped")


@pytest.mark.parametrize("how", ["hang", "break"])
def test_a_crash_costs_its_answer_and_nothing_else(chats, how):
    other = chats.pool.generate(chats.packed, ask(f"hang, {how == 'hang'}"), Sampling(max_new=4))
    crashed = chats.pool.generate(chats.base, ask(how), Sampling(max_new=4))
    after = chats.pool.generate(chats.base, ask(f"and then {how == 'hang'}"), Sampling(max_new=4))
    started(other)
    started(crashed)
    if how == "hang":
        os.kill(chats.pid(chats.base), signal.SIGKILL)
    view = crashed.wait(DEADLINE_S)
    assert view.state == "failed"
    assert ("SIGKILL" if how == "hang" else "a deliberate failure") in view.error
    assert after.wait(DEADLINE_S).state == "done"
    assert other.view().state == "running"
    os.kill(chats.pid(chats.packed), signal.SIGKILL)
    assert other.wait(DEADLINE_S).state == "failed"


def test_what_the_model_cannot_take_costs_its_answer_only(chats):
    pid = ""
    for asked, prefix, why in (
        ("x" * 300, (), "the model's context is 256"),
        ("hi", (320,), "token 320 is none of the 320"),
    ):
        answer = chats.pool.generate(chats.base, ask(asked), Sampling(max_new=4), prefix=prefix)
        assert why in answer.wait(DEADLINE_S).error
        pid = pid or chats.pid(chats.base)
        assert chats.pid(chats.base) == pid


def test_a_run_whose_blocks_or_model_are_gone_says_so(chats):
    view = chats.pool.generate(chats.changed, ask("hi"), Sampling()).wait(DEADLINE_S)
    assert "have changed since the run was submitted" in view.error
    wait_for(lambda: chats.pool.state(chats.changed).state == "failed")
    assert chats.pool.state(chats.changed).why == view.error
    folder = chats.home / "runs" / chats.packed / BLOCKS
    gone = ChatPool(chats.home, launcher=chats.pool._processes._launcher)
    folder.rename(folder.with_name("gone"))
    view = gone.generate(chats.packed, ask("blocks?"), Sampling()).wait(DEADLINE_S)
    folder.with_name("gone").rename(folder)
    assert "block 0 is missing" in view.error
    gone._room.close()


SERVER = """
import json, sys, time
from pathlib import Path
from jobs.chat import ChatPool
pool = ChatPool(Path(sys.argv[1]))
for run_id in sys.argv[2:]:
    pool.warm(run_id)
while {pool.state(run_id).state for run_id in sys.argv[2:]} != {"ready"}:
    time.sleep(0.01)
pids = [pool._processes._launcher._process.pid, *pool._processes.living().values()]
print(json.dumps(pids), flush=True)
if sys.stdin.readline() == "close\\n":
    pool.close()
"""


@pytest.mark.parametrize("end", ["kill", "close"])
def test_no_process_outlives_its_server(chats, end):
    command = [sys.executable, "-c", SERVER, str(chats.home), chats.base, chats.packed]
    server = subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdin is not None
    assert server.stdout is not None
    pids = json.loads(server.stdout.readline())
    assert len(pids) == 3
    living = [psutil.Process(pid) for pid in pids]
    if end == "kill":
        server.kill()
    else:
        server.stdin.write("close\n")
        server.stdin.close()
    server.wait(DEADLINE_S)
    assert psutil.wait_procs(living, DEADLINE_S)[1] == []
    server.stdout.close()
