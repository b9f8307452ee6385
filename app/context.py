"""Context: all a page may touch. Picks: what a person chose to see, as it is in the URL."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit

from jobs.arena import Arena
from jobs.chat import ChatPool
from jobs.queue import Queue, RunView
from results_db.store import Store
from results_db.votes import Votes

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
TOKEN_NAME = "quantarena_token"  # of the cookie
SESSION_NAME = "quantarena_session"  # of the cookie that tells one browser from another


class Reading(Protocol):
    """The part of the queue that changes nothing."""

    def runs(self) -> list[RunView]: ...
    def view(self, run_id: str) -> RunView: ...
    def log(self, run_id: str, lines: int = 200) -> str: ...


class Visit(Protocol):
    """What is read of a request, Gradio's or Starlette's."""

    @property
    def headers(self) -> Any: ...

    @property
    def cookies(self) -> Any: ...

    @property
    def query_params(self) -> Any: ...

    @property
    def client(self) -> Any: ...


@dataclass(frozen=True)
class Context:
    """All a page may touch."""

    store: Store
    runs: Reading  # the queue, to look at
    home: Path
    models: tuple[Path, ...] = ()  # folders from which local models may be taken
    host: str = "127.0.0.1"
    token: str = ""
    _queue: Queue | None = None
    votes: Votes | None = None
    chat: ChatPool | None = None
    arena: Arena | None = None

    def change(self, visit: Visit) -> Queue:
        """The queue, to change; PermissionError for a visitor who may only look."""
        if not self.trusted(visit) or self._queue is None:
            raise PermissionError(
                "You may look but not change anything here: open the link with ?token=... that "
                "the server printed when it started."
            )
        return self._queue

    def trusted(self, visit: Visit) -> bool:
        """True for whoever sits at this machine, and for whoever shows the token."""
        if self.token and any(hmac.compare_digest(t, self.token) for t in shown_tokens(visit)):
            return True
        return self.host in LOOPBACK and _from_here(visit)


def shown_tokens(visit: Visit) -> list[str]:
    """Tokens a request carries: cookie, Authorization header, ?token=."""
    bearer = str(visit.headers.get("authorization", ""))
    return [
        str(visit.cookies.get(TOKEN_NAME, "")),
        bearer.removeprefix("Bearer ") if bearer.startswith("Bearer ") else "",
        str(visit.query_params.get("token", "")),
    ]


def session_of(visit: Visit) -> str:
    """What tells this browser from others: its cookie; "" before it has one."""
    return str(visit.cookies.get(SESSION_NAME, ""))


def address_of(visit: Visit) -> str:
    """Network address the request came from."""
    return str(visit.client.host) if visit.client else ""


def from_elsewhere(visit: Visit) -> bool:
    """True if another site's page sent the request: a browser then names that site."""
    origin = str(visit.headers.get("origin", ""))
    return bool(origin) and urlsplit(origin).netloc != str(visit.headers.get("host", ""))


def _from_here(visit: Visit) -> bool:
    """True if the address bar says loopback, not another site or a name that resolves to us."""
    host = urlsplit("//" + str(visit.headers.get("host", ""))).hostname
    origin = str(visit.headers.get("origin", ""))
    return host in LOOPBACK and (not origin or urlsplit(origin).hostname in LOOPBACK)


Words = tuple[str, ...]
BETWEEN = "~"  # in lists: lm-eval names have commas


@dataclass(frozen=True)
class Picks:
    """What is on screen. Each field is one URL parameter; a default leaves no trace there."""

    model: str = ""  # "": the model that was run last
    x: str = ""  # measurement on each axis; "": the chart's own choice
    y: str = ""
    xscale: str = ""  # log | linear; "": log where values span more than a decade
    yscale: str = ""
    zoom: Words = ()  # x0, x1, y0, y1 in axis coordinates
    drag: str = ""  # what dragging over the chart does; "": zoom, select: selects runs
    family: Words = ()  # filters; empty lets everything through
    bits: Words = ()
    target: Words = ()
    packed: bool = False
    front: bool = False
    set: str = ""  # which measuring conditions; "": the most frequent
    runs: Words = ()  # selected, in the order of selecting
    search: str = ""
    sort: str = ""  # column, with - in front for falling
    columns: Words = ()
    table: bool = False  # the chart as a table
    published: bool = False  # values from print laid over the chart
    budget: str = ""  # memory that weights and cache may take: "4 GiB"
    shape: str = ""  # n x k of the weights that the kernels' charts show
    cube: str = ""  # measurement in the cells of weight bits x KV bits
    id: str = ""  # the run that the run page shows
    against: str = ""  # and the one it is compared with
    layer: str = ""  # which per-layer value
    block: str = ""  # and the cell of it that is looked into
    module: str = ""
    kvblock: str = ""  # the block whose keys and values are looked at
    # leaderboard
    tab: str = ""  # published, imported; "": the variants of the model
    voters: Words = ()  # kinds of voters in the people's columns; (): human
    category: str = ""  # of the prompts
    language: str = ""
    clean: bool = False  # leave out anomalous voters
    style: bool = False  # hold length and layout of the answers fixed
    interval: str = ""  # bootstrap; "": sandwich
    elo: bool = False  # a column with online Elo
    ties: str = ""  # without: battle counts leave ties out
    hide: Words = ()  # column groups switched off
    tables: Words = ()  # charts shown as tables
    printed: str = ""  # filters of published results: model, metric, method
    metric: str = ""
    method: str = ""

    @classmethod
    def read(cls, query: Mapping[str, Any]) -> Picks:
        """URL parameters -> picks. Unknown names are left alone."""
        return cls(
            **{f.name: _value(f.type, query[f.name]) for f in fields(cls) if f.name in query}
        )

    def query(self, **changes: Any) -> str:
        """`?x=...` with `changes` made; "" when nothing differs from the defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | changes
        chosen = {
            f.name: _text(values[f.name]) for f in fields(self) if values[f.name] != f.default
        }
        return "?" + urlencode(chosen, safe="~,:()") if chosen else ""


def _value(kind: Any, text: Any) -> Any:
    if kind == "Words":
        return tuple(word for word in str(text).split(BETWEEN) if word)
    return str(text) in ("1", "true") if kind == "bool" else str(text)


def _text(value: str | bool | Sequence[str]) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return value if isinstance(value, str) else BETWEEN.join(value)
