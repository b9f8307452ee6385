"""What each command does. Heavy packages are imported inside the command that needs them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

PLACE = re.compile(r"block \d+ \S+: ")  # as a note begins that is about one linear


def serve(args: argparse.Namespace) -> int:
    """Start the web app; blocks until stopped."""
    from app.context import LOOPBACK
    from app.server import serve as start
    from jobs.home import home_folder
    from jobs.limits import PUBLIC, Limits

    models = [folder.expanduser().resolve() for folder in args.models]
    limits = Limits() if args.host in LOOPBACK else PUBLIC
    if args.limits:
        limits = Limits.from_text(args.limits, limits)
    memory = args.chat_memory
    if memory is not None and not memory > 0:
        raise ValueError(f"--chat-memory {memory:g} is not above 0 GiB")
    start(
        home_folder(args.home),
        args.host,
        args.port,
        args.token,
        models,
        limits=limits,
        chat_bytes=None if memory is None else int(memory * 2**30),
    )
    return 0


def recipes(args: argparse.Namespace) -> int:
    """Print the presets."""
    from backend.recipes import presets

    found = presets()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_table([("preset", "pipeline"), *found.items()])
        print(
            "\nA pipeline is step(key=value,...)+...; `quantarena methods` lists steps and knobs."
        )
    return 0


def methods(args: argparse.Namespace) -> int:
    """Print methods and formats with their knobs."""
    from backend.formats import FORMATS
    from backend.methods import METHODS

    return print_parts({"method": METHODS, "format": FORMATS}, args.json)


def metrics(args: argparse.Namespace) -> int:
    """Print the metrics with their knobs."""
    from backend.metrics import METRICS

    return print_parts({"metric": METRICS}, args.json)


def print_parts(registries: dict[str, Any], as_json: bool) -> int:
    """Every part of some registries: one line of help, then its knobs."""
    if as_json:
        schemas = {
            noun: {kind: cls.model_json_schema() for kind, cls in registry.load().items()}
            for noun, registry in registries.items()
        }
        print(json.dumps(schemas, indent=2, default=str))
        return 0
    for noun, registry in registries.items():
        for kind, cls in registry.load().items():
            print(f"{kind} ({noun}): {cls.summary()}")
            for name, field in cls.model_fields.items():
                default = field.get_default(call_default_factory=True)
                shown = (
                    default.kind if hasattr(default, "kind") else json.dumps(default, default=str)
                )
                print(f"    {name} = {shown}  {field.description or ''}")
        for module, trace in registry.broken.items():
            print(f"broken: {module}: {trace.strip().splitlines()[-1]}", file=sys.stderr)
    return 0


def run(args: argparse.Namespace) -> int:
    """Submit the baseline and every recipe, follow them, print a table. 0 only if all are done."""
    from backend.recipes import presets
    from jobs.home import home_folder
    from jobs.queue import Queue
    from jobs.results import report

    specs, named = specs_of(args), presets()
    queue = Queue(home_folder(args.home))
    run_ids = [queue.submit(spec, device=args.device) for _, spec in specs]
    show_progress(queue, run_ids)
    reports = [
        report(queue, run_id) | {"recipe": text if text in named else "".join(text.split())}
        for run_id, (text, _) in zip(run_ids, specs, strict=True)
    ]
    print_results(reports)
    if args.json:
        write_json(args.json, reports)
    return max(exit_code(entry) for entry in reports)


def exit_code(entry: dict[str, Any]) -> int:
    """0: done; 2: what was asked for cannot work; 1: it failed or was cancelled."""
    if entry["state"] == "done":
        return 0
    return 2 if entry.get("error", {}).get("bad_input") else 1


def specs_of(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """[(recipe text as given, RunSpec)], the baseline first."""
    from app.form import expand
    from backend.recipes import parse
    from backend.spec import Calibration, ModelRef, RunSpec

    name, _, revision = args.model.partition("@")
    model = ModelRef(id=local_path(name), revision=revision, dtype=args.dtype)
    measured = metrics_of(args)
    counts = {name: getattr(args, f"calibration_{name}") for name in ("samples", "length", "seed")}
    given = {name: count for name, count in counts.items() if count is not None}
    calibration = Calibration(dataset=data_name(args.calibration), **given)
    if any(not text.strip() for text in args.recipe):
        raise ValueError("--recipe is empty; `quantarena recipes` lists presets")
    texts = ["baseline", *(line for text in args.recipe for line in expand(text))]
    return [
        (
            text.strip(),
            RunSpec(
                model=model,
                steps=parse(text),
                metrics=measured,
                calibration=calibration,
                storage=args.storage,
                seed=args.seed,
            ),
        )
        for text in texts
    ]


def local_path(name: str) -> str:
    """A folder that exists as an absolute path; a bundled model's or hub's name stays as it is."""
    from backend.model.identity import DEMOS

    if name in DEMOS:
        return name
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def data_name(name: str) -> str:
    """A data set's name, or file:/absolute/path for a file that exists."""
    return f"file:{Path(name).resolve()}" if Path(name).is_file() else name


