"""The web application: pages, named API endpoints, a few plain routes, and who may do what."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import warnings
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: it asks at import

import gradio as gr
import plotly
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from markupsafe import Markup

from app import api, arena_routes, downloads, leaderboard_routes, pages, rows, status
from app.context import LOOPBACK, SESSION_NAME, TOKEN_NAME, Context, Picks, session_of
from app.markup import tag
from jobs import devices
from jobs.arena import Arena
from jobs.chat import ChatPool
from jobs.home import DATABASE, Ownership
from jobs.limits import Limits
from jobs.queue import Queue
from jobs.supervisor import Supervisor
from results_db.queries import with_baseline
from results_db.store import Store, StoreError
from results_db.verdicts import VoteCaster
from results_db.votes import FILE as VOTES
from results_db.votes import Votes

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
YEAR_S = 31_536_000


def build(ctx: Context) -> gr.Blocks:
    """All pages and the named endpoints as one Gradio app."""
    found = pages.find()
    home = next(page for page in found if page.path == "/")
    with gr.Blocks(title="QuantArena", fill_width=True, analytics_enabled=False) as blocks:
        home.build(ctx)
        api.publish(ctx)
    for page in found:
        if page is not home:
            with blocks.route(page.title, page.path):
                page.build(ctx)
    return blocks


def build_app(ctx: Context) -> FastAPI:
    """The Gradio app with its assets, downloads, health and SQL beside it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(gate(ctx))
    add_assets(app)
    add_routes(app, ctx)
    leaderboard_routes.add_routes(app, ctx)
    if ctx.arena is not None:
        arena_routes.add_routes(app, ctx.arena)
    with warnings.catch_warnings():  # it warns that many pages rule out SSR, which is off
        warnings.simplefilter("ignore", UserWarning)
        return gr.mount_gradio_app(
            app,
            build(ctx),
            path="/",
            theme=gr.themes.Base(font=["IBM Plex Sans"], font_mono=["IBM Plex Mono"]),
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            favicon_path=str(STATIC / "icon.png"),
            show_error=True,
        )


def head() -> str:
    """What every page's head gets: styles, the list of pages, our script, Plotly's. All ours."""
    listed = [
        {"title": page.title, "path": page.path, "key": page.key}
        for page in pages.find()
        if page.in_bar
    ]
    styles, scripts = ([own(name) for name in named("css")], [own(name) for name in named("js")])
    parts = [
        *(tag("link", rel="stylesheet", href=url) for url in styles),
        tag("script", Markup("window.qa = {{pages: {}}};").format(Markup(json.dumps(listed)))),
        *(tag("script", src=url) for url in scripts),
        tag("script", src=own(PLOTLY.name), defer=True),
    ]
    return str(Markup("").join(parts))


def named(kind: str) -> list[str]:
    """Our files of one kind: app.* first, then those of single pages (arena.js)."""
    names = sorted(path.name for path in STATIC.glob(f"*.{kind}"))
    return sorted(names, key=lambda name: not name.startswith("app."))


def own(name: str) -> str:
    """Address of a static file, which changes when the file does."""
    return f"/files/{name}?{stamp(name)}"


def stamp(name: str) -> str:
    """Changes when a file does, so that browsers may keep it for ever."""
    found = (STATIC / name).stat() if name != PLOTLY.name else PLOTLY.stat()
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def add_assets(app: FastAPI) -> None:
    """/files: our script and styles, and Plotly's own file from its package."""

    @app.get("/files/plotly.min.js", include_in_schema=False)
    def plotly_file() -> FileResponse:
        return FileResponse(PLOTLY, headers={"Cache-Control": f"max-age={YEAR_S}, immutable"})

    app.mount("/files", StaticFiles(directory=STATIC))


def add_routes(app: FastAPI, ctx: Context) -> None:
    """Health, the state of work for the top bar, read-only SQL, the table as a file."""

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        return {"ok": True, "version": ctx.store.version}

    @app.get("/api/status")
    def work() -> dict[str, Any]:
        return status.status(ctx)

    @app.post("/api/sql")
    async def sql(request: Request) -> Response:
        if not ctx.trusted(request):
            return refusal("SQL needs the token that the server printed when it started.", 403)
        return sql_answer(ctx.store, await request.body())

    @app.get("/download/runs.{kind}")
    def download(kind: str, request: Request) -> Response:
        if kind not in downloads.WRITERS:
            return downloads.unknown(kind)
        return table_file(ctx.store, Picks.read(request.query_params), kind)


def sql_answer(store: Store, body: bytes) -> Response:
    """{"sql": "SELECT ..."} -> {"columns", "rows"} or {"error"} in one sentence."""
    try:
        frame = store.query(str(json.loads(body)["sql"]))
    except StoreError as error:
        return refusal(str(error), 400)
    except (ValueError, KeyError, TypeError):
        return refusal('send JSON: {"sql": "SELECT ..."}', 400)
    text = frame.to_json(orient="split", index=False, date_format="iso")
    data = json.loads(text)
    return JSONResponse({"columns": data["columns"], "rows": data["data"]})


