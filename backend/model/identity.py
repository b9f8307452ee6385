"""Which model a name means: its folder, its facts from the headers alone, and resolved specs.

The server uses this: no weights are read and no model class is imported.
"""

from __future__ import annotations

import json
import math
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import data, demo
from backend.registry import short_hash

if TYPE_CHECKING:
    from backend.spec import Calibration, ModelRef, RunSpec

DEMOS = ("demo", "demo-outliers")
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # never pickles, never code
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library
HUB_ID = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")
WINDOW = 2048  # tokens of an evaluation window, where the model's context allows


class ModelError(ValueError):
    """A model that cannot be used, in one sentence."""


@dataclass(frozen=True)
class Tensors:
    """What the headers of a folder's safetensors files say: shapes and bytes by name."""

    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, int]


@dataclass(frozen=True)
class ModelFacts:
    """A model without its weights."""

    id: str
    folder: Path
    content: str  # 12 hex digits over its files
    parameters: int
    linear_parameters: int  # in the decoder blocks' matrices
    weight_bytes: int  # of the files' tensors
    context: int  # tokens
    blocks: int
    layer_bytes: int  # of the largest block's tensors
    config: dict[str, Any] = field(repr=False)


def find_model(ref: ModelRef) -> ModelFacts:
    """Name -> facts. Anything that cannot be quantized is refused in one sentence."""
    from backend.model.families import family_of

    folder = folder_of(ref)
    config = read_config(folder)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "another tool")
        raise ModelError(f"{ref.id} is already quantized ({method}); give the 16-bit model")
    try:
        family = family_of(config)
    except ValueError as error:
        raise ModelError(f"{ref.id}: {error}") from None
    check_tokenizer(folder)
    tensors = read_headers(folder)
    in_block = block_tensors(tensors, family.layers)
    content = digest_of(folder)
    return ModelFacts(
        id=canonical_id(ref, folder),
        folder=folder,
        content=short_hash([content, "outliers"]) if ref.id == "demo-outliers" else content,
        parameters=sum(map(math.prod, tensors.shapes.values())),
        linear_parameters=sum(
            math.prod(tensors.shapes[name])
            for names in in_block.values()
            for name in names
            if len(tensors.shapes[name]) == 2
        ),
        weight_bytes=sum(tensors.sizes.values()),
        context=int(config.get("max_position_embeddings") or WINDOW),
        blocks=len(in_block),
        layer_bytes=max(sum(tensors.sizes[n] for n in names) for names in in_block.values()),
        config=config,
    )


def canonical_id(ref: ModelRef, folder: Path) -> str:
    """The id as it is stored: local folders by their absolute path."""
    if ref.id in DEMOS or not looks_local(ref.id):
        return ref.id.partition("@")[0]
    return str(folder.resolve())


def looks_local(name: str) -> bool:
    """True if the name means a folder of this machine rather than a hub id."""
    return (
        name.startswith(("/", ".", "~")) or Path(name).is_dir() or not HUB_ID.match(hub_name(name))
    )


def hub_name(name: str) -> str:
    """`org/name@revision` without its revision."""
    return name.partition("@")[0]


def folder_of(ref: ModelRef) -> Path:
    """Name -> folder; a hub id from the local cache, else downloaded."""
    if ref.id in DEMOS:
        folder = demo.model_folder()
        if not folder.is_dir():
            raise ModelError("the bundled model is missing; run `make demo-model` to train it")
        return folder
    if not looks_local(ref.id):
        return hub_folder(hub_name(ref.id), ref.revision or ref.id.partition("@")[2])
    folder = Path(ref.id).expanduser()
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}")
    return folder.resolve()


def hub_folder(name: str, revision: str) -> Path:
    """Snapshot folder of a hub model; the network is asked only if the cache lacks it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    what = f"{name}@{revision}" if revision else name
    wanted: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(WANTED)}
    folder = None
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **wanted))
        if any(folder.glob("*.safetensors")) and not missing_shards(folder):
            return folder
    except LocalEntryNotFoundError:
        pass  # not cached: ask the hub below
    try:
        return Path(snapshot_download(name, ignore_patterns=["*/*"], **wanted))
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise ModelError(
            f"the hub answers {status} for {what}; check the name and revision, or log in if the "
            "model is gated"
        ) from None
    except OSError:
        if folder is not None:
            return folder  # cached in part: what it lacks is said by whoever reads it
        raise ModelError(
            f"{what} is not in the local Hugging Face cache and the hub cannot be reached; "
            "use 'demo', a local folder, or go online once to download it"
        ) from None


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the index names and the folder lacks."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    names = set(read_json(index).get("weight_map", {}).values())
    return sorted(name for name in names if not (folder / name).is_file())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    return read_json(path)


def check_tokenizer(folder: Path) -> None:
    """ModelError if the folder has no tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer (one of {', '.join(TOKENIZER_FILES)})")


def read_headers(folder: Path) -> Tensors:
    """Shapes and sizes of every tensor, from the headers of the safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if any(p for pattern in PICKLES for p in folder.glob(pattern)):
            raise ModelError(
                f"{folder} holds its weights as pickle files, which can run code when opened; "
                "convert them to safetensors"
            )
        raise ModelError(f"{folder} has no *.safetensors weights")
    if gone := missing_shards(folder):
        raise ModelError(f"{folder} lacks {', '.join(gone)}, which its index names")
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    for path in files:
        for name, entry in read_header(path).items():
            shapes[name] = tuple(entry["shape"])
            sizes[name] = entry["data_offsets"][1] - entry["data_offsets"][0]
    return Tensors(shapes, sizes)


def read_header(path: Path) -> dict[str, Any]:
    """Header of one safetensors file, checked against the file's size."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from None
    if end + length + 8 != size:
        raise ModelError(
            f"{path} is not a whole safetensors file: its header describes {end + length + 8:,} "
            f"bytes, it has {size:,}"
        )
    return header


