"""Do one stage of a run: quantize, evaluate, or one metric alone. The entry point of workers."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend import data, kv_statistics, truth
from backend.baseline import StoredBaseline, check_disk, fits, locked, trace_folder
from backend.environment import environment
from backend.metrics import Measurement, Metric
from backend.metrics.text import TextMetric
from backend.model import loading
from backend.model.checkpoint import Checkpoint
from backend.model.identity import find_model, resolve
from backend.pipeline import SAMPLE_TOKENS, Cancelled, quantize
from backend.registry import short_hash
from backend.run import Run, compute_dtype
from backend.spec import Calibration, RunSpec

BLOCKS, ITEMS, EVENTS, SPEC = "blocks", "items", "events.jsonl", "spec.json"
STATISTICS = "statistics"  # of weights and inputs, a file per block (backend/statistics.py)
Emit = Callable[..., None]


def execute(
    spec: RunSpec,
    stage: str,
    folder: Path,
    *,
    device: str,
    home: Path,
    emit: Emit,
    should_stop: Callable[[], bool],
) -> None:
    """One stage of the run in `folder`. Raises Cancelled; any other exception is a failure."""
    if stage not in spec.stages():
        raise ValueError(f"this run has no stage {stage!r}; it has {', '.join(spec.stages())}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = spec if spec.model.content else resolve(spec)
    # GPTQ on one thread and on two differs in the fourth digit: sums are taken in another order.
    emit("env", env={**environment(), "threads": torch.get_num_threads()})
    work = Stage(spec, stage, folder, device, home, emit, should_stop)
    if loading.is_rounded(spec.model, find_model(spec.model)):
        work.note(None, "", "the checkpoint has 32-bit weights; they are rounded to bfloat16 first")
    if stage == "quantize":
        work.quantize()
    else:
        work.measure()


@dataclass(frozen=True)
class Stage:
    """One stage and whom it reports to."""

    spec: RunSpec
    stage: str
    folder: Path
    device: str
    home: Path
    emit: Emit
    should_stop: Callable[[], bool]

    # -- quantize --------------------------------------------------------------------------------

    def quantize(self) -> None:
        """Walk the blocks, or take them from a finished run of the same artifact."""
        facts = find_model(self.spec.model)
        donor = donor_of(self.spec.artifact_id(), self.folder, self.home, facts.blocks)
        if donor is not None:
            self.adopt(donor, facts.blocks)
            return
        # Codes are chosen in the simulated dtype whatever the storage, so both have the same ones.
        dtype = compute_dtype(self.spec, self.device, "simulated")
        model, tokenizer = loading.load(self.spec.model, "cpu", dtype)
        quantize(
            model,
            self.spec.steps,
            self.calibration(tokenizer, facts.context),
            Checkpoint(self.folder / BLOCKS),
            device=self.device,
            seed=self.spec.seed,
            note=self.note,
            measure=lambda measured: self.report(measured, Source.of_walk(self.spec, dtype)),
            progress=self.walked,
            should_stop=self.should_stop,
            statistics=self.folder / STATISTICS,
        )

    def calibration(self, tokenizer: Any, context: int) -> torch.Tensor:
        """ids [n, L] for the steps; bundled text for layer errors where none looks at inputs."""
        settings = self.spec.calibration
        if not self.spec.needs_calibration():
            settings = Calibration(dataset="demo", samples=1, length=min(SAMPLE_TOKENS, context))
        ids, notes = data.calibration(tokenizer, settings)
        for text in notes if self.spec.needs_calibration() else ():
            self.note(None, "", text)
        return ids

    def adopt(self, donor: Path, blocks: int) -> None:
        """Blocks, notes and per-layer errors of another run's folder, as if made here."""
        target = self.folder / BLOCKS
        target.mkdir(parents=True, exist_ok=True)
        for index in range(blocks):
            link(Checkpoint(donor / BLOCKS).path(index), Checkpoint(target).path(index))
        for kept in sorted((donor / STATISTICS).glob("*.safetensors")):
            (self.folder / STATISTICS).mkdir(exist_ok=True)
            link(kept, self.folder / STATISTICS / kept.name)
        for event in quantize_events(donor):
            kind = event.pop("type")
            event.pop("t", None)
            self.emit(kind, **event)
        self.walked(blocks, blocks, "", 1.0)

    def walked(self, block: int, blocks: int, item: str, fraction: float) -> None:
        """Progress of the block walk."""
        self.emit(
            "progress", stage=self.stage, block=block, blocks=blocks, item=item, fraction=fraction
        )

    # -- measure ---------------------------------------------------------------------------------

    def measure(self) -> None:
        """Every metric of the stage; first those whose forward passes the others can share."""
        metrics = sorted(self.spec.metrics_of(self.stage), key=lambda m: not m.needs_baseline)
        # The 16-bit model counts as packed, but its quality is compared with simulated runs.
        plain = self.spec.is_baseline and self.stage == "evaluate"
        dtype = compute_dtype(self.spec, self.device, "simulated" if plain else self.spec.storage)
        side_by_side = self.both_fit(dtype)
        if not side_by_side:
            self.store_baseline(metrics, dtype)
        twin = self.twin(dtype)
        run = self.open(self.spec, dtype, side_by_side=side_by_side)
        if twin is not None:
            self.check_kernels(twin, run)
        for at, metric in enumerate(metrics):
            run.on_progress = self.progress_of(metric, at, len(metrics))
            run.caches.start_count()
            self.warn(metric)
            source = Source.of_metric(metric, run)
            for measured in metric.measure(run):
                self.report(with_cache(measured, run), source)
        if self.stage == "evaluate" and (run.caches.rounds or self.spec.is_baseline):
            kv_statistics.record(run, self.folder)
        self.progress_of(metrics[-1], len(metrics) - 1, len(metrics))(1, 1, "")

    def twin(self, dtype: torch.dtype) -> truth.Twin | None:
        """What the simulated model says, in the first stage that opens packed weights."""
        stages = [stage for stage in self.spec.stages() if stage != "quantize"]
        weights = self.spec.walks and "weights" in self.spec.targets()
        if self.spec.storage != "packed" or not weights or self.stage != stages[0]:
            return None
        simulated = self.spec.model_copy(update={"storage": "simulated", "metrics": ()})
        return truth.Twin(self.open(simulated, dtype))

    def check_kernels(self, twin: truth.Twin, run: Run) -> None:
        """Report how far the packed model is from its twin; a fault is a note, too."""
        measured = twin.measure(run)
        self.report(measured, Source.of_gate(run, twin.ids))
        if said := truth.fault(measured):
            self.note(None, "", said)

    def open(self, spec: RunSpec, dtype: torch.dtype, *, side_by_side: bool = True) -> Run:
        """The run's model on the device."""
        return Run.open(
            spec,
            device=self.device,
            home=self.home,
            blocks=self.folder / BLOCKS,
            dtype=dtype,
            side_by_side=side_by_side,
            on_note=lambda text: self.note(None, "", text),
            should_stop=self.should_stop,
        )

    def progress_of(self, metric: Metric, at: int, count: int) -> Callable[[int, int, str], None]:
        """Progress of one metric as a share of the stage."""

        def progress(done: int, total: int, item: str) -> None:
            text = f"{metric.kind}: {item}" if item else metric.kind
            fraction = (at + done / max(total, 1)) / count
            self.emit(
                "progress", stage=self.stage, block=None, blocks=None, item=text, fraction=fraction
            )

        return progress

    def warn(self, metric: Metric) -> None:
        """A note where the metric's text is the one the steps were calibrated on."""
        seen = self.spec.calibration.content if self.spec.needs_calibration() else ""
        if seen and isinstance(metric, TextMetric) and data.text_digest(metric.dataset) == seen:
            self.note(None, "", f"{metric.kind}: calibrated on the text that it is measured on")

    def both_fit(self, dtype: torch.dtype) -> bool:
        """True if the 16-bit model fits on the device beside the quantized one."""
        weight_bytes = find_model(self.spec.model).parameters * dtype.itemsize
        return self.spec.is_baseline or fits(weight_bytes, 2, self.device)

    def store_baseline(self, metrics: Sequence[Metric], dtype: torch.dtype) -> None:
        """Write the 16-bit model's predictions on the texts of the metrics that need them."""
        wanted = [m for m in metrics if m.needs_baseline and isinstance(m, TextMetric)]
        if not wanted:
            return
        name = str(dtype).removeprefix("torch.")
        folder = trace_folder(self.home, self.spec.model.content, self.device, name)
        with locked(folder, self.check):
            plain = self.open(self.spec.baseline(), dtype)
            for metric in wanted:
                plain.on_progress = self.progress_of(metric, 0, 2)
                write_missing(plain, metric, StoredBaseline(folder, plain.hash))

    def check(self) -> None:
        """While waiting for another worker: stop when told to."""
        self.emit(
            "progress",
            stage=self.stage,
            block=None,
            blocks=None,
            item="waiting for the 16-bit predictions another run writes",
            fraction=0.0,
        )
        if self.should_stop():
            raise Cancelled

    # -- reporting -------------------------------------------------------------------------------

    def note(self, block: int | None, module: str, text: str) -> None:
        """A fallback, a skip or another thing to know about the result."""
        self.emit("note", block=block, module=module, text=text)

    def report(self, measured: Measurement, source: Source) -> None:
        """One measurement, its items in a file of their own."""
        self.emit(
            "measurement",
            **source.fields,
            name=measured.name,
            value=plain(measured.value),
            unit=measured.unit,
            better=measured.better,
            n=measured.n,
            stderr=plain(measured.stderr),
            layer=None if measured.layer is None else list(measured.layer),
            detail=plain(dict(measured.detail)),
            device=self.device_name(),
            storage=self.spec.storage,
            items_file=self.write_items(measured, source),
        )

    def device_name(self) -> str:
        """cpu, or the GPU's own name: times of two cards are not alike."""
        if self.device.startswith("cuda"):
            return torch.cuda.get_device_name(torch.device(self.device))
        return self.device

    def write_items(self, measured: Measurement, source: Source) -> str | None:
        """items/<metric_id>.<name>.csv, one number a line -> its path inside the folder."""
        if measured.items is None:
            return None
        safe = "".join(c if c.isalnum() or c in "_-,." else "." for c in measured.name)
        path = self.folder / ITEMS / f"{source.fields['metric_id']}.{safe}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text("".join(f"{float(item)!r}\n" for item in measured.items))
        part.replace(path)
        return f"{ITEMS}/{path.name}"