def refusal(text: str, code: int) -> JSONResponse:
    """An error in one sentence."""
    return JSONResponse({"error": text}, status_code=code)


def table_file(store: Store, picks: Picks, kind: str) -> Response:
    """The rows of the table as a file, with deltas and every condition."""
    known = rows.models(store)
    wide = rows.kept(rows.wide(store, picks.model or (known[0] if known else "")), picks)
    frame = with_baseline(wide, rows.measured(wide))
    return downloads.table(frame, "runs", kind)


Next = Callable[[Request], Awaitable[Response]]


def gate(ctx: Context) -> Callable[[Request, Next], Awaitable[Response]]:
    """Turns ?token= into a cookie, closes what no page uses, puts our head into pages."""
    in_head = head()

    async def check(request: Request, following: Next) -> Response:
        if request.url.path == "/gradio_api/upload":
            return refusal("this server takes no files", 403)
        shown = request.query_params.get("token", "")
        if shown and request.method == "GET" and ctx.token and ctx.trusted(request):
            rest = request.url.remove_query_params("token")
            there = RedirectResponse(rest.path + (f"?{rest.query}" if rest.query else ""))
            there.set_cookie(TOKEN_NAME, shown, httponly=True, samesite="strict")
            return there
        answer = await with_head(request, await following(request), in_head)
        if is_page(request, answer) and not session_of(request):
            answer.set_cookie(
                SESSION_NAME, secrets.token_urlsafe(16), YEAR_S, httponly=True, samesite="lax"
            )
        return answer

    return check


def is_page(request: Request, answer: Response) -> bool:
    """True for HTML that a browser asked for."""
    kind = answer.headers.get("content-type", "")
    return request.method == "GET" and kind.startswith("text/html")


async def with_head(request: Request, answer: Response, in_head: str) -> Response:
    """A page with our head in it from the first byte: Gradio would add it later, by script."""
    if not is_page(request, answer):
        return answer
    chunks = [chunk async for chunk in cast(StreamingResponse, answer).body_iterator]
    body = b"".join(c if isinstance(c, bytes) else str(c).encode() for c in chunks)
    headers = {k: v for k, v in answer.headers.items() if k != "content-length"}
    page = body.replace(b"</head>", in_head.encode() + b"</head>", 1)
    return Response(page, answer.status_code, headers)


def serve(
    home: Path,
    host: str,
    port: int,
    token: str = "",
    models: Sequence[Path] = (),
    *,
    limits: Limits = Limits(),
    chat_bytes: int | None = None,
) -> None:
    """Own `home`, work its queue and show it until stopped. ValueError in one sentence if not."""
    if host not in LOOPBACK and not token:
        token = secrets.token_urlsafe(18)
    with Ownership(home) as ownership, listening(host, port) as listener:
        store = Store(home / DATABASE)
        queue = Queue(home, slots=devices.here())
        supervisor = Supervisor(queue, store)
        stop = threading.Event()
        worker = threading.Thread(target=supervisor.run_until, args=(stop,), name="supervisor")
        votes, chat = Votes(store, home / VOTES), ChatPool(home, budget_bytes=chat_bytes)
        arena = Arena(home, store, votes, chat, limits)
        jury = VoteCaster(store, votes)
        keeper = threading.Thread(target=keep_ready, args=(arena, jury, store, stop), name="arena")
        ctx = Context(store, queue, home, tuple(models), host, token, queue, votes, chat, arena)
        config = uvicorn.Config(build_app(ctx), log_level="warning", timeout_graceful_shutdown=2)
        url = address(host, listener.getsockname()[1], token)
        server = Telling(config, lambda: _ready(ownership, url, token))
        worker.start()
        keeper.start()
        try:
            server.run(sockets=[listener])
        finally:
            stop.set()
            keeper.join()
            chat.close()
            worker.join()
            supervisor.close()


def keep_ready(
    arena: Arena, jury: VoteCaster, store: Store, stop: threading.Event, every_s: float = 2.0
) -> None:
    """Until stopped: cast judges' votes and the ties that mining found, draw the next battles."""
    seen = -1
    while not stop.wait(every_s):
        try:
            version, models = store.version, rows.models(store)
            jury.cast()
            for model in models if version != seen else ():
                arena.record_ties(model)
            seen = version
            for model in models:
                arena.prepare(model)
        except Exception:  # a full disk, a broken log: voters are told when they vote
            log.exception("the arena could not get ready")


class Telling(uvicorn.Server):
    """A server that says when it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def _ready(ownership: Ownership, url: str, token: str) -> None:
    ownership.announce(url.split("?")[0].rstrip("/"), token)
    print(f"QuantArena is at {url}", flush=True)


def listening(host: str, port: int) -> socket.socket:
    """A bound socket; ValueError in one sentence where the port is taken or not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it or choose "
            "another with --port"
        ) from None


def address(host: str, port: int, token: str) -> str:
    """What to open in a browser."""
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    shown = f"/?token={token}" if token and host not in LOOPBACK else ""
    return f"http://{name}:{port}{shown}"
