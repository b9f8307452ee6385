"""Texts and token windows for calibration and evaluation. Importing this needs no torch."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import demo

if TYPE_CHECKING:
    from torch import Tensor

    from backend.spec import Calibration

C4_WINDOWS = 256  # of the C4 evaluation set, drawn with seed 0 (GPTQ's datautils)
CALIBRATION_OF = {"demo": "demo-train", "wikitext2": "wikitext2-train", "c4": "c4-train"}
PINNED_FILE = re.compile(r"^file:(?P<path>.*?)(?:#(?P<digest>[0-9a-f]{12}))?$", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One file of a data set on the hub."""

    repo: str
    path: str
    joiner: str  # between documents, where they make one text


SOURCES = {
    "wikitext2": Source(
        "Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", "\n\n"
    ),
    "wikitext2-train": Source(
        "Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet", "\n\n"
    ),
    "c4": Source("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", " "),
    "c4-train": Source("allenai/c4", "en/c4-train.00000-of-01024.json.gz", " "),
}


def text_of(dataset: str) -> str:
    """A data set's name or "file:/path" -> its text. A "#digest" after the path is checked."""
    if dataset == "demo":
        return demo.text("heldout")
    if dataset == "demo-train":
        return demo.text("calibration")
    if dataset.startswith("file:"):
        return file_text(dataset)
    source = source_of(dataset)
    documents = documents_of(dataset)
    if drawn(dataset):
        documents = islice(documents, 1100)  # the "c4-new" convention: one text of 1100 documents
    return source.joiner.join(documents)


def drawn(dataset: str) -> bool:
    """True for collections of documents, from which windows are drawn at random (C4)."""
    return dataset in ("c4", "c4-train")


def file_text(dataset: str) -> str:
    """Text of "file:/path" or "file:/path#digest" in UTF-8."""
    match = PINNED_FILE.match(dataset)
    assert match is not None
    path = Path(match["path"])
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the text {path} is not UTF-8 (byte {error.start})") from None
    if match["digest"] and match["digest"] != sha256(content).hexdigest()[:12]:
        raise ValueError(
            f"the text {path} has changed since the run was submitted; submit it again"
        )
    if not text.strip():
        raise ValueError(f"the text {path} is empty")
    return text


def text_digest(dataset: str) -> str:
    """12 hex digits that name the content of a data set."""
    if dataset in SOURCES:
        return sha256(repr(SOURCES[dataset]).encode()).hexdigest()[:12]
    return sha256(text_of(dataset).encode()).hexdigest()[:12]


def source_of(dataset: str) -> Source:
    """The hub file of a named data set, or ValueError with the names there are."""
    if dataset not in SOURCES:
        known = ", ".join(["demo", "demo-train", *SOURCES])
        raise ValueError(f"unknown text {dataset!r}; there are {known}, or a file")
    return SOURCES[dataset]


def cached(dataset: str) -> bool:
    """True if the data set can be read without the network."""
    if dataset not in SOURCES:
        return True
    from huggingface_hub import try_to_load_from_cache

    source = SOURCES[dataset]
    found = try_to_load_from_cache(source.repo, source.path, repo_type="dataset")
    return isinstance(found, str)