def metrics_of(args: argparse.Namespace) -> tuple[Any, ...]:
    """`--metrics` with `--text` and `--window` put into every metric that reads text."""
    from backend.metrics import METRICS
    from backend.recipes import read_calls

    given: dict[str, Any] = {}
    if args.text:
        if not args.text.is_file():
            raise ValueError(f"--text {args.text}: there is no such file")
        given["dataset"] = data_name(str(args.text))
    if args.window:
        given["window"] = args.window
    calls = read_calls(args.metrics)
    if not calls:
        raise ValueError(
            "--metrics names nothing to measure; `quantarena metrics` lists what there is"
        )
    built = []
    for call in calls:
        fields = METRICS.find(call["kind"]).model_fields
        built.append(METRICS.build({**{k: v for k, v in given.items() if k in fields}, **call}))
    return tuple(built)


def show_progress(queue: Any, run_ids: Sequence[str]) -> None:
    """Until every run has ended: a bar on a terminal, a line per run that ends elsewhere."""
    from tqdm import tqdm

    from jobs.follow import follow

    wanted = list(dict.fromkeys(run_ids))
    off = not sys.stderr.isatty()
    with tqdm(total=100, unit="%", disable=off, leave=False, file=sys.stderr) as bar:
        for run_id, event in follow(queue.home, wanted, queue=queue):
            ended = event["type"] == "state" and event["state"] in ("done", "failed", "cancelled")
            if ended:
                tqdm.write(f"{event['state']}: {queue.view(run_id).recipe}", file=sys.stderr)
            if ended or not off:
                views = [queue.view(name) for name in wanted]
                current = next((view for view in views if view.state == "running"), views[0])
                bar.n = round(100 * sum(view.fraction for view in views) / len(views))
                bar.set_description_str(f"{current.recipe} {current.stage or ''}"[:60])
                bar.refresh()


def print_results(reports: Sequence[dict[str, Any]]) -> None:
    """One line per run, one column per measurement, notes and errors below."""
    names = list(dict.fromkeys(m["name"] for r in reports for m in r["measurements"]))
    rows: list[Sequence[str]] = [("recipe", "state", *names)]
    for report in reports:
        values = {m["name"]: m["value"] for m in report["measurements"]}
        rows.append((report["recipe"], report["state"], *(number(values.get(n)) for n in names)))
    print_table(rows)
    for report in reports:
        print_notes(report)


def print_notes(report: dict[str, Any]) -> None:
    """What a job had to say, and what went wrong."""
    for note in merged(report["notes"]):
        print(f"note: {report['recipe']}: {note}")
    if report.get("error"):
        print(f"failed: {report['recipe']}: {report['error']['message']}", file=sys.stderr)


def merged(notes: Sequence[str]) -> list[str]:
    """Notes in their order; what many linears say alike is said once, with their number."""
    told: dict[str, list[str]] = {}
    for note in notes:
        place = PLACE.match(note)
        told.setdefault(note[place.end() :] if place else note, []).append(note)
    return [
        same[0] if len(same) == 1 else f"{len(same)} linears: {text}" for text, same in told.items()
    ]


def mine(args: argparse.Namespace) -> int:
    """Put the prompts to a model's variants; print how far each answers from the 16-bit model."""
    from backend.spec import MineSpec, ModelRef
    from jobs.home import home_folder
    from jobs.queue import Queue
    from jobs.results import mined, report

    name, _, revision = args.model.partition("@")
    spec = MineSpec(
        model=ModelRef(id=local_path(name), revision=revision, dtype=args.dtype),
        runs=tuple(args.runs),
        prompts=tuple(args.prompts),
        temperature=args.temperature,
        max_new=args.max_new,
        seed=args.seed,
    )
    queue = Queue(home_folder(args.home))
    job = queue.submit(spec, device=args.device)
    show_progress(queue, [job])
    found, entry = mined(queue, job), report(queue, job)
    names = ("recipe", "prompts", "identical", "departs", "kld", "agreement")
    print_table([names, *((row["recipe"], *(number(row[n]) for n in names[1:])) for row in found)])
    print_notes(entry)
    if args.json:
        write_json(args.json, found)
    return exit_code(entry)


def judge(args: argparse.Namespace) -> int:
    """Let a judge grade or compare the answers of a model's variants."""
    from app.judge_command import judge as start

    return start(args)


