"""Words that give a side away, and ordinary ones that do not."""

from __future__ import annotations

import pytest

from backend.formats import FORMATS
from backend.methods import METHODS
from jobs.leaks import ORDINARY, leak

TELLING = {
    "I am a GPTQ model.": "gptq",
    "gptq": "gptq",
    "I was made with AutoGPTQ": "autogptq",
    "(AWQ)": "awq",
    "my weights are int4": "int4",
    "my weights are INT-8": "int-8",
    "I run in 4-bit.": "4-bit",
    "I run in 4 bit precision": "4 bit",
    "I run in 4bit": "4bit",
    "these 3-bits": "3-bits",
    "a 16-bit baseline": "16-bit",
    "four-bit weights": "four-bit",
    "a 4\u2011bit model": "4-bit",  # non-breaking hyphen
    "\uff27\uff30\uff34\uff31": "gptq",  # full-width letters
    "nf4, of course": "nf4",
    "KIVI": "kivi",
    "fp8 e4m3": "fp8",
    "bf16": "bf16",
    "bfloat16": "bfloat16",
    "a W4A8 model": "w4a8",
    "w4a16kv4": "w4a16kv4",
    "w4g128": "w4g128",
    "Q4_K_M": "q4_k_m",
    "iq2_xxs": "iq2_xxs",
    "a .gguf file": "gguf",
    "SmoothQuant": "smoothquant",
    "smooth-quant": "smooth-quant",
    "LLM.int8()": "llm.int8()",
    "round-to-nearest": "round-to-nearest",
    "bitsandbytes": "bitsandbytes",
    "I am Llama 3.1, by a company": "llama 3.1",
    "llama3": "llama3",
    "Qwen2.5": "qwen2.5",
    "as Mistral I": "mistral",
    "phi-3": "phi-3",
    "OPT-125m": "opt-125m",
}
HARMLESS = (
    "You can opt for the second phi of the falcon.",
    "The optional option is optimal.",
    "A byte has 8 bits, a word 16 bits or 32 bits.",
    "A 32-bit integer and a 64-bit one.",
    "int32 x = 4; int y; float z; double bits;",
    "a bit of patience, a bit more",
    "Take 4 bits of cheese.",
    "w4 and a8 are roads",
    "interrupt 4, print4, int48, point4",
    "quantumly, equip, inquip, spaawqk",
    "Call 4-bitter, q4 results, 2024-4-bitten",
    "The activations of a network",
    "bright, rate, awqward",
    "Yi is a name, bloom a verb.",
    "",
)


@pytest.mark.parametrize(("text", "word"), TELLING.items())
def test_telling_words_are_found_as_they_stand(text, word):
    assert leak(["nothing here", text]) == word


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_texts_are_not_telling(text):
    assert leak([text]) == ""


@pytest.mark.parametrize("registry", [METHODS, FORMATS])
def test_every_part_there_is_gives_itself_away(registry):
    for kind in registry.load():
        if kind not in ORDINARY and not kind.startswith("test_"):
            assert leak([f"I am {kind.upper()}."]), kind
            assert leak([f"I am {kind.replace('_', ' ')}."]), kind


def test_further_words_can_be_named():
    assert leak(["I am Smaug (small)."], more=["smaug (small)"]) == "smaug (small)"
    assert leak(["smaugs"], more=["smaug"]) == ""
