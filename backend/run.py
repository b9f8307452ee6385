"""Run: a model as a spec describes it, and all that a metric may touch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from backend import data
from backend.baseline import Baseline, LiveBaseline, StoredBaseline, trace_folder
from backend.cache.build import Caches, cache_argument
from backend.model import loading
from backend.model.checkpoint import Checkpoint
from backend.model.families import Block, blocks_of
from backend.model.identity import find_model
from backend.model.quant_linear import LinearLike, QuantLinear
from backend.pipeline import Cancelled
from backend.spec import RunSpec, Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
LOGIT_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}  # of one batch: 16 MiB and 1 GiB in fp32
LARGEST_BATCH = 16


class Run:
    """A loaded model with its spec, and all that a metric may touch."""

    def __init__(
        self,
        spec: RunSpec,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        home: Path | None = None,
        side_by_side: bool = True,
        on_progress: Callable[[int, int, str], None] | None = None,
        on_note: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.spec = spec
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        self.home = home
        self.side_by_side = side_by_side  # False: the 16-bit model does not fit beside this one
        self.on_progress = on_progress or (lambda done, total, item: None)
        self.note = on_note or (lambda text: None)
        self.should_stop = should_stop or (lambda: False)
        self._made: dict[str, Any] = {}
        self.caches = Caches(model, spec.steps, packed=spec.storage == "packed")
        for text in self.caches.notes:
            self.note(text)

    @classmethod
    def open(
        cls,
        spec: RunSpec,
        *,
        device: str = "cpu",
        home: Path | None = None,
        blocks: Path | None = None,
        dtype: torch.dtype | None = None,
        **reporting: Any,
    ) -> Self:
        """Load the model, put the quantized blocks of a run's folder in, pack what is to be packed.

        `dtype` None: what the spec's storage computes in on this device.
        """
        dtype = dtype or compute_dtype(spec, device, spec.storage)
        model, tokenizer = loading.load(spec.model, "cpu" if spec.walks else device, dtype)
        if spec.walks:
            if blocks is None:
                raise ValueError("a run with steps needs the folder of its quantized blocks")
            weights = [step for step in spec.steps if "weights" in step.targets]
            kept = not weights or any(rule.keep for step in weights for rule in step.layers)
            packed = spec.storage == "packed"
            put_in(model, Checkpoint(blocks), device, packed=packed, kept=kept)
        name = str(dtype).removeprefix("torch.")
        model = model.to(device)
        return cls(spec, model, tokenizer, device=device, dtype=name, home=home, **reporting)

    # -- the model -------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, ids: Tensor, *, keep: int = 0) -> Tensor:
        """ids [B, T] -> [B, T, V] in the compute dtype, no cache between calls.

        `keep`: only of the last so many positions, [B, keep, V]; 0 is all. Attention reads rounded
        keys and values where the recipe rounds them.
        """
        how: dict[str, Any] = {"use_cache": False, **self._last(keep)}
        if self.caches.rounds:
            cache = self.caches.new(scoring=True)
            how |= {"use_cache": True, cache_argument(self.model): cache}
        out = self.model(input_ids=ids.to(self.device), **how)
        if self.caches.rounds:
            self.caches.count(cache)
        return out.logits[:, -keep:]

    def generate(
        self,
        ids: Tensor,
        *,
        max_new: int,
        seed: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        ignore_end: bool = False,
    ) -> Iterator[int]:
        """ids [1, T] -> new tokens one by one, greedy at temperature 0; stops before the end token.

        Also stops where the context is full.
        """
        cache = self.caches.new()
        source = torch.Generator(self.device).manual_seed(seed)
        ends = set() if ignore_end else self.end_tokens()
        step = ids.to(self.device)
        try:
            for _ in range(min(max_new, self.context - ids.shape[1])):
                with torch.inference_mode():
                    given = {cache_argument(self.model): cache, **self._last(1)}
                    out = self.model(input_ids=step, use_cache=True, **given)
                    token = choose(out.logits[0, -1].float(), temperature, top_p, source)
                if token in ends:
                    return
                yield token
                step = torch.tensor([[token]], device=self.device)
        finally:
            self.caches.count(cache)

    def _last(self, keep: int) -> dict[str, int]:
        """Tells the model to compute the logits of the last `keep` positions, if it can be told."""
        known = keep and "logits_to_keep" in inspect.signature(self.model.forward).parameters
        return {"logits_to_keep": keep} if known else {}

    def end_tokens(self) -> set[int]:
        """Ids that end an answer: the tokenizer's and the generation config's."""
        config = getattr(self.model, "generation_config", None)
        ends = [self.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
        flat = [e for end in ends for e in (end if isinstance(end, list) else [end])]
        return {int(e) for e in flat if e is not None}

    def blocks(self) -> list[Block]:
        """The decoder blocks in order."""
        return blocks_of(self.model)

    @property
    def context(self) -> int:
        """Longest input in tokens."""
        return int(self._config().max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer."""
        return int(self._config().vocab_size)

    def _config(self) -> Any:
        return cast(Any, self.model.config).get_text_config()

    # -- text ------------------------------------------------------------------------------------

    def tokens(self, dataset: str, n: int, length: int) -> Tensor:
        """The first n windows of a text (all for n = 0), [<= n, length]."""
        if length > self.context:
            raise ValueError(
                f"windows of {length} tokens do not fit the model's context of {self.context}"
            )
        return data.windows(self.tokenizer, dataset, length, limit=n or None)

    def hash(self, ids: Tensor) -> str:
        """Hash of token ids."""
        return data.data_hash(ids)

    def batch_size(self, length: int, *, padded: bool = False) -> int:
        """Sequences of `length` tokens per forward pass, a power of two.

        `padded`: some are shorter and filled up, which some caches would round with the rest.
        """
        if not self.rows_independent() or (padded and self.caches.mixes_tokens):
            return 1
        room = LOGIT_ELEMENTS[torch.device(self.device).type] // (length * self.vocabulary)
        return 1 << (max(1, min(room, LARGEST_BATCH)).bit_length() - 1)

    def rows_independent(self) -> bool:
        """False if what rounds a token depends on the others, so that batching changes results."""
        return not any(
            isinstance(module, LinearLike) and module.mixes_rows()
            for module in self.model.modules()
        )

    # -- the 16-bit model ------------------------------------------------------------------------

    def baseline(self) -> Baseline:
        """Predictions of the 16-bit model, on the same device in the same compute dtype."""
        return self.once("baseline", self._baseline)

    def _baseline(self) -> Baseline:
        if self.spec.is_baseline:
            return LiveBaseline(self.logits, "the run itself")
        if not self.side_by_side:
            self.note(
                "compared with 16-bit predictions stored in fp16, because both models do not fit "
                "in memory together: divergences carry a rounding error of about 1e-3"
            )
            return self.stored_baseline()
        dtype = getattr(torch, self.dtype)
        model, tokenizer = loading.load(self.spec.model, self.device, dtype)
        plain = Run(self.spec.baseline(), model, tokenizer, device=self.device, dtype=self.dtype)
        return LiveBaseline(plain.logits, "side by side")

    def stored_baseline(self) -> StoredBaseline:
        """The 16-bit model's predictions on disk, as execute's stage wrote them before."""
        if self.home is None:
            raise ValueError("stored 16-bit predictions need a home folder")
        content = self.spec.model.content
        return StoredBaseline(trace_folder(self.home, content, self.device, self.dtype), self.hash)

    # -- reporting -------------------------------------------------------------------------------

    def progress(self, done: int, total: int, item: str = "") -> None:
        """How far a metric is; raises Cancelled once the run was cancelled."""
        if self.should_stop():
            raise Cancelled
        self.on_progress(done, total, item)

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Something small that several metrics need, made at the first call."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])


