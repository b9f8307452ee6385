"""`python -m jobs`: submit, list, cancel, retry, follow, rebuild, worker."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.home import home_folder

if TYPE_CHECKING:
    from jobs.queue import Queue
    from jobs.view import RunView


def main(argv: list[str] | None = None) -> int:
    """Run one command -> exit code: 0, or 2 with one sentence for what cannot be."""
    given = parser().parse_args(argv)
    try:
        return given.command(given, home_folder(given.home))
    except ValueError as error:
        print(f"jobs: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command line; nothing heavy is imported until a command runs."""
    top = argparse.ArgumentParser("jobs", description="Runs as folders of events.")
    top.add_argument("--home", help="home folder; else $QUANTARENA_HOME, else the platform's")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add = adder(commands)
    submit = add("submit", do_submit, "queue a job of the spec in a JSON file")
    submit.add_argument("spec", type=Path)
    submit.add_argument("--label", default="")
    submit.add_argument("--priority", type=int, default=0)
    submit.add_argument("--after", help="a run that must be done before")
    submit.add_argument("--device", default="auto")
    add("list", do_list, "every run and where it stands")
    add("rebuild", do_rebuild, "make the database again from the run folders")
    for name, command, text in (
        ("cancel", do_cancel, "stop runs"),
        ("uncancel", do_uncancel, "take a cancel back"),
        ("retry", do_retry, "continue failed or cancelled runs"),
        ("follow", do_follow, "print events until the runs end; supervise if nobody does"),
    ):
        add(name, command, text).add_argument("run", nargs="+")
    worker = add("worker", do_worker, "do the next stage of one run, here and now")
    worker.add_argument("arguments", nargs=argparse.REMAINDER)
    return top


def adder(commands: argparse._SubParsersAction) -> Callable[..., argparse.ArgumentParser]:
    """A function that adds one command with its help."""

    def add(name: str, command: Callable, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=command)
        return made

    return add


def queue(home: Path) -> Queue:
    """The home's queue, imported late: it brings torch."""
    from jobs.queue import Queue

    return Queue(home)


def do_submit(given: argparse.Namespace, home: Path) -> int:
    from jobs import kinds

    try:
        spec = kinds.validate(json.loads(given.spec.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{given.spec} cannot be read: {error.strerror}") from None
    asked = {"label": given.label, "priority": given.priority, "after": given.after}
    print(queue(home).submit(spec, device=given.device, **asked))
    return 0


def do_list(given: argparse.Namespace, home: Path) -> int:
    for view in queue(home).runs():
        print(line(view))
    return 0


def line(view: RunView) -> str:
    """One run as one line of text."""
    left = "" if view.eta_s is None else f"  {view.eta_s:.0f} s left"
    what = view.label or view.recipe
    why = f"  {view.error['message']}" if view.error else ""
    return f"{view.run_id}  {view.state:9}  {view.fraction:4.0%}  {what}{left}{why}"


def do_cancel(given: argparse.Namespace, home: Path) -> int:
    for run_id in given.run:
        queue(home).cancel(run_id)
    return 0


def do_uncancel(given: argparse.Namespace, home: Path) -> int:
    for run_id in given.run:
        queue(home).uncancel(run_id)
    return 0


def do_retry(given: argparse.Namespace, home: Path) -> int:
    for run_id in given.run:
        queue(home).retry(run_id)
    return 0


def do_follow(given: argparse.Namespace, home: Path) -> int:
    from jobs.events import State
    from jobs.follow import follow

    for run_id, event in follow(home, given.run):
        print(run_id, json.dumps(event, ensure_ascii=False), flush=True)
    states = {queue(home).view(run_id).state for run_id in given.run}
    return 0 if states == {State.DONE} else 1


def do_rebuild(given: argparse.Namespace, home: Path) -> int:
    from jobs.rebuild import rebuild

    print(rebuild(home))
    return 0


def do_worker(given: argparse.Namespace, home: Path) -> int:
    from jobs.worker import main as work

    return work(given.arguments)


if __name__ == "__main__":
    sys.exit(main())
