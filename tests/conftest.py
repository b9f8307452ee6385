"""Shared fixtures: tiny random models of every family, a byte tokenizer, model folders, a home."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never leave the machine
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on CPU tensors

import pytest

VOCAB = 320  # 256 bytes and three special tokens, rounded up: some rows have no token, as in life
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
SLIDING = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FAMILY_SIZES: dict[str, dict[str, Any]] = {  # what a family needs beside SIZES; None leaves one out
    "mistral": {"sliding_window": 8},
    "qwen2": {**SLIDING, "use_sliding_window": True, "head_dim": None},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "phi3": {"head_dim": None},
    "opt": {
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "intermediate_size": None,
        "num_key_value_heads": None,
        "head_dim": None,
    },
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
}


def tiny_model(kind: str = "llama", *, seed: int = 0, dtype: str = "float32", **sizes: Any) -> Any:
    """A random model of one family in eval mode; norms and biases are not at their defaults."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    knobs = {**SIZES, **FAMILY_SIZES.get(kind, {}), **sizes}
    config = AutoConfig.for_model(kind, **{k: v for k, v in knobs.items() if v is not None})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1 and "norm" in name and name.endswith("weight"):
                value.add_(0.3 * torch.rand_like(value))
            elif value.dim() == 1:
                value.normal_(0, 0.1)
            elif "embed" not in name:
                value.mul_(4)  # std 0.08: activations of order one, logits that differ
    torch.random.set_rng_state(state)
    return model.to(getattr(torch, dtype)).requires_grad_(False)


def byte_tokenizer() -> Any:
    """One token per byte, <s> </s> <pad>, BOS at the start, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    vocab |= {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return fast


def save_model(folder: Path, kind: str = "llama", **knobs: Any) -> Path:
    """A tiny model and its tokenizer as a Hugging Face folder."""
    tiny_model(kind, **knobs).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """make_model("llama", seed=0, dtype="float32", hidden_size=64, ...) -> model."""
    return tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte tokenizer of the tiny models."""
    return byte_tokenizer()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder("opt", dtype="bfloat16", ...) -> new folder with model and tokenizer."""
    made: list[Path] = []

    def make(kind: str = "llama", **knobs: Any) -> Path:
        made.append(tmp_path / f"model-{len(made)}")
        return save_model(made[-1], kind, **knobs)

    return make


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny bfloat16 Llama with its tokenizer, shared by all tests: do not change it."""
    return save_model(tmp_path_factory.mktemp("llama"), dtype="bfloat16")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, which $QUANTARENA_HOME names too."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("QUANTARENA_HOME", str(folder))
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of 12,000 characters, one token each."""
    path = tmp_path / "text.txt"
    lines = [f"Line {i}: the sum of {i} and {i + 3} is {2 * i + 3}.\n" for i in range(400)]
    path.write_text("".join(lines)[:12000], encoding="utf-8")
    return path
