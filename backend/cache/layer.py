"""RoundedLayer: the cache of one decoder layer, its older tokens rounded, its newest in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from backend.cache.codec import Codec, Codes
from backend.cache.growth import rounded_tokens
from backend.cache.rotary import Turns, unrotate
from backend.cache.tokens import Tokens, turned
from kernels.kv_decode.layout import Held

Prefill = Literal["quant", "fp"]
READ_TOKENS = 1024  # of a packed cache, decoded to fp32 at once


@dataclass(frozen=True)
class Side:
    """How keys, or values, are kept: [sinks in 16 bits | rounded | newest in 16 bits]."""

    codec: Codec | None = None  # None: all in 16 bits
    residual: int = 0  # newest tokens in 16 bits; blocks longer than a token wait until this many
    sinks: int = 0  # first tokens in 16 bits
    pre_rope: bool = False  # the codec sees keys before rotary positions

    def rounded(self, count: int) -> int:
        """How many of `count` tokens are rounded, the oldest after the sinks."""
        if self.codec is None:
            return 0
        return int(rounded_tokens(count, self.codec.block, self.residual, self.sinks))

    @property
    def mixes_tokens(self) -> bool:
        """True if padding changes what is kept of other tokens."""
        return self.codec is not None and (self.codec.mixes_tokens or self.sinks > 0)


class Store:
    """Keys or values of one layer. Simulated: rounded tokens are kept dense; packed: as codes."""

    def __init__(self, side: Side, packed: bool, turns: Turns | None) -> None:
        self.side = side
        self.packed = packed
        self.turns = turns
        self.reset()

    def reset(self) -> None:
        """No tokens."""
        self.first: Tensor | None = None  # [B, H, sinks, D]
        self.dense: Tensor | None = None  # [B, H, rounded, D], simulated
        self.codes: Codes | None = None  # packed
        self.newest: Tensor | None = None  # [B, H, rest, D]
        self.rounded = 0

    @property
    def sinks(self) -> int:
        """First tokens held in 16 bits."""
        return 0 if self.first is None else self.first.shape[2]

    @property
    def rest(self) -> int:
        """Newest tokens held in 16 bits."""
        return 0 if self.newest is None else self.newest.shape[2]

    @property
    def count(self) -> int:
        """All tokens."""
        return self.sinks + self.rounded + self.rest

    def append(self, x: Tensor) -> None:
        """More tokens [B, H, t, D], in 16 bits for now."""
        missing = self.side.sinks - self.sinks if self.side.codec is not None else 0
        if missing > 0:
            self.first = joined(self.first, x[:, :, :missing])
            x = x[:, :, missing:]
        self.newest = joined(self.newest, x)

    def settle(self) -> None:
        """Round what is no longer among the newest."""
        due = self.side.rounded(self.count) - self.rounded
        if due <= 0:
            return
        assert self.newest is not None
        assert self.side.codec is not None
        old, self.newest = self.newest[:, :, :due], self.newest[:, :, due:].clone()
        start = self.sinks + self.rounded
        codes = self.side.codec.encode(self._turned_back(old, start))
        if self.packed:
            parts = [self.side.codec.pack(codes)]
            self.codes = self.side.codec.join([*([self.codes] if self.codes else []), *parts])
        else:
            values = turned(self.side.codec.decode(codes), self.turns, start)
            self.dense = joined(self.dense, values.to(old.dtype))
        self.rounded += due

    def read(self) -> Tensor:
        """All tokens as attention sees them [B, H, n, D]."""
        assert self.newest is not None
        if self.codes is not None:
            return self._unpacked(self.tokens())
        held = [x for x in (self.first, self.dense, self.newest) if x is not None and x.shape[2]]
        return held[0] if len(held) == 1 else torch.cat(held, 2)

    def tokens(self) -> Tokens:
        """All tokens of a packed store as they are held now."""
        assert self.newest is not None
        side = self.side
        return Tokens(self.newest, self.first, self.codes, self.rounded, side.codec, self.turns)

    def packed_tokens(self) -> Held | Tokens:
        """The same, for attention that reads codes where it can."""
        tokens = self.tokens()
        if self.side.codec is None:
            return Held(tokens.newest)
        held = self.side.codec.held(tokens.newest, tokens.first, tokens.codes)
        return tokens if held is None else held

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        for name in ("first", "dense", "newest"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.index_select(0, rows))
        if self.codes is not None:
            assert self.side.codec is not None
            self.codes = self.side.codec.select(self.codes, rows)

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        dense = [x for x in (self.first, self.dense, self.newest) if x is not None]
        return dense + list((self.codes or {}).values())

    @staticmethod
    def _unpacked(tokens: Tokens) -> Tensor:
        """Packed tokens in the type of the others, a stretch at a time."""
        batch, heads, _, dim = tokens.newest.shape
        out = tokens.newest.new_empty(batch, heads, tokens.count, dim)
        for start in range(0, tokens.count, READ_TOKENS):
            stop = min(start + READ_TOKENS, tokens.count)
            out[:, :, start:stop] = tokens.read(start, stop)
        return out

    def _turned_back(self, x: Tensor, start: int) -> Tensor:
        """Tokens start.. as the codec sees them."""
        if self.turns is None or self.turns.cos is None:
            return x
        return unrotate(x, *self.turns.of(start, start + x.shape[2]))


class RoundedLayer(CacheLayerMixin):
    """A cache layer for transformers that rounds keys and values by `Side`.

    prefill: what the prompt's own attention reads, quant: the rounded tokens, fp: the exact ones.
    late: a token decoded alone is read in 16 bits at its own step, and what is due is rounded
    after it (KIVI); otherwise before.
    hands_over: attention takes packed tokens as they are for the next token.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(
        self,
        keys: Side,
        values: Side,
        *,
        packed: bool = False,
        prefill: Prefill = "quant",
        late: bool = False,
    ) -> None:
        super().__init__()
        self.turns = Turns() if keys.pre_rope else None
        self.leads = True
        self.sides = (keys, values)
        self.packed = packed
        self.prefill = prefill
        self.late = late
        self.hands_over = False
        self.stores = (Store(keys, packed, self.turns), Store(values, packed, None))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values [B, H, t, D] -> those that attention reads [B, H, n, D].

        Packed `Held` or `Tokens`, no tensors, if `hands_over` and this is a single token.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = (key_states, value_states)
        if self.prefill == "fp" and not self.get_seq_length():
            for store, x in zip(self.stores, states, strict=True):
                store.append(x)
                store.settle()
            return states
        single = key_states.shape[2] == 1
        late = self.late and (self.prefill == "fp" or single)
        over = self.hands_over and self.packed and single
        keys, values = (
            self._advance(store, x, late, over)
            for store, x in zip(self.stores, states, strict=True)
        )
        return keys, values

    @staticmethod
    def _advance(store: Store, x: Tensor, late: bool, over: bool) -> Any:
        """Add tokens to a store -> what attention reads; `late`: before what is due is rounded."""
        store.append(x)
        if not late:
            store.settle()
        seen = store.packed_tokens() if over else store.read()
        if late:
            store.settle()
        return seen

    def share_turns(self, turns: Turns | None, leads: bool) -> None:
        """Take cos and sin from here, as all layers of the cache do; the one that leads keeps them.

        None: this layer's attention does not turn its keys.
        """
        self.turns, self.leads = turns, leads
        self.stores[0].turns = turns

    def get_seq_length(self) -> int:
        return self.stores[0].count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def mixes_tokens(self) -> bool:
        """True if padding changes what is kept of other tokens."""
        return any(side.mixes_tokens for side in self.sides)

    def rounded_tokens(self) -> tuple[int, int]:
        """Keys and values that are rounded, in tokens."""
        keys, values = self.stores
        return keys.rounded, values.rounded

    def resident_bytes(self) -> int:
        """Bytes of memory that keys and values take now, whole storages of views included."""
        held = [t.untyped_storage() for store in self.stores for t in store.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())

    def reset(self) -> None:
        for store in self.stores:
            store.reset()
        if self.turns is not None and self.leads:
            self.turns.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a rounded cache cannot drop tokens again, as speculative decoding would; "
                "generate without it"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self._batch()).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.get_seq_length():
            return
        batch = self._batch()
        rows = torch.arange(batch, device=self.device)[indices.to(self.device)]
        if self.turns is not None and self.leads:
            self.turns.select(rows, batch)
        for store in self.stores:
            store.select(rows)

    def offload(self) -> None:
        raise ValueError("a rounded cache stays where it is; generate without offloading it")

    def _batch(self) -> int:
        """Sequences held."""
        held = self.stores[0].newest
        return 0 if held is None else held.shape[0]


def joined(before: Tensor | None, after: Tensor) -> Tensor:
    """[B, H, n, D] and [B, H, t, D] along tokens, in memory of its own."""
    return after.clone() if before is None else torch.cat([before, after], 2)