def fetch(dataset: str) -> Path:
    """The data set's file: from the local cache, else downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    source = source_of(dataset)
    try:
        return Path(hf_hub_download(source.repo, source.path, repo_type="dataset"))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        raise ValueError(
            f"{dataset} is not in the local Hugging Face cache and the hub cannot be reached; "
            "use 'demo' or a text file"
        ) from None


def documents_of(dataset: str) -> Iterator[str]:
    """The documents of a hub data set, in file order."""
    path = fetch(dataset)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text tokenized once as one string; BOS only as the tokenizer adds it itself."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def windows(tokenizer: Any, dataset: str, length: int, limit: int | None = None) -> Tensor:
    """[n, length] int64: non-overlapping windows of one text, the tail dropped (GPTQ's protocol).

    C4 is a collection of documents: 256 windows at random places of random documents, seed 0.
    """
    import torch

    if drawn(dataset):
        return draw(tokenizer, dataset, limit or C4_WINDOWS, length, seed=0)
    ids = tokens_of(tokenizer, text_of(dataset))
    count = len(ids) // length
    if not count:
        raise ValueError(too_short(dataset, len(ids), length))
    count = min(count, limit or count)
    return torch.tensor(ids[: count * length]).view(count, length)


def too_short(dataset: str, tokens: int, length: int) -> str:
    """The sentence for a text without one whole window."""
    name = PINNED_FILE.sub(r"\g<path>", dataset)
    return (
        f"the text {name} has {tokens} tokens, fewer than one window of {length}; "
        "use a longer text or a shorter window"
    )


def draw(tokenizer: Any, dataset: str, samples: int, length: int, seed: int) -> Tensor:
    """[samples, length]: random windows of random documents longer than `length` tokens.

    Same order of random calls as GPTQ's `get_c4`: documents until one is long enough, then a place.
    """
    import torch

    rng = random.Random(seed)
    documents = documents_tuple(dataset)
    rows: list[list[int]] = []
    tries = 0
    while len(rows) < samples:
        ids = tokens_of(tokenizer, documents[rng.randint(0, len(documents) - 1)])
        tries += 1
        if len(ids) > length:
            start = rng.randint(0, len(ids) - length - 1)
            rows.append(ids[start : start + length])
        elif tries > 10_000 * (len(rows) + 1):
            raise ValueError(f"{dataset} has no documents longer than {length} tokens")
    return torch.tensor(rows)


@lru_cache(maxsize=1)
def documents_tuple(dataset: str) -> tuple[str, ...]:
    """All documents of a data set in memory."""
    return tuple(documents_of(dataset))


def calibration(tokenizer: Any, settings: Calibration) -> tuple[Tensor, list[str]]:
    """Settings -> ids [n, L] and notes on what differs from what was asked.

    One text: its non-overlapping windows in random order. C4: drawn documents.
    """
    import torch

    dataset = calibration_dataset(settings.dataset, tokenizer_is_demo(tokenizer))
    if drawn(dataset):
        ids = draw(tokenizer, dataset, settings.samples, settings.length, settings.seed)
        return ids, []
    every = windows(tokenizer, dataset, settings.length)  # [n, L]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(settings.seed))
    ids = every[order[: settings.samples]]
    notes = []
    if len(ids) < settings.samples:
        name = PINNED_FILE.sub(r"\g<path>", dataset)
        notes.append(
            f"calibrated on {len(ids)} sequences of {settings.length} tokens, not "
            f"{settings.samples}: {name} has no more"
        )
    if dataset == "demo-train" and not tokenizer_is_demo(tokenizer):
        notes.append("calibrated on the bundled text, because C4 is not in the local cache")
    return ids, notes


def tokenizer_is_demo(tokenizer: Any) -> bool:
    """True for the bundled model's own tokenizer."""
    name = str(getattr(tokenizer, "name_or_path", ""))
    return bool(name) and Path(name) == demo.model_folder()


def calibration_dataset(dataset: str, is_demo: bool) -> str:
    """A name or auto -> the text to calibrate on: never the evaluation split of a data set."""
    if dataset == "auto":
        return "c4-train" if not is_demo and cached("c4-train") else "demo-train"
    return CALIBRATION_OF.get(dataset, dataset)


def evaluation_dataset(dataset: str, is_demo: bool) -> str:
    """A name stays; auto is WikiText-2 where it is cached, else the bundled held-out text."""
    if dataset != "auto":
        return dataset
    return "wikitext2" if not is_demo and cached("wikitext2") else "demo"


def data_hash(ids: Tensor) -> str:
    """12 hex digits over token ids and their shape."""
    digest = sha256(json.dumps(list(ids.shape)).encode())
    digest.update(ids.cpu().long().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
