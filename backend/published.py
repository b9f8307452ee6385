"""Results printed in papers and project pages, as printed: shown beside measured ones, never mixed.

One row of `published_results.csv` is one printed number. `group` 0 is a whole row (per channel),
empty is not printed or not applicable; `read_in` says where the number was copied from when that
is not the source itself. Percent signs, `x` and units are removed; `unit` keeps them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pandas as pd

FILE = Path(__file__).with_name("published_results.csv")
NUMBERS = ("w_bits", "a_bits", "kv_bits", "group", "effective_bits", "value")

# The name a model has in print -> its id on the Hugging Face hub.
HUB_IDS = {
    "Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama-2-13B": "meta-llama/Llama-2-13b-hf",
    "LLaMA-7B": "huggyllama/llama-7b",
    "LLaMA-13B": "huggyllama/llama-13b",
    "LLaMA-30B": "huggyllama/llama-30b",
    "LLaMA-65B": "huggyllama/llama-65b",
    "OPT-125M": "facebook/opt-125m",
    "OPT-350M": "facebook/opt-350m",
    "OPT-1.3B": "facebook/opt-1.3b",
    "OPT-2.7B": "facebook/opt-2.7b",
    "OPT-6.7B": "facebook/opt-6.7b",
    "OPT-13B": "facebook/opt-13b",
    "OPT-30B": "facebook/opt-30b",
    "OPT-66B": "facebook/opt-66b",
    "BLOOM-176B": "bigscience/bloom",
}
# What we measure -> what print calls it. Perplexity is one measure per text.
MEASURES = {
    ("perplexity", "wikitext2"): "wikitext2_ppl",
    ("perplexity", "c4"): "c4_ppl",
    ("arc_challenge/acc,none", ""): "arc_challenge_acc",
    ("arc_easy/acc,none", ""): "arc_easy_acc",
    ("boolq/acc,none", ""): "boolq_acc",
    ("hellaswag/acc,none", ""): "hellaswag_acc",
    ("piqa/acc,none", ""): "piqa_acc",
    ("winogrande/acc,none", ""): "winogrande_acc",
    ("mmlu/acc,none", ""): "mmlu_acc",
    ("gsm8k/exact_match,strict-match", ""): "gsm8k_em",
    ("truthfulqa_gen/bleu_acc,none", ""): "truthfulqa_bleu_acc",
}


@lru_cache(maxsize=1)
def results() -> pd.DataFrame:
    """Every published number, in the order of the sources' tables. Texts are never missing."""
    table = pd.read_csv(FILE, dtype=str, keep_default_na=False)
    return table.assign(**{name: pd.to_numeric(table[name]) for name in NUMBERS})


def same_model(model: str) -> str:
    """Id or path of a model -> the name under which results of it were printed, or ""."""
    last = model.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
    known = {hub_id.rpartition("/")[2].lower(): name for name, hub_id in HUB_IDS.items()}
    return known.get(last, "")


def beside(model: str, name: str, dataset: str = "") -> pd.DataFrame:
    """Published numbers of the same model and measurement, in our units; no rows where none are.

    `bits` is what print says of the bits per weight: the effective bits where they are given,
    else the bits of the codes. Shares are fractions.
    """
    metric = MEASURES.get((name, dataset)) or MEASURES.get((name, ""))
    printed = same_model(model)
    table = results()
    found = table[(table["metric"] == metric) & (table["model"] == printed) & (printed != "")]
    share = found["unit"] == "%"
    return found.assign(
        bits=found["effective_bits"].fillna(found["w_bits"]),
        value=found["value"].where(~share, found["value"] / 100),
    ).reset_index(drop=True)