def compute_dtype(spec: RunSpec, device: str, storage: Storage) -> torch.dtype:
    """What a run of this storage computes in on this device."""
    return loading.compute_dtype(spec.model, device, storage, find_model(spec.model).config)


def choose(logits: Tensor, temperature: float, top_p: float, source: torch.Generator) -> int:
    """Next token from logits [V] fp32: the largest at temperature 0, else from the nucleus."""
    if temperature <= 0:
        return int(logits.argmax())
    chances, order = (logits / temperature).softmax(-1).sort(descending=True)
    ahead = chances.cumsum(-1) - chances  # mass before each token: the first is always kept
    kept = torch.where(ahead < top_p, chances, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=source)])


def put_in(
    model: nn.Module, saved: Checkpoint, device: str, *, packed: bool, kept: bool = False
) -> None:
    """Restore every block, one by one on the device, and pack its linears.

    `kept`: a layer rule left some linears in 16 bits, and so they stay.
    """
    for block in blocks_of(model):
        if not saved.has(block.index):
            raise ValueError(
                f"block {block.index} is missing in {saved.folder}; quantize the run again"
            )
        saved.restore(block)
        block.module.to(device)
        if packed:
            pack(block, device, kept)


def pack(block: Block, device: str, kept: bool = False) -> None:
    """Hand every quantized linear of a block to a kernel, or say which cannot be and why."""
    for name, linear in block.linears().items():
        if kept and isinstance(linear, nn.Linear):
            continue
        where = f"{name} of block {block.index}"
        if not isinstance(linear, QuantLinear):
            raise ValueError(
                f"{where} is no linear that a kernel here can hold; use storage='simulated'"
            )
        try:
            linear.pack(linear.kernel_for(device))
        except ValueError as error:
            raise ValueError(f"{where}, {linear.in_features} input channels: {error}") from None
