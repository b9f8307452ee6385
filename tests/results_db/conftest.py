import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from results_db.store import Store

STEPS = [{"kind": "gptq", "format": {"kind": "int", "bits": 4}}]


class Example:
    """A made-up run: its spec and the events that a worker would write."""

    @staticmethod
    def spec(*, steps: list = STEPS, content: str = "c0ffee", model: str = "demo") -> str:
        ref = {"id": model, "revision": "main", "dtype": "bfloat16", "content": content}
        return json.dumps({"model": ref, "steps": steps, "metrics": [], "storage": "simulated"})

    @staticmethod
    def submitted(t: float = 1.0, **more: Any) -> dict:
        named = {"label": "first", "recipe": "gptq(bits=4)", "fingerprint": "f1"}
        extra = {"artifact_id": "a1", "targets": ["weights", "kv"], "priority": 3}
        return {"t": t, "type": "submitted"} | named | extra | more

    @staticmethod
    def state(state: str, t: float = 2.0, **more: Any) -> dict:
        return {"t": t, "type": "state", "state": state} | more

    @staticmethod
    def note(text: str, block: int | None = None, module: str = "", t: float = 3.0) -> dict:
        return {"t": t, "type": "note", "block": block, "module": module, "text": text}

    @staticmethod
    def measured(name: str = "perplexity", value: Any = 7.25, t: float = 4.0, **more: Any) -> dict:
        what = {"metric_id": "m1", "metric": "perplexity", "version": 1, "name": name}
        number = {"value": value, "unit": "ppl", "better": "lower", "n": 40, "stderr": 0.03}
        under = {"layer": None, "detail": {}, "device": "cpu", "dtype": "float32"}
        where = {"storage": "simulated", "data": "wikitext2"}
        return {"t": t, "type": "measurement"} | what | number | under | where | more

    def whole(self, value: float = 7.25) -> list[dict]:
        """A run from submission to its end, with everything that events can carry."""
        layer = {"name": "error", "unit": "", "metric_id": "m3"}
        return [
            self.submitted(),
            self.state("running"),
            {"t": 2.1, "type": "env", "env": {"gpu": None, "torch": "2.13", "nan": float("nan")}},
            {"t": 2.2, "type": "stage", "stage": "quantize", "status": "started"},
            {"t": 2.3, "type": "progress", "done": 1, "total": 2},
            self.note("dead columns", block=0, module="mlp.down_proj"),
            self.note("fewer samples than asked"),
            self.measured(value=0.5, layer=[0, "mlp.up_proj"], **layer),
            self.measured(value=0.25, layer=[1, "mlp.up_proj"], **layer),
            self.measured(value=value, items=[7.0, 7.5, "nan"], detail={"windows": 3}),
            self.measured("mean_kld", None, metric_id="m2", stderr=None),
            self.measured("kld_max", "inf", metric_id="m2", stderr="nan"),
            {"t": 5.0, "type": "from_the_future", "surprise": 1},
            self.state("running", t=5.5),
            self.state("done", t=6.0),
        ]


@pytest.fixture
def example() -> Example:
    return Example()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "results.duckdb")
    yield store
    store.close()
