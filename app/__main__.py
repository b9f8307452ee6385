"""The command line: `quantarena COMMAND`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

DEFAULT_METRICS = "perplexity,divergence,size"


def parser() -> argparse.ArgumentParser:
    """Every command with its flags."""
    top = argparse.ArgumentParser(
        prog="quantarena",
        description="Quantize language models, measure the damage, compare on live charts.",
    )
    top.add_argument("--version", action="version", version=version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_serve(commands)
    add_run(commands)
    for name, text in (
        ("recipes", "list the presets and their pipelines"),
        ("methods", "list the quantization methods and number formats with their knobs"),
        ("metrics", "list what can be measured"),
    ):
        listing = commands.add_parser(name, help=text, description=text)
        listing.add_argument("--json", action="store_true", help="print the JSON schemas")
    add_store_commands(commands)
    bench = commands.add_parser("bench", help="check and time kernels, time methods; ends in JSON")
    bench.add_argument("names", nargs="*", metavar="NAME", help="kernels and methods; all if none")
    return top


def version() -> str:
    """The installed version."""
    from importlib.metadata import version as installed

    return f"quantarena {installed('quantarena')}"


def add_home(command: argparse.ArgumentParser) -> None:
    """The flag every command that touches results has."""
    command.add_argument(
        "--home",
        type=Path,
        metavar="DIR",
        help="where runs and results live (default: $QUANTARENA_HOME, else the user's data folder)",
    )


def add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`quantarena serve`."""
    serve = commands.add_parser("serve", help="start the web app and the workers")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine)"
    )
    serve.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    serve.add_argument("--token", default="", help="needed to change anything from another machine")
    serve.add_argument(
        "--models",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder whose models may be used by path; may be repeated",
    )
    add_home(serve)


def add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`quantarena run`."""
    run = commands.add_parser("run", help="quantize and measure without a browser")
    run.add_argument(
        "--model", required=True, metavar="M", help="demo, a folder or a hub id@revision"
    )
    run.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="R",
        help="a preset's name or a pipeline such as 'gptq(bits=4,group=128)'; may be repeated",
    )
    run.add_argument(
        "--metrics", default=DEFAULT_METRICS, help=f"what to measure (default: {DEFAULT_METRICS})"
    )
    run.add_argument("--text", type=Path, metavar="FILE", help="measure on this text file")
    run.add_argument(
        "--window",
        type=int,
        default=0,
        metavar="N",
        help="tokens per window (default: the model's)",
    )
    run.add_argument(
        "--calibration", default="auto", metavar="NAME|FILE", help="text the methods see"
    )
    run.add_argument("--storage", choices=("simulated", "packed"), default="simulated")
    run.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 (default: the first free one)"
    )
    run.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="compute type",
    )
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--json", type=Path, metavar="FILE", help="write all runs as JSON")
    add_home(run)


def add_store_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`quantarena export`, `sql` and `rebuild`."""
    export = commands.add_parser("export", help="write every table as files")
    export.add_argument(
        "--format", choices=("csv", "parquet", "json"), default="csv", help="default: csv"
    )
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    add_home(export)
    sql = commands.add_parser("sql", help="one read-only query on the results")
    sql.add_argument("query", metavar="QUERY", help="for example: select * from runs")
    sql.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    add_home(sql)
    rebuild = commands.add_parser("rebuild", help="make the database again from the run folders")
    add_home(rebuild)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. 0: done, 1: something failed, 2: bad input, in one sentence on stderr."""
    args = parser().parse_args(arguments)
    commands = importlib.import_module("app.commands")
    try:
        return int(getattr(commands, args.command)(args))
    except (ValueError, OSError) as error:
        from backend.registry import one_sentence

        print(f"quantarena: {one_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "quantarena: interrupted; runs that were started go on from where they were",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
