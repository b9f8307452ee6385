"""What each command does. Heavy packages are imported inside the command that needs them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def serve(args: argparse.Namespace) -> int:
    """Start the web app; blocks until stopped."""
    from jobs.home import home_folder

    from app.server import serve as start

    models = [folder.expanduser().resolve() for folder in args.models]
    start(home_folder(args.home), args.host, args.port, args.token, models)
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
    from jobs.client import Client
    from jobs.home import home_folder

    specs = specs_of(args)
    client = Client(home_folder(args.home))
    run_ids = [client.submit(spec, recipe=text, device=args.device) for text, spec in specs]
    follow(client, dict(zip(run_ids, (text for text, _ in specs), strict=True)))
    reports = [
        client.report(run_id) | {"recipe": text}
        for run_id, (text, _) in zip(run_ids, specs, strict=True)
    ]
    print_results(reports)
    if args.json:
        write_json(args.json, reports)
    return 0 if all(report["state"] == "done" for report in reports) else 1


def specs_of(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """[(recipe text without blanks, RunSpec)], the baseline first."""
    from backend.recipes import parse
    from backend.spec import Calibration, ModelRef, RunSpec

    name, _, revision = args.model.partition("@")
    model = ModelRef(id=local_path(name), revision=revision, dtype=args.dtype)
    measured = metrics_of(args)
    calibration = Calibration(dataset=data_name(args.calibration))
    texts = ["baseline", *args.recipe]
    return [
        (
            "".join(text.split()),
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
    """A folder that exists as an absolute path; anything else stays as it is."""
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


def follow(client: Any, names: dict[str, str]) -> None:
    """Show progress until every run has ended: a bar on a terminal, a line per change elsewhere."""
    from tqdm import tqdm

    with tqdm(
        total=100 * len(names), unit="%", disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        for view in client.follow(list(names)):
            name = names[view.run_id]
            if view.state in ("done", "failed", "cancelled"):
                bar.write(f"{view.state}: {name}", file=sys.stderr)
            bar.n = round(100 * client.fraction(list(names)))
            bar.set_description_str(f"{name} {view.stage} {view.item}"[:60])
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
        for note in report["notes"]:
            print(f"note: {report['recipe']}: {note}")
        if report.get("error"):
            print(f"failed: {report['recipe']}: {report['error']}", file=sys.stderr)


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
    from jobs.client import reading_store
    from jobs.home import home_folder

    from results_db.export import export as write

    with reading_store(home_folder(args.home)) as store:
        for path in write(store, args.out, args.format):
            print(path)
    return 0


def sql(args: argparse.Namespace) -> int:
    """One read-only query, answered by the server when it holds the file."""
    from jobs.client import query
    from jobs.home import home_folder

    columns, rows = query(home_folder(args.home), args.query)
    if args.json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], default=str))
    else:
        print_table([columns, *[[("-" if v is None else str(v)) for v in row] for row in rows]])
    return 0


def rebuild(args: argparse.Namespace) -> int:
    """Make the database again from the run folders."""
    from jobs.home import home_folder
    from jobs.rebuild import rebuild as again

    count = again(home_folder(args.home))
    print(f"rebuilt from {count} runs")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Check kernels against their references, then time them."""
    from kernels.bench import bench as time_kernels

    return time_kernels(args.kernels)
