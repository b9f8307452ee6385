"""Specs: everything that decides a number, one class for each kind of job."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from backend.dialogue import HOTTEST, LARGEST_SEED, LONGEST_ANSWER, Sampling
from backend.methods import LinearMethod, Method, MethodField
from backend.metrics import MetricField
from backend.registry import short_hash, tuples, versions

Storage = Literal["simulated", "packed"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Frozen(BaseModel):
    """Settings: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelRef(Frozen):
    """Which model. `content` is the hash of its files, filled in when a run is submitted."""

    id: str = Field(min_length=1, description="demo, demo-outliers, a local folder or a hub id.")
    revision: str = Field("", description="Branch, tag or commit of a hub id; empty is main.")
    dtype: Dtype = Field("auto", description="Compute type; auto follows the device.")
    content: str = ""


class Calibration(Frozen):
    """Which tokens the methods see."""

    dataset: str = Field("auto", description="demo, c4, wikitext2 or a text file; auto chooses.")
    samples: int = Field(128, ge=1, le=4096, description="Sequences shown to the methods.")
    length: int = Field(2048, ge=8, le=131072, description="Tokens of each sequence.")
    seed: int = Field(0, ge=0)
    content: str = ""


def ruled_versions(step: Method) -> list[list[Any]]:
    """[[kind, version], ...] of what a step becomes under its layer rules; [] without rules."""
    return [entry for variant in step.variants()[1:] for entry in versions(variant)]


class JobSpec(Frozen):
    """What every kind of job says of itself."""

    kind: str

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        return {k: tuples(v) for k, v in data.items()} if isinstance(data, dict) else data

    def artifact_id(self) -> str:
        """What the job makes: 12 hex over all that decides it, versions of the code included."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Jobs with one fingerprint give the same rows, so only one of them is done."""
        raise NotImplementedError

    def stages(self) -> list[str]:
        """Stages in order, a process each."""
        raise NotImplementedError

    def targets(self) -> list[str]:
        """What is quantized: weights, activations, kv_cache."""
        return []


class RunSpec(JobSpec):
    """One run: quantize a model by `steps`, then measure it. No steps is the 16-bit baseline."""

    kind: Literal["run"] = "run"
    model: ModelRef
    steps: tuple[MethodField, ...] = ()
    metrics: tuple[MetricField, ...] = ()
    calibration: Calibration = Calibration()
    storage: Storage = "simulated"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _packed_metrics_need_packed_storage(self) -> Self:
        for metric in self.metrics:
            if metric.storage == "packed" and self.steps and self.storage != "packed":
                raise ValueError(
                    f"{metric.kind} needs packed weights: a simulated model is slower and "
                    "larger than the real one by construction; use storage='packed' or leave "
                    "this metric out"
                )
        return self

    @model_validator(mode="after")
    def _one_weight_step_before_activations(self) -> Self:
        rounds = [isinstance(step, LinearMethod) for step in self.steps]
        if sum(rounds) > 1:
            kinds = ", ".join(s.kind for s, r in zip(self.steps, rounds, strict=True) if r)
            raise ValueError(f"{kinds}: weights can be rounded once; keep one weight step")
        before = self.steps[: rounds.index(True)] if any(rounds) else ()
        for early in (step.kind for step in before if step.targets == {"activations"}):
            raise ValueError(f"{early} hides the inputs that the weight step needs; put it last")
        return self

    @model_validator(mode="after")
    def _one_cache(self) -> Self:
        kinds = [step.kind for step in self.steps if "kv_cache" in step.targets]
        if len(kinds) > 1:
            raise ValueError(f"{', '.join(kinds)}: keys and values are cached once; keep one step")
        return self

    @property
    def walks(self) -> bool:
        """True if a step rewrites blocks or is calibrated on them."""
        return any(step.in_blocks or step.fits for step in self.steps)

    @property
    def is_baseline(self) -> bool:
        """True for the unquantized model."""
        return not self.steps

    def targets(self) -> list[str]:
        """What is quantized: weights, activations, kv_cache."""
        return sorted({target for step in self.steps for target in step.rounded_targets()})

    def needs_calibration(self) -> bool:
        """True if any step looks at calibration inputs."""
        return any(step.fits or step.gathered() for step in self.steps)

    def artifact_id(self) -> str:
        """What quantization makes: 12 hex over model, steps, calibration data, seed, storage."""
        calibration = self.calibration.model_dump() if self.needs_calibration() else None
        steps = [[step.data(), [*versions(step), *ruled_versions(step)]] for step in self.steps]
        seed = self.seed if self.steps else 0
        # 16-bit weights are as packed as they get
        storage = self.storage if self.steps else "packed"
        return short_hash([self.model.model_dump(), steps, calibration, seed, storage])

    def fingerprint(self) -> str:
        """artifact_id and metrics: two runs with one fingerprint give the same rows."""
        return short_hash([self.artifact_id(), sorted(metric.digest() for metric in self.metrics)])

    def stages(self) -> list[str]:
        """Stages in order, a process each: quantize, evaluate, then one per lone metric."""
        together = [m for m in self.metrics if not m.alone]
        alone = [m.kind for m in self.metrics if m.alone]
        return (["quantize"] if self.walks else []) + (["evaluate"] if together else []) + alone

    def metrics_of(self, stage: str) -> list[Any]:
        """The metrics measured in one stage."""
        if stage == "evaluate":
            return [m for m in self.metrics if not m.alone]
        return [m for m in self.metrics if m.alone and m.kind == stage]

    def baseline(self) -> RunSpec:
        """The same measurements of the 16-bit model; what compares with it gives 0."""
        return self.model_copy(update={"steps": (), "storage": "packed"})


