"""Load a model and its tokenizer: safetensors only, no code of the checkpoint's, checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from backend.model.identity import ModelError, ModelFacts, find_model
from backend.spec import ModelRef, Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def compute_dtype(
    ref: ModelRef, device: str, storage: Storage, config: dict[str, Any]
) -> torch.dtype:
    """What a run computes in: fp32 simulated and bf16 packed on the CPU, else the checkpoint's."""
    if ref.dtype != "auto":
        return STORED[ref.dtype]
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if storage == "packed" else torch.float32
    stored = STORED.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
    return torch.bfloat16 if stored == torch.float32 and storage == "packed" else stored


def load(
    ref: ModelRef, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Name -> (model in eval mode without gradients, tokenizer). ModelError in one sentence."""
    facts = find_model(ref)
    if ref.content and ref.content != facts.content:
        raise ModelError(
            f"the files of {ref.id} have changed since the run was submitted; submit it again"
        )
    tokenizer = load_tokenizer(facts.folder)
    model = load_weights(facts.folder, dtype)
    if is_rounded(ref, facts):
        round_to_16_bits(model)
    check_finite(model, dtype)
    check_vocabulary(model, tokenizer, facts.folder)
    if ref.id == "demo-outliers":
        from backend.demo.outliers import plant_outliers

        plant_outliers(model)
    return model.to(device).eval().requires_grad_(False), tokenizer


def is_rounded(ref: ModelRef, facts: ModelFacts) -> bool:
    """True for a checkpoint of 32-bit weights, unless float32 was asked for.

    Everything is compared with the model in 16 bits, and its size is given in them.
    """
    return ref.dtype == "auto" and facts.weight_bytes == 4 * facts.parameters


def round_to_16_bits(model: nn.Module) -> None:
    """Every parameter to its nearest bfloat16, whatever dtype holds it."""
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.bfloat16())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the libraries below raise anything; the sentence keeps it
            raise ModelError(f"the tokenizer in {folder} cannot be read: {first(error)}") from error


def load_weights(folder: Path, dtype: torch.dtype) -> Any:
    """The causal language model of a folder on the CPU; every parameter must be in the files."""
    from transformers import AutoModelForCausalLM

    with quiet():
        try:
            loader: Any = AutoModelForCausalLM  # its stubs do not know output_loading_info
            model, found = loader.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except MemoryError:  # says nothing of the files
            raise
        except Exception as error:  # the libraries below raise anything; the sentence keeps it
            raise ModelError(f"the weights in {folder} cannot be loaded: {first(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"the files in {folder} lack {len(missing)} of the model's tensors, {missing[0]} first"
        )
    return model


def first(error: Exception) -> str:
    """First line of an error's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_finite(model: nn.Module, dtype: torch.dtype) -> None:
    """ModelError naming the first tensor with NaN or infinity."""
    for name, value in model.named_parameters():
        # One pass without a mask in memory; a sum can overflow, so it only calls for a closer look.
        if not value.sum(dtype=torch.float32).isfinite() and not value.isfinite().all():
            kind = "NaN" if value.isnan().any() else "infinite"
            raise ModelError(f"{name} holds {kind} weights in {str(dtype).removeprefix('torch.')}")


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """ModelError if the tokenizer can give an id that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer in {folder} does not match the model: it gives ids up to {largest}, "
            f"the model has {rows} embeddings"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: the log belongs to the run."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
