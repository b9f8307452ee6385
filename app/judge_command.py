"""`quantarena judge`: what it costs, the job, and what the judge said in tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from backend.judges.spec import JudgeSpec
    from results_db.store import Store


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The command and its flags."""
    text = "let a language model grade or compare the answers of a model's variants"
    judge = commands.add_parser("judge", help=text, description=text)
    judge.add_argument(
        "--model", required=True, metavar="M", help="demo, a folder or a hub id@revision"
    )
    judge.add_argument(
        "--runs", nargs="+", default=[], metavar="ID", help="finished runs (default: all of M)"
    )
    judge.add_argument(
        "--style",
        default="single",
        metavar="S",
        help="single, pairwise or preference, with knobs as in 'pairwise(against=all)'",
    )
    add_who(judge)
    add_what(judge)
    add_limits(judge)
    judge.add_argument("--yes", action="store_true", help="start without asking")
    judge.add_argument("--estimate", action="store_true", help="print what it costs and stop")
    judge.add_argument("--device", default="auto", help="where the variants answer")
    judge.add_argument("--dtype", default="auto", help="that of the runs")
    judge.add_argument("--json", type=Path, metavar="FILE", help="write what the judge said")
    return judge


def add_who(judge: argparse.ArgumentParser) -> None:
    """Which model judges."""
    who = judge.add_mutually_exclusive_group(required=True)
    who.add_argument("--judge", metavar="NAME", help="model that judges, as its endpoint calls it")
    who.add_argument("--judge-run", metavar="ID", help="finished run whose model judges instead")
    judge.add_argument(
        "--endpoint",
        default="https://api.openai.com/v1",
        metavar="URL",
        help="OpenAI-compatible address (default: %(default)s)",
    )
    judge.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key, '' for none (default: %(default)s)",
    )
    for name, what in (("system", "system text"), ("prompt", "prompt"), ("later", "later prompt")):
        judge.add_argument(
            f"--{name}", type=Path, metavar="FILE", help=f"own {what} for the judge, with slots"
        )


def add_what(judge: argparse.ArgumentParser) -> None:
    """Which questions, and how they are answered."""
    judge.add_argument(
        "--questions", type=Path, metavar="FILE", help="own questions, one JSON object a line"
    )
    judge.add_argument(
        "--category", action="append", default=[], metavar="C", help="only this; may be repeated"
    )
    judge.add_argument("--limit", type=int, default=0, metavar="N", help="so many questions")
    judge.add_argument(
        "--max-new", type=int, default=512, metavar="N", help="tokens of an answer (default: 512)"
    )
    judge.add_argument(
        "--temperature", type=float, metavar="T", help="of answers (default: by category)"
    )
    judge.add_argument("--seed", type=int, default=0, help="of answers that are sampled")


def add_limits(judge: argparse.ArgumentParser) -> None:
    """How often the judge is asked, and for how much."""
    judge.add_argument(
        "--max-requests", type=int, default=2000, metavar="N", help="at most (default: 2000)"
    )
    judge.add_argument("--per-minute", type=int, default=0, metavar="N", help="requests a minute")
    judge.add_argument(
        "--concurrency", type=int, default=4, metavar="N", help="at once (default: 4)"
    )
    judge.add_argument(
        "--prices",
        type=float,
        nargs=2,
        metavar=("PROMPT", "REPLY"),
        help="of a million tokens, to show what it costs",
    )
    judge.add_argument("--max-cost", type=float, metavar="X", help="end the job at this cost")


