"""Published values that may be laid over the Compare chart: same model, same measurement."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from app import look, rows
from app.recipe_words import kind_name
from backend import published
from results_db.store import Store

BITS = "bits_per_weight"
COLUMNS = ("x", "y", "name", "source", "hover")
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "demo": "the bundled text"}


@dataclass(frozen=True, eq=False)
class Published:
    """What print has for the axes of a chart, or in a sentence why it has nothing."""

    rows: pd.DataFrame
    why: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Published:
        """Itself, frozen as it is: pandas copies `attrs` with every operation."""
        return self

    @property
    def sources(self) -> list[str]:
        """Where the values were printed, the most frequent first."""
        return [str(source) for source in self.rows["source"].value_counts().index]


NONE = Published(pd.DataFrame(columns=list(COLUMNS)))


def over(store: Store, model: str, x: rows.Axis, y: rows.Axis) -> Published:
    """Published values for two axes of which one is bits per weight."""
    if not published.same_model(model):
        return _none(f"No published results of {model} are known here.")
    at, other = ("x", y) if x.name == BITS else ("y", x)
    if BITS not in (x.name, y.name) or x.name == y.name:
        return _none(
            "Published values come with bits, not with sizes or times: "
            "choose Bits per weight on one axis to see them."
        )
    texts = datasets(store, model, other.name)
    found = [published.beside(model, other.name, text) for text in texts or [""]]
    table = pd.concat(found).dropna(subset=["bits"])
    if len(texts) > 1 or not len(table):
        return _none(_no_values(model, other.name, texts))
    value = table["value"].rename("value")
    first, second = (table["bits"], value) if at == "x" else (value, table["bits"])
    shown = pd.DataFrame({"x": first, "y": second, "source": table["source"]})
    records = rows.records(table)
    shown["name"] = [name_of(record) for record in records]
    shown["hover"] = [hover(record, other) for record in records]
    return Published(shown[list(COLUMNS)].reset_index(drop=True))


def datasets(store: Store, model: str, name: str) -> list[str]:
    """The texts on which a measurement of a model was made; [] where it needs none."""
    sql = """
        SELECT DISTINCT m.detail FROM measurements m JOIN runs r USING (run_id)
        WHERE r.model = $model AND m.name = $name
    """
    details = store.frame(sql, model=model, name=name)["detail"]
    return sorted({str(d["dataset"]) for d in map(json.loads, details) if d.get("dataset")})


def name_of(record: rows.Record) -> str:
    """`GPTQ W4A16 g128` of a published row."""
    methods = str(record["method"]).split("+") if record["method"] else []
    names = [WORDS.get(m) or kind_name(m) for m in methods]
    parts = [" + ".join(names), code(record), group(record["group"])]
    return " ".join(part for part in parts if part) or "no method"


WORDS = {
    "fp16": "16-bit",
    "fp32": "32-bit",
    "lut_gemm": "LUT-GEMM",
    "llm_int8": "LLM.int8()",
    "zeroquant": "ZeroQuant",
    "qrazor": "QRazor",
    "spqr": "SpQR",
    "kivi": "KIVI",
    "kvquant": "KVQuant",
    "llama_cpp_int4": "llama.cpp int4",
    "mixed_precision_salient": "mixed precision",
}


def code(record: rows.Record) -> str:
    """`W4A16KV2` of the bits in print; nothing where they are those of the unquantized model."""
    bits = [("W", record["w_bits"]), ("A", record["a_bits"]), ("KV", record["kv_bits"])]
    known = [(sign, float(b)) for sign, b in bits if not pd.isna(b)]
    if not known or record["method"] in ("fp16", "fp32"):
        return ""
    return "".join(f"{sign}{b:g}" for sign, b in known if sign != "KV" or b < 16)


def group(size: float) -> str:
    """`g128`; nothing for whole rows and where none is printed."""
    return f"g{size:.0f}" if size > 0 else ""


def hover(record: rows.Record, axis: rows.Axis) -> str:
    """The box at a cross: what it is, where it was printed, with which settings."""
    number = look.quantity(axis.name, record["value"], axis.unit)
    lines = [f"<b>Published: {html.escape(name_of(record))}</b>"]
    lines.append(f"{look.label(axis.name)}  <b>{number}</b>")
    told = (record["settings"], record["source"], record["table"], record["note"])
    return "<br>".join([*lines, *_folded(str(text) for text in told if text)])


def _folded(texts: Iterable[str]) -> list[str]:
    return [html.escape(t if len(t) <= 80 else t[:78] + "…") for t in texts]


def _none(why: str) -> Published:
    return Published(NONE.rows, why)


def _no_values(model: str, name: str, texts: list[str]) -> str:
    where = f" on {' and '.join(TEXTS.get(t, t) for t in texts)}" if texts else ""
    return f"No published {look.inline(name)} of {model}{where} is known here."