@dataclass(frozen=True)
class Source:
    """Where measurements come from: the fields that all of one metric share."""

    fields: Mapping[str, Any]

    @staticmethod
    def of_metric(metric: Metric, run: Run) -> Source:
        """A metric on its data."""
        hashed = metric.data_hash(run)
        return Source(
            {
                "metric_id": short_hash([metric.digest(), hashed]),
                "metric": metric.kind,
                "version": metric.version,
                "data": hashed,
                "dtype": run.dtype,
            }
        )

    @staticmethod
    def of_gate(run: Run, ids: Tensor) -> Source:
        """The packed model against its simulated twin."""
        hashed = run.hash(ids)
        return Source(
            {
                "metric_id": short_hash([truth.KIND, truth.VERSION, hashed]),
                "metric": truth.KIND,
                "version": truth.VERSION,
                "data": hashed,
                "dtype": run.dtype,
            }
        )

    @staticmethod
    def of_walk(spec: RunSpec, dtype: torch.dtype) -> Source:
        """The per-layer errors that the block walk measures."""
        return Source(
            {
                "metric_id": short_hash(["quantize", 1, spec.calibration.content]),
                "metric": "quantize",
                "version": 1,
                "data": spec.calibration.content,
                "dtype": str(dtype).removeprefix("torch."),
            }
        )


