"""The command line: `quantarena COMMAND`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from app import judge_command

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
    add_mine(commands)
    add_home(judge_command.add(commands))
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
    bench.add_argument(
        "--shapes",
        default="quick",
        metavar="S",
        help="of the weights: quick, llama, published, or n x k such as 4096x4096,14336x4096",
    )
    bench.add_argument("--rows", default="", metavar="M", help="tokens at once (default: 1,8,64)")
    bench.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 (default: the first free one)"
    )
    add_home(bench)
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
    serve.add_argument(
        "--limits",
        default="",
        metavar="TEXT",
        help="of voters, such as votes=60/min+600/hour,address_votes=none (default: generous on "
        "this machine, strict on another host)",
    )
    serve.add_argument(
        "--chat-memory",
        type=float,
        metavar="GIB",
        help="memory of all chat processes (default: half of what is free at the start)",
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
        help="a preset's name or a pipeline such as 'gptq(bits=4,group=128)', several at once as "
        "'rtn(bits=2|3|4,group=64)'; may be repeated",
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
    for name, what in (
        ("samples", "sequences the methods see"),
        ("length", "tokens of each of them"),
        ("seed", "which of the text's places they start at"),
    ):
        run.add_argument(f"--calibration-{name}", type=int, metavar="N", help=what)
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


def add_mine(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`quantarena mine`."""
    mine = commands.add_parser("mine", help="find the prompts that tell a model's variants apart")
    mine.add_argument(
        "--model", required=True, metavar="M", help="demo, a folder or a hub id@revision"
    )
    mine.add_argument(
        "--runs", nargs="+", default=[], metavar="ID", help="finished runs (default: all of M)"
    )
    mine.add_argument(
        "--prompts", nargs="+", default=[], metavar="ID", help="prompts (default: the whole pool)"
    )
    mine.add_argument(
        "--max-new", type=int, default=256, metavar="N", help="tokens of an answer (default: 256)"
    )
    mine.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest"
    )
    mine.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 (default: the first free one)"
    )
    mine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="that of the runs",
    )
    mine.add_argument("--seed", type=int, default=0)
    mine.add_argument("--json", type=Path, metavar="FILE", help="write one entry per variant")
    add_home(mine)


def add_store_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`quantarena export`, `sql`, `rebuild` and what is done with votes."""
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
    rebuild = commands.add_parser(
        "rebuild", help="make the database again from the run folders and the vote log"
    )
    add_home(rebuild)
    add_vote_commands(commands)


def add_vote_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`quantarena check-votes`, `import-votes` and `export-votes`."""
    check = commands.add_parser("check-votes", help="check that no vote was changed or removed")
    check.add_argument(
        "--expect",
        default="",
        metavar="HASH",
        help="a last hash printed earlier: 1 if no entry has it, which means that some are gone",
    )
    add_home(check)
    kinds = ".csv, .parquet, .json or .jsonl"
    add = commands.add_parser("import-votes", help="add battles from a file to the votes")
    add.add_argument("file", type=Path, metavar="FILE", help=f"{kinds}, in the field's columns")
    add_home(add)
    write = commands.add_parser("export-votes", help="write the votes that count as battles")
    write.add_argument("file", type=Path, metavar="FILE", help=f"{kinds}, in the field's columns")
    write.add_argument(
        "--kind",
        action="append",
        choices=("human", "judge", "auto", "import"),
        help="whose votes; may be repeated (default: human and import)",
    )
    add_home(write)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. 0: done, 1: something failed, 2: bad input, in one sentence on stderr."""
    args = parser().parse_args(arguments)
    commands = importlib.import_module("app.commands")
    try:
        return int(getattr(commands, args.command.replace("-", "_"))(args))
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
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
