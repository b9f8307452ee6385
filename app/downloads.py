"""Tables as files to take away."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from fastapi import Response
from fastapi.responses import JSONResponse

WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "csv": lambda frame, file: frame.to_csv(file, index=False),
    "parquet": lambda frame, file: frame.to_parquet(file, index=False),
    "json": lambda frame, file: frame.to_json(file, orient="records", date_format="iso", indent=1),
}


def table(frame: pd.DataFrame, name: str, kind: str) -> Response:
    """A frame as `quantarena-<name>.<kind>`."""
    return written(name, kind, lambda file: WRITERS[kind](frame, file))


def written(name: str, kind: str, write: Callable[[Path], Any]) -> Response:
    """What `write` puts into a file, as a download."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.{kind}"
        write(file)
        disposition = f'attachment; filename="quantarena-{name}.{kind}"'
        return Response(
            file.read_bytes(),
            media_type="application/octet-stream",
            headers={"Content-Disposition": disposition},
        )


def unknown(kind: str) -> JSONResponse:
    """There is no such format."""
    text = f"there is no format {kind!r}; there are {', '.join(WRITERS)}"
    return JSONResponse({"error": text}, status_code=404)
