"""The bundled model `demo`: where its weights, texts and tasks lie. Importing this is cheap."""

from pathlib import Path
from typing import Literal


def model_folder() -> Path:
    """Folder with config, weights (safetensors) and tokenizer, as from_pretrained reads it."""
    return Path(__file__).parent / "model"


def tasks_folder() -> Path:
    """Folder with one `<skill>.jsonl` of {"prompt", "answer"} lines per closed skill."""
    return Path(__file__).parent / "tasks"


def text(name: Literal["heldout", "calibration"]) -> str:
    """The held-out text (perplexity) or the calibration text, as one string."""
    return (Path(__file__).parent / "text" / f"{name}.txt").read_text(encoding="utf-8")
