"""C beside a kernel, compiled for this machine's CPU when first needed: under a second, no cache.

Only an addition: without a compiler, or on a CPU that the source refuses, `library` is None and
the kernel takes PyTorch's operations.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

# Partial redundancy elimination would keep sums twice, and then in memory.
COMPILE = (
    *("cc", "-O3", "-march=native", "-ffp-contract=fast", "-fno-strict-aliasing"),
    *("-fno-tree-pre", "-fopenmp", "-shared", "-fPIC"),
)
SECONDS = 60


@lru_cache(maxsize=32)
def library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """The functions of a C file, None where it cannot be compiled or loaded.

    On Linux, OpenMP is the one that PyTorch has loaded, hence one pool of threads.
    """
    if not sys.platform.startswith("linux"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "library.so"  # once loaded, the file itself is not needed
        try:
            command = [*COMPILE, *flags, "-o", str(built), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            return ctypes.CDLL(str(built))
        except (OSError, subprocess.SubprocessError):
            return None  # the kernel says which path it takes
