"""Times of kernels as pages and charts need them: names, ratios, traffic, what limits them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from app import look
from app.context import Picks
from app.recipe_words import kind_name
from results_db import queries
from results_db.store import Store

DENSE = "bf16"
ATTENTION = ("kv_decode", "sdpa")  # no products with weights: on packed caches, and on bf16
COMPARED = (DENSE, "sdpa")  # what the others are compared with
VALUE_BYTES = 2  # of x and y
NUMBERS = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}  # kinds that are no codes
CAPITALS = ("int", "codebook", "minifloat")  # formats whose names are written in capitals
SWITCHES = {"symmetric": "sym", "double_quant": "double"}


def of_job(store: Store, picks: Picks) -> pd.DataFrame:
    """Products of the chosen bench job, the newest without a choice, with derived numbers.

    `format`: the product in words; `shape`: "n x k"; `bytes` that must move; `tflops` and `gbps`
    achieved; `intensity` in FLOP per byte. `attrs`: job, device, ceilings.
    """
    table = all_of_job(store, picks)
    table = table[~table["kernel"].isin(ATTENTION)].reset_index(drop=True)
    table["shape"] = table["n"].astype(str) + "x" + table["k"].astype(str)
    moved = VALUE_BYTES * table["m"] * (table["n"] + table["k"])
    table["bytes"] = table["weight_bytes"] + moved
    table["intensity"] = 2.0 * table["m"] * table["n"] * table["k"] / table["bytes"]
    seconds = table["median_ms"].astype(float) / 1e3
    table["tflops"] = 2e-12 * table["m"] * table["n"] * table["k"] / seconds
    table["gbps"] = 1e-9 * table["bytes"] / seconds
    return table


def attention_of_job(store: Store, picks: Picks) -> pd.DataFrame:
    """Decode attention of the chosen bench job: m sequences, `shape` tokens of each in the cache.

    `gbps`: bytes of the cache a second; what else moves is little.
    """
    table = all_of_job(store, picks)
    table = table[table["kernel"].isin(ATTENTION)].reset_index(drop=True)
    table["shape"] = table["n"].astype(str)
    table["gbps"] = 1e-6 * table["weight_bytes"] / table["median_ms"].astype(float)
    return table


def all_of_job(store: Store, picks: Picks) -> pd.DataFrame:
    """Rows of the chosen bench job with their `format` in words. `attrs`: job, device, ceilings."""
    jobs = queries.kernel_jobs(store)
    known = jobs["job_id"].tolist()
    job = picks.id if picks.id in known else (known[0] if known else "")
    table = queries.kernel_times(store, job)
    table["format"] = [
        named(kernel, json.loads(weight), json.loads(act))
        for kernel, weight, act in zip(table["kernel"], table["weight"], table["act"], strict=True)
    ]
    chosen = jobs[jobs["job_id"] == job]
    device = str(chosen["device"].iloc[0]) if len(chosen) else ""
    table.attrs = {"job": job, "device": device, "ceilings": queries.ceilings(store, job)}
    return table


def named(kernel: str, weight: Mapping[str, Any], act: Mapping[str, Any] | None) -> str:
    """`INT4 g128 (w_a16)`, `NF4 g64 (codebook)`, `INT8 sym x INT8 sym (int_act_cpu)`."""
    if kernel == DENSE:
        return "bf16"
    inputs = f" × {form(act)}" if act else ""
    return f"{form(weight)}{inputs} ({kernel})"


def form(data: Mapping[str, Any]) -> str:
    """A format in a few words."""
    kind = str(data["kind"])
    if kind == "gguf":
        return str(data["type"])  # llama.cpp's own name, groups included
    words = data.get("type") or data.get("table") or NUMBERS.get(kind)
    words = words or (kind if kind in CAPITALS else kind_name(kind))
    bits = "" if data.get("type") or kind == "llm_int8" else data.get("bits", "")
    parts = [f"{str(words).upper() if kind in CAPITALS else words}{bits}".replace("_", " ")]
    parts += [f"g{data['group']}"] if data.get("group") else []
    parts += [f"{data['outliers']} outliers"] if isinstance(data.get("outliers"), str) else []
    parts += [word for name, word in SWITCHES.items() if data.get(name)]
    beside = list(data.get("beside", ()))
    if "keep" in beside:
        beside.remove("keep")
        bucket = int(data.get("bucket", 0))
        parts.append(f"{bucket // 2}:{bucket}" if bucket else "pruned")
    parts += [f"+ {str(name).replace('_', ' ')}" for name in beside]
    return " ".join(parts)


def shapes(table: pd.DataFrame) -> list[str]:
    """n x k of all rows, the largest first."""
    sizes = table.drop_duplicates("shape").sort_values(["n", "k"], ascending=False)
    return [str(shape) for shape in sizes["shape"]]


def spaced(shape: str) -> str:
    """`4096x4096` -> `4 096 × 4 096`."""
    return "\u00a0× ".join(look.whole(int(side)) for side in shape.split("x"))


def shape_of(table: pd.DataFrame, picks: Picks) -> str:
    """The chosen shape, else the largest."""
    known = shapes(table)
    return picks.shape if picks.shape in known else (known[0] if known else "")
