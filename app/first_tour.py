"""First tour: the runs that fill an empty home in two minutes, on the bundled model."""

from __future__ import annotations

from app.recipe_words import text_of_steps
from backend.metrics import METRICS
from backend.recipes import parse
from backend.spec import Calibration, ModelRef, RunSpec
from jobs.queue import Queue

LABEL = "First tour"
MODEL = "demo"

# Cheap and telling ones first: each new point changes the picture.
RECIPES = (
    "rtn(bits=4,group=64,scale_dtype=float16)",
    "rtn(bits=3,group=64,scale_dtype=float16)",
    "gptq(bits=3,group=64,scale_dtype=float16,act_order=true,static_groups=true,live_damping=true)",
    "rtn(bits=8,group=64,scale_dtype=float16)",
    "rtn(bits=3,scale_dtype=float16)",
    "gptq(bits=4,group=64,scale_dtype=float16,act_order=true,static_groups=true,live_damping=true)",
    "rtn(bits=2,group=64,scale_dtype=float16)",
    "gptq(bits=2,group=64,scale_dtype=float16,act_order=true,static_groups=true,live_damping=true)",
    "smoothquant+rtn(bits=8,symmetric=true,scale_dtype=float16)+activations(bits=8,symmetric=true)",
    "rtn(bits=8,symmetric=true,per_tensor=true)+activations(bits=8,symmetric=true,per_tensor=true)",
    "rtn(bits=4,group=64,scale_dtype=float16)+activations(bits=8,symmetric=true)",
)
# Small enough for 12 runs in two minutes on two cores; raise the limits for finer intervals.
METRIC_KNOBS: tuple[dict[str, object], ...] = (
    {"kind": "size"},
    {"kind": "perplexity", "limit": 24},
    {"kind": "divergence", "limit": 24},  # the same windows: the model runs once for both
    {"kind": "tasks", "limit": 120},
)


CALIBRATION = Calibration(samples=32, length=512)  # 16,384 tokens: enough for layers this narrow


def specs() -> list[RunSpec]:
    """The baseline and its rivals, all measured alike."""
    metrics = tuple(METRICS.build(knobs) for knobs in METRIC_KNOBS)
    pipelines = [(), *(parse(text) for text in RECIPES)]
    model = ModelRef(id=MODEL)
    return [
        RunSpec(model=model, steps=steps, metrics=metrics, calibration=CALIBRATION)
        for steps in pipelines
    ]


def start(queue: Queue) -> list[str]:
    """Submit the tour -> ids of its runs; runs that exist already are those."""
    return [queue.submit(s, label=LABEL, recipe=text_of_steps(s.steps)) for s in specs()]
