"""What went wrong in a run, as one sentence, and what to do next."""

from __future__ import annotations

import errno
import signal
import traceback
from typing import Any

AGAIN = "retry continues after the last finished block"


def explain(error: Exception, stage: str) -> dict[str, Any]:
    """An exception of a stage -> {type, message, todo, traceback, bad_input}."""
    message, todo = sentences(error, stage)
    ours = out_of_memory(error) or disk_full(error)  # may come wrapped in a complaint about files
    trace = "".join(traceback.format_exception(error))
    return {
        "type": type(error).__name__,
        "message": message,
        "todo": todo,
        "traceback": trace,
        "bad_input": isinstance(error, ValueError) and not ours,  # what was asked cannot work
    }


def sentences(error: Exception, stage: str) -> tuple[str, str]:
    """(what happened, what to do next)."""
    text = " ".join(str(error).split())
    if out_of_memory(error):
        return (
            f"Out of memory while the stage '{stage}' ran" + (f": {text[:200]}" if text else "."),
            "Use fewer or shorter calibration samples, a smaller model or a device "
            f"with more, and submit again; if another program held the memory, {AGAIN}.",
        )
    if disk_full(error):
        return (
            f"The disk is full: the stage '{stage}' could not write its results.",
            f"Free some disk space; then {AGAIN}.",
        )
    if isinstance(error, ValueError) and text:
        return text, "Change what the sentence names and submit again."
    return (
        f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__,
        f"The traceback and log.txt show where; {AGAIN}.",
    )


def out_of_memory(error: BaseException) -> bool:
    """True for Python's, PyTorch's CPU and PyTorch's CUDA report of it."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
        or "CUDA out of memory" in text
    )


def disk_full(error: BaseException) -> bool:
    """True for the system's report of it, also inside another library's exception."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)


def death(stage: str, exit: int | None, times: int, where: str) -> dict[str, str]:
    """The error of a run whose worker died `times` times in one stage."""
    message = f"The worker died {times} times in the stage '{stage}' ({manner(exit)})."
    todo = f"{where} has its last words; then {AGAIN}."
    if exit == -signal.SIGKILL:
        todo = "The system kills the largest process when memory runs out: free some. " + todo
    return {"type": "WorkerDied", "message": message, "todo": todo, "traceback": ""}


def manner(exit: int | None) -> str:
    """How a process ended: exit status, or minus the signal's number, or None if nobody saw."""
    if exit is None:
        return "nobody saw how"
    if exit < 0:
        return f"by {signal.Signals(-exit).name}"
    return f"exit status {exit}"
