"""Words that tell a voter who answers: method names, formats, bit widths, model families.

A conversation in which one of them stands, on either side or typed by the voter, is no longer
blind, so its vote is kept with a flag and does not count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

METHODS = (
    "aqlm",
    "auto-?gptq",
    "auto-?awq",
    "auto-?round",
    "awq",
    "bcq",
    "bitnet",
    "bits-?and-?bytes",
    "bnb",
    "exl[23]",
    "exllama(?:v\\d)?",
    "ggml",
    "gguf",
    "gptq",
    "hqq",
    "kivi",
    "kv-?quant",
    "llm\\.int8(?:\\(\\))?",
    "lut-?gemm",
    "obq",
    "omniquant",
    "optq",
    "outlier suppression",
    "qlora",
    "qrazor",
    "quarot",
    "quip",
    "rtn",
    "round[- ]to[- ]nearest",
    "smooth-?quant",
    "sparse-?gpt",
    "spin-?quant",
    "spqr",
    "squeezellm",
    "zero-?quant",
)
FORMATS = (
    "u?int-?[1-8]",  # int16 and above are types of every program text
    "(?:mx|nv)?fp-?(?:4|6|8|16)",
    "(?:mx)?int-?8",
    "bf-?16",
    "b?float-?16",
    "nf-?[234]",
    "e[2345]m[1230]",
    "i?q[1-8]_(?:k|\\d|xxs|xs|s|m|nl)(?:_(?:xs|s|m|l))?",
    "w[1-8]a(?:[1-8]|16)(?:kv\\d+)?",
    "w[1-8]g\\d+",
    "kv[1-8]",
)
WIDTHS = (
    "(?:[1-8]|16)[- ]?bit",
    "(?:[1-8]|16)-?bits",  # "8 bits" apart: what a byte has is common knowledge
    "(?:one|two|three|four|five|six|seven|eight|sixteen)-bit",
)
# With or without a version: llama, llama3, llama-3.1.
FAMILIES = (
    "baichuan",
    "chatglm",
    "chatgpt",
    "code-?llama",
    "deepseek",
    "gemma",
    "gpt-?(?:2|3|4|j|neo|neox|oss)",
    "internlm",
    "llama",
    "minicpm",
    "mistral",
    "mixtral",
    "olmo",
    "open-?llama",
    "qwen",
    "smol-?lm",
    "stablelm",
    "starcoder",
    "tiny-?llama",
)
# Ordinary words too, so they count only with a version or a size: phi-3, opt-125m.
FAMILIES_WITH_NUMBER = (
    "bloom",
    "falcon",
    "granite",
    "opt",
    "phi",
    "pythia",
    "vicuna",
    "yi",
    "zephyr",
)
# Kinds of our own parts that are ordinary words.
ORDINARY = frozenset({"activations", "codebook", "int", "kv_cache", "minifloat"})


def leak(texts: Iterable[str], more: Iterable[str] = ()) -> str:
    """The first telling word in `texts`, as written there in lower case; "" if there is none.

    `more` are plain words that tell as well. Whole words only: `optional` holds no `opt`.
    """
    told = pattern(tuple(more))
    for text in texts:
        found = told.search(_plain(text))
        if found:
            return found[0].strip()
    return ""


@lru_cache(maxsize=64)
def pattern(more: tuple[str, ...] = ()) -> re.Pattern[str]:
    """One expression for every telling word, those of the installed parts included."""
    own = [re.escape(word) for word in (*kinds(), *more)]
    plain = [*METHODS, *FORMATS, *WIDTHS, *own]
    families = [f"(?:{'|'.join(FAMILIES)})(?:[- ]?v?\\d+(?:\\.\\d+)*)?"]
    numbered = [f"(?:{'|'.join(FAMILIES_WITH_NUMBER)})-?\\d+(?:\\.\\d+)*[bm]?"]
    return re.compile(rf"(?<![\w])(?:{'|'.join(plain + families + numbered)})(?![\w])")


@lru_cache(maxsize=1)
def kinds() -> tuple[str, ...]:
    """Kinds of every method and format there is, so that a new one is guarded by being there."""
    from backend.formats import FORMATS as formats  # imports torch
    from backend.methods import METHODS as methods

    telling = {*methods.load(), *formats.load()} - ORDINARY
    return tuple(sorted({word for kind in telling for word in _spellings(kind)}))


def _spellings(kind: str) -> set[str]:
    return {kind.replace("_", between) for between in ("_", "-", " ", "")}


def _plain(text: str) -> str:
    """Lower case, full-width letters and every kind of hyphen as the ordinary ones."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\u2010-\u2015\u2212]", "-", folded)