def number(value: Any) -> str:
    """Four significant digits, thousands kept whole; a dash where nothing was measured."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Columns aligned, two blanks apart; the first row is the header."""
    table = [tuple(str(cell) for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def write_json(path: Path, reports: Sequence[dict[str, Any]]) -> None:
    """The documented JSON; written beside and renamed, so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(reports, indent=2, allow_nan=False) + "\n")
    part.replace(path)


def export(args: argparse.Namespace) -> int:
    """Every table as files; beside a running server, from a copy made of the run folders."""
    from jobs.home import home_folder
    from jobs.results import reading_store
    from results_db.export import export as write
    from results_db.vote_rows import copied, copy_file
    from results_db.votes import FILE

    home = home_folder(args.home)
    with reading_store(home) as store:
        if not copied(store).seq:  # the copy beside a running server is made of the runs alone
            copy_file(store, home / FILE)
        for path in write(store, args.out, args.format):
            print(path)
    return 0


def sql(args: argparse.Namespace) -> int:
    """One read-only query, answered by the server when it holds the file."""
    from jobs.home import home_folder
    from jobs.results import query

    columns, rows = query(home_folder(args.home), args.query)
    if args.json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], default=str))
    else:
        print_table([columns, *[[("-" if v is None else str(v)) for v in row] for row in rows]])
    return 0


def rebuild(args: argparse.Namespace) -> int:
    """Make the database again from the run folders and the vote log."""
    from jobs.home import home_folder
    from jobs.rebuild import rebuild as again

    print(again(home_folder(args.home)))
    return 0


def check_votes(args: argparse.Namespace) -> int:
    """Hold the vote log against its hashes, its rules and the database; 1 if anything is wrong."""
    from jobs.home import home_folder
    from results_db.vote_log import check
    from results_db.votes import FILE

    home = home_folder(args.home)
    path = home / FILE
    found = check(path, args.expect)
    wrong = [f"line {found.broken_line}: {found.why}"] if found.why else []
    if args.expect and found.expected_at is None:
        wrong.append(f"no entry has the hash {args.expect}: entries were removed or changed")
    differs, beside = database_votes(home, path, found.head.seq)
    wrong += [differs] if differs else []
    print(f"{path}: {found.head.seq} entries, {found.votes} votes, {found.retractions} retractions")
    print(f"last hash: {found.head.hash}")
    if args.expect and found.expected_at is not None:
        print(f"expected hash: it is the last of the first {found.expected_at} entries")
    if found.torn_bytes:
        print(f"{found.torn_bytes} bytes at the end are no whole line: one under way, or a crash")
    print(f"database: {beside}")
    for sentence in wrong:
        print(f"wrong: {sentence}")
    return 1 if wrong else 0


def database_votes(home: Path, path: Path, entries: int) -> tuple[str, str]:
    """(what is wrong with the database's copy or "", how it compares) for a log of `entries`."""
    from jobs.home import DATABASE, Ownership, owned, server
    from jobs.results import query
    from results_db.store import Store, StoreError
    from results_db.vote_log import START, check
    from results_db.vote_rows import PLACES, copied, difference

    if server(home):
        sql = f"SELECT count(*), coalesce(max(seq), 0), max_by(hash, seq) FROM {PLACES}"
        (rows, last, hash), *_ = query(home, sql)[1]
        same = rows == last == check(path, hash or START).expected_at
        if not same:
            return f"the {rows} entries in the database are not the first of the file", "it differs"
        return "", f"{rows} entries, the same last hash; stop the server to compare every field"
    if owned(home):
        return "", "in use by a run, not compared"
    if not (home / DATABASE).exists():
        return "", "none yet"
    try:
        with Ownership(home), closing(Store(home / DATABASE)) as store:
            behind = entries - copied(store).seq
            wrong = difference(store, path)
    except StoreError as error:
        return str(error), "it cannot be read"
    later = f", {behind} more will be copied at the next start" if behind > 0 else ""
    return wrong, "it differs" if wrong else f"{entries - max(behind, 0)} entries, the same{later}"


def import_votes(args: argparse.Namespace) -> int:
    """Add the battles of a file to the votes, all of them or none."""
    from jobs.home import DATABASE, Ownership, home_folder
    from results_db.battles_io import import_battles
    from results_db.store import Store
    from results_db.votes import FILE, Votes

    home = home_folder(args.home)
    with Ownership(home), closing(Store(home / DATABASE)) as store:
        done = import_battles(Votes(store, home / FILE), args.file)
    print(f"{done.added} battles added, {done.rows - done.added} were there already")
    return 0


def export_votes(args: argparse.Namespace) -> int:
    """Write battles in the field's columns, from the log itself: also beside a running server."""
    from jobs.home import home_folder
    from results_db.battles_io import PEOPLE, export_battles
    from results_db.votes import FILE

    written = export_battles(home_folder(args.home) / FILE, args.file, args.kind or PEOPLE)
    print(f"{written} battles written to {args.file}")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Check kernels, then time them and the methods that solve layers; 1 if a kernel is wrong."""
    from app.bench_command import bench as start

    return start(args)