def block_tensors(tensors: Tensors, layers: str) -> dict[int, list[str]]:
    """{block: names of its tensors}; files may leave out the leading part of the path."""
    pattern = re.compile(rf"(?:^|\.){re.escape(layers.rpartition('.')[2])}\.(\d+)\.")
    found: dict[int, list[str]] = {}
    for name in tensors.shapes:
        if match := pattern.search(name):
            found.setdefault(int(match.group(1)), []).append(name)
    if not found:
        raise ModelError(f"the weights hold no tensor under {layers}.0, so there is no block")
    return found


def digest_of(folder: Path) -> str:
    """12 hex digits over names and contents of the files that make the model."""
    files = sorted({p for pattern in WANTED for p in folder.glob(pattern) if p.is_file()})
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        digests = list(pool.map(content_of, files))
    return short_hash([[path.name, digest] for path, digest in zip(files, digests, strict=True)])


def content_of(path: Path) -> str:
    """Digest of one file; the hub's cache already names its files by theirs."""
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs":
        return real.name
    stat = real.stat()
    return hashed(str(real), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def hashed(path: str, size: int, mtime_ns: int) -> str:
    """sha256 of a file's content; size and time are the key of the cache."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def resolve(spec: RunSpec) -> RunSpec:
    """Fill in what "auto" means here and now, and the hashes of the model's and data's content."""
    facts = find_model(spec.model)
    is_demo = spec.model.id in DEMOS
    revision = "" if is_demo or looks_local(spec.model.id) else spec.model.revision
    revision = revision or spec.model.id.partition("@")[2] * (not looks_local(spec.model.id))
    model = spec.model.model_copy(
        update={"id": facts.id, "revision": revision, "content": facts.content}
    )
    update: dict[str, Any] = {
        "model": model,
        "metrics": tuple(resolve_metric(metric, facts, is_demo) for metric in spec.metrics),
    }
    if spec.needs_calibration():
        update["calibration"] = resolve_calibration(spec.calibration, facts, is_demo)
    return spec.model_copy(update=update)


def resolve_calibration(asked: Calibration, facts: ModelFacts, is_demo: bool) -> Calibration:
    """Dataset named and hashed, length within the context, samples within the text."""
    dataset = pinned(data.calibration_dataset(asked.dataset, is_demo))
    length = min(asked.length, facts.context)
    samples = asked.samples
    tokens = count_tokens(facts, dataset)
    if tokens is not None:
        if tokens < length:
            raise ValueError(f"calibration: {data.too_short(dataset, tokens, length)}")
        samples = min(samples, tokens // length)
    return asked.model_copy(
        update={
            "dataset": dataset,
            "length": length,
            "samples": samples,
            "content": data.text_digest(dataset),
        }
    )


def resolve_metric(metric: Any, facts: ModelFacts, is_demo: bool) -> Any:
    """A metric over text with its data set named and its window concrete."""
    fields = type(metric).model_fields
    update: dict[str, Any] = {}
    if "dataset" in fields:
        update["dataset"] = pinned(data.evaluation_dataset(metric.dataset, is_demo))
    if "window" in fields and "dataset" in fields:
        window = metric.window or min(WINDOW, facts.context)
        if window > facts.context:
            raise ValueError(
                f"{metric.kind}: window {window} is longer than the {facts.context} tokens of "
                f"{facts.id}"
            )
        tokens = count_tokens(facts, update["dataset"])
        if tokens is not None and tokens < window:
            raise ValueError(f"{metric.kind}: {data.too_short(update['dataset'], tokens, window)}")
        update["window"] = window
    return metric.model_copy(update=update) if update else metric


def pinned(dataset: str) -> str:
    """A path -> "file:/absolute/path#digest"; names and pinned files stay."""
    known = dataset in data.SOURCES or dataset in ("demo", "demo-train")
    path = dataset.removeprefix("file:")
    if known or ("#" in dataset and data.PINNED_FILE.match(dataset)["digest"]):  # type: ignore[index]
        return dataset
    if not re.search(r"[/.\\]", path) and not Path(path).is_file():
        data.source_of(dataset)  # a bare word that names nothing: raises with the names there are
    absolute = f"file:{Path(path).expanduser().resolve()}"
    return f"{absolute}#{data.text_digest(absolute)}"


def count_tokens(facts: ModelFacts, dataset: str) -> int | None:
    """Tokens of a text under the model's tokenizer; None where only the worker can tell."""
    if data.drawn(dataset) or not (facts.folder / "tokenizer.json").is_file():
        return None
    return counted(str(facts.folder / "tokenizer.json"), facts.content, dataset)


@lru_cache(maxsize=256)
def counted(tokenizer_file: str, content: str, dataset: str) -> int:
    """Length of a text in tokens; `content` keys the cache to the model's files."""
    from tokenizers import Tokenizer

    return len(Tokenizer.from_file(tokenizer_file).encode(data.text_of(dataset)).ids)