def judge(args: argparse.Namespace) -> int:
    """Show the cost, judge, print the tables. 0 only if the job is done."""
    from app.commands import exit_code, print_notes, show_progress, write_json
    from backend.judges.budget import check_budget
    from jobs import kinds
    from jobs.home import home_folder
    from jobs.queue import Queue
    from jobs.results import reading_store, report

    queue, kind = Queue(home_folder(args.home)), kinds.find("judge")
    spec = kind.resolve(spec_of(args), queue)
    needed = check_budget(spec, spec.questions.load(spec.model.id, queue.home))
    print(f"{kind.title(spec)}: {needed.sentence()}", file=sys.stderr)
    if args.estimate:
        return 0
    spec.judge_model.check()
    if not args.yes and not free_of_charge(spec) and not agreed():
        return 1
    job = queue.submit(spec, device=args.device)
    show_progress(queue, [job])
    with reading_store(queue.home) as store:
        told = tables(store, job)
    for name, table in told.items():
        print(f"{name}:")
        print_frame(table)
    entry = report(queue, job)
    print_notes(entry)
    if args.json:
        found = {name: json.loads(table.to_json(orient="records")) for name, table in told.items()}
        write_json(args.json, [entry | found])
    return exit_code(entry)


def spec_of(args: argparse.Namespace) -> JudgeSpec:
    """The flags as a spec."""
    from app.commands import data_name, local_path
    from backend.judges.spec import JudgeSpec
    from backend.recipes import read_calls

    name, _, revision = args.model.partition("@")
    styles = read_calls(args.style)
    if len(styles) != 1:
        raise ValueError(f"--style {args.style!r} is not one style; give single or another")
    own = {n: text_of(getattr(args, n)) for n in ("system", "prompt", "later") if getattr(args, n)}
    given: dict[str, Any] = {
        "model": {"id": local_path(name), "revision": revision, "dtype": args.dtype},
        "runs": args.runs,
        "judge": styles[0] | own,
        "judge_model": {"kind": "local", "run": args.judge_run}
        if args.judge_run
        else {
            "kind": "endpoint",
            "model": args.judge,
            "base_url": args.endpoint,
            "key_variable": args.key_variable,
        },
        "questions": {"categories": args.category, "limit": args.limit},
        "answers": {"max_new": args.max_new, "temperature": args.temperature, "seed": args.seed},
        "limits": {
            "max_requests": args.max_requests,
            "per_minute": args.per_minute,
            "concurrency": args.concurrency,
            "max_cost": args.max_cost,
        },
    }
    if args.questions:
        if not args.questions.is_file():
            raise ValueError(f"--questions {args.questions}: there is no such file")
        given["questions"]["source"] = data_name(str(args.questions))
    if args.prices:
        given["limits"] |= dict(zip(("prompt_price", "completion_price"), args.prices, strict=True))
    return JudgeSpec.model_validate(given)


def text_of(path: Path) -> str:
    """A prompt from its file. OSError and ValueError are sentences already."""
    return path.read_text(encoding="utf-8")


def free_of_charge(spec: JudgeSpec) -> bool:
    """True for judges on this machine."""
    from backend.judges.endpoint import loopback

    url = getattr(spec.judge_model, "base_url", "")
    return not url or loopback(url)


def agreed() -> bool:
    """Ask on the terminal. ValueError where nobody can answer."""
    if not sys.stdin.isatty():
        raise ValueError("the judge may cost money and nobody is here to agree; add --yes")
    print("Start? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def tables(store: Store, job: str) -> dict[str, pd.DataFrame]:
    """What the judge said, as far as its style says it."""
    import pandas as pd

    from results_db import judging, verdicts

    graded, games = verdicts.judgments(store, job), verdicts.games(store, job)
    found = {}
    if len(graded):
        found["grades"] = judging.grades(graded)
    if len(games):
        found["games"] = verdicts.win_table(store, job)
        found["win_rates"] = verdicts.win_rates(store, job)
        found["order"] = pd.DataFrame([vars(verdicts.bias(store, job))])
    return found


def print_frame(table: pd.DataFrame) -> None:
    """Rows as the other commands print them; nothing where a number is missing."""
    from app.commands import number, print_table

    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    shown = [name for name in table.columns if name != "notes"]
    print_table([shown, *([number(row[name]) for name in shown] for row in rows)])
    for note in dict.fromkeys(text for row in rows for text in row.get("notes") or ()):
        print(f"note: {note}")
