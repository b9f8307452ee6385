"""A home with runs that never ran and a pool that answers from a function: battles at once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jobs.arena import Arena, Settings
from jobs.battle import BattleView
from jobs.chat_types import AnswerView, Message, PoolState, Sampling
from jobs.draws import Asked
from jobs.limits import Limits
from results_db.store import Store
from results_db.votes import Votes

RECIPES = ("baseline", "rtn(bits=4,group=64)", "gptq(bits=3,group=64)", "smoothquant+rtn(bits=8)")
ME, HERE, MODEL = "my session", "127.0.0.1", "demo"
NO_LIMITS = Limits.from_text(
    ",".join(f"{name}=none" for name in Limits.__dataclass_fields__ if name != "battles")
)
PROMPTS = tuple(
    Asked(category, language, (f"{category} question {n}?",))
    for category, language in (("math", "English"), ("chat", "German"))
    for n in range(6)
)


class Clock:
    """A clock that a test moves."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def run_id_of(at: int) -> str:
    return f"20261124-1200{at:02}-abc{at:03}"


def add_run(store: Store, at: int, recipe: str, *, state: str = "done", **changes: Any) -> str:
    """A run's row, as its events would make it. `changes` of artifact_id, content, kind, model."""
    artifact = changes.get("artifact_id", f"{at:02}fedcba9876")
    model = {"id": changes.get("model", MODEL), "content": changes.get("content", "c0")}
    steps = [] if recipe == "baseline" else [{"kind": "rtn"}]
    spec = {"kind": changes.get("kind", "run"), "model": model, "steps": steps}
    events = [
        {"type": "submitted", "t": 1000.0 + at, "recipe": recipe, "artifact_id": artifact},
        {"type": "state", "t": 2000.0 + at, "state": state},
    ]
    store.ingest(run_id_of(at), json.dumps(spec), events, 100)
    return run_id_of(at)


class Held:
    """One answer, as the test wants it."""

    def __init__(self, pool: Answers, run_id: str, text: str | None) -> None:
        self._pool = pool
        self.run_id = run_id
        self.stopped = False
        self._view = AnswerView(state="loading", position=0)
        if text is not None:
            self.finish(text)

    def finish(self, text: str) -> None:
        self._view = AnswerView(state="done", text=text, finish="end", packed=True, dtype="float32")

    def fail(self, error: str = "its process died") -> None:
        self._view = AnswerView(state="failed", text="half an ans", error=error)

    def view(self) -> AnswerView:
        return self._view

    def stop(self) -> None:
        self.stopped = True
        if not self._view.ended:
            self._view = AnswerView(state="stopped")


class Answers:
    """A pool. `answer` gives the text at once; None leaves it to the test."""

    def __init__(self, answer: Callable[[str, Sequence[Message]], str | None]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, tuple[Message, ...], Sampling]] = []
        self.handles: list[Held] = []
        self.warmed: list[str] = []
        self.refuses = ""
        self.load = "ready"

    def warm(self, run_id: str) -> None:
        self.warmed.append(run_id)

    def state(self, run_id: str) -> PoolState:
        return PoolState(state=self.load)

    def generate(
        self, run_id: str, messages: Sequence[Message], sampling: Sampling, *, prefix: Any = ()
    ) -> Held:
        if self.refuses:
            raise ValueError(self.refuses)
        self.asked.append((run_id, tuple(messages), sampling))
        self.handles.append(Held(self, run_id, self.answer(run_id, messages)))
        return self.handles[-1]


def own_words(run_id: str, messages: Sequence[Message]) -> str:
    """Every run answers differently, and gives nothing away."""
    return f"Answer {sum(map(ord, run_id)) % 97} to turn {len(messages)}."


class Scene:
    """A store, votes and an arena over them."""

    def __init__(
        self,
        home: Path,
        *,
        recipes: Iterable[str] = RECIPES,
        answer: Callable[[str, Sequence[Message]], str | None] = own_words,
        limits: Limits = NO_LIMITS,
        prompts: Sequence[Asked] = PROMPTS,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.limits, self.prompts, self.seed = limits, prompts, seed
        self.settings = Settings(**{"ahead": 0} | settings)
        self.clock = Clock()
        self.store = Store(home / "results.duckdb")
        for at, recipe in enumerate(recipes):
            add_run(self.store, at, recipe)
        self.votes = Votes(self.store, home / "votes.jsonl")
        self.pool = Answers(answer)
        self.arena = self.new_arena()

    def new_arena(self) -> Arena:
        """As after a restart of the server: nothing in memory."""
        return Arena(
            self.home,
            self.store,
            self.votes,
            self.pool,
            self.limits,
            settings=self.settings,
            clock=self.clock,
            rng=random.Random(self.seed),
            prompts=lambda model: list(self.prompts),
        )

    def asked(self, prompt: str | None = None, session: str = ME, **start: str) -> BattleView:
        """A battle with its first prompt."""
        battle = self.arena.start(session, HERE, MODEL, **start)
        return self.arena.ask(battle.battle_id, session, prompt)

    def later(self, seconds: float) -> None:
        self.clock.now += seconds

    def rows(self, **filters: Any) -> list[dict[str, Any]]:
        """Votes as they are kept, the newest last."""
        frame = self.votes.frame(kinds=("human", "auto"), counted=False, text=True, **filters)
        return frame.to_dict("records")

    def close(self) -> None:
        self.store.close()
