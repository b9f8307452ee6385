"""`quantarena bench`: kernels as a job of this home, methods here; the last line is JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any


def bench(args: argparse.Namespace) -> int:
    """Check kernels, then time them and the methods that solve layers; 1 if a kernel is wrong."""
    import torch

    from backend.solver_times import time_methods

    timed, solved = split(args.names)
    rows = time_methods(solved)
    state = 0
    if timed:
        found, state = time_kernels(args, timed if args.names else ())
        rows += found
    threads = torch.get_num_threads()
    print(json.dumps({"threads": threads, "torch": torch.__version__, "rows": rows}))
    return state or int(any(not row.get("correct", True) for row in rows))


def split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names -> kernels and methods, all of both without names. ValueError for another."""
    from backend.kernel_times import known
    from backend.registry import nearest
    from backend.solver_times import SOLVERS

    kernels = known()
    every = [*kernels, *SOLVERS]
    for name in names:
        if name not in every:
            raise ValueError(f"unknown kernel or method {name!r}{nearest(name, every)}")
    chosen = names or list(dict.fromkeys(every))  # some names are of both
    return [n for n in chosen if n in kernels], [n for n in chosen if n in SOLVERS]


def time_kernels(
    args: argparse.Namespace, names: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """Queue the job and follow it -> (its rows, exit code); they stay in the home's results."""
    from app.commands import exit_code, print_notes, show_progress
    from backend.kernel_times import line, read_shapes
    from backend.spec import BenchSpec
    from jobs.home import home_folder
    from jobs.queue import Queue
    from jobs.results import kernel_times, report

    queue = Queue(home_folder(args.home))
    spec = BenchSpec(
        kernels=tuple(names), shapes=read_shapes(args.shapes), rows=whole_numbers(args.rows)
    )
    job = queue.submit(spec, device=args.device)
    show_progress(queue, [job])
    found = kernel_times(queue, job)
    for row in found:
        print(line(row))
    told = report(queue, job)
    print_notes(told)
    return found, exit_code(told)


def whole_numbers(text: str) -> tuple[int, ...]:
    """`1,8,64` -> the numbers; none without text."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--rows takes whole numbers such as 1,8,64, not {text!r}") from None