def with_cache(measured: Measurement, run: Run) -> Measurement:
    """With the share of cached keys and values that were rounded, unless it tells its own."""
    told = run.caches.told()
    if not told:
        return measured
    return replace(measured, detail={"cache_rounded": told, **measured.detail})


def write_missing(plain: Run, metric: TextMetric, stored: StoredBaseline) -> None:
    """The log-probabilities of the metric's windows that are not on disk yet."""
    ids = stored.missing(metric.windows(plain))
    check_disk(stored.folder, len(ids), ids.shape[1], plain.vocabulary)
    size = plain.batch_size(ids.shape[1])
    for start in range(0, len(ids), size):
        plain.progress(start, len(ids), f"16-bit predictions of window {start + 1} of {len(ids)}")
        batch = ids[start : start + size]
        stored.write(batch, plain.logits(batch).float().log_softmax(-1))


def donor_of(artifact: str, folder: Path, home: Path, blocks: int) -> Path | None:
    """The folder of another run that made the same artifact and still has all its blocks."""
    for spec in sorted((home / "runs").glob(f"*/{SPEC}")):
        other = spec.parent
        if other.resolve() == folder.resolve() or not (other / BLOCKS).is_dir():
            continue
        if made_by(spec) != artifact or not finished(other):
            continue
        saved = Checkpoint(other / BLOCKS)
        if all(saved.has(index) for index in range(blocks)):
            return other
    return None


def made_by(spec: Path) -> str:
    """artifact_id of a spec's file; "" where this version cannot read it."""
    try:
        return RunSpec.model_validate_json(spec.read_text(encoding="utf-8")).artifact_id()
    except (ValueError, OSError):
        return ""


def finished(folder: Path) -> bool:
    """True if the walk reported its end, so that all its notes were written before."""
    return any(ends_walk(event) for event in events(folder))


def ends_walk(event: Mapping[str, Any]) -> bool:
    """True for the last progress of a block walk."""
    walk = event["type"] == "progress" and event.get("stage") == "quantize"
    return bool(walk and event.get("blocks") and event.get("block") == event["blocks"])


def quantize_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Notes and per-layer measurements of a run's quantize stage."""
    for event in events(folder):
        if ends_walk(event):
            return
        layered = event["type"] == "measurement" and event.get("metric") == "quantize"
        if event["type"] == "note" or layered:
            yield event


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run's folder; a line that a dying writer tore is left out."""
    try:
        lines = (folder / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "type" in event:
            yield event


def link(source: Path, target: Path) -> None:
    """A second name for a finished file, or a copy where the disk cannot."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        part = target.with_suffix(".part")
        shutil.copyfile(source, part)
        part.replace(target)


def plain(value: Any) -> Any:
    """JSON data; non-finite numbers as "nan", "inf", "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return int(value) if number.is_integer() and not isinstance(value, float) else number