RunId = Annotated[str, Field(pattern=r"^\d{8}-\d{6}-[0-9a-f]{6}$")]  # becomes part of a path


class MineSpec(JobSpec):
    """Answers of a model's variants to a pool of prompts, each compared with the 16-bit answer."""

    kind: Literal["mine"] = "mine"
    model: ModelRef
    runs: tuple[RunId, ...] = Field((), description="Finished runs of the model; none: all.")
    prompts: tuple[str, ...] = Field((), description="Ids in the pool; none: the whole pool.")
    temperature: float = Field(0.0, ge=0, le=HOTTEST, description="Of sampling; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of the probability sampled from.")
    max_new: int = Field(256, ge=1, le=LONGEST_ANSWER, description="Most tokens of an answer.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    pool: str = ""  # hash of the prompts' texts, filled in when submitted
    version: ClassVar[int] = 1  # raise when the same settings give other numbers

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name, values in (("runs", self.runs), ("prompts", self.prompts)):
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"{name}: {twice[0]} is named twice; name it once")
        return self

    def artifact_id(self) -> str:
        return short_hash([self.model_dump(mode="json"), self.version])

    def fingerprint(self) -> str:
        return self.artifact_id()

    def stages(self) -> list[str]:
        return ["mine"]

    def sampling(self) -> Sampling:
        """How every answer is drawn."""
        return Sampling(self.temperature, self.top_p, self.max_new, self.seed)


Shape = Annotated[str, Field(pattern=r"^[1-9]\d{0,6}x[1-9]\d{0,6}$")]  # n x k


class BenchSpec(JobSpec):
    """Times of kernels beside a bf16 product, on the device that the job gets."""

    kind: Literal["bench"] = "bench"
    kernels: tuple[str, ...] = Field((), description="Names of kernels; none: all of them.")
    shapes: tuple[Shape, ...] = Field((), description="n x k of the weights; none: two usual ones.")
    rows: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        (), description="Rows of x (tokens at once); none: 1, 8 and 64."
    )
    asked: float = Field(0.0, ge=0, description="When, in unix seconds: times are always new.")
    version: ClassVar[int] = 1

    def artifact_id(self) -> str:
        return short_hash([self.model_dump(mode="json"), self.version])

    def fingerprint(self) -> str:
        return self.artifact_id()

    def stages(self) -> list[str]:
        return ["time"]
