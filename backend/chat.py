"""Chat with a run's model: prompts from messages, answers token by token, scores along them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from backend.dialogue import Message, Role, Sampling, check_conversation
from backend.metrics.divergence import TokenScores, compare
from backend.run import Run, compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from backend.spec import RunSpec

__all__ = ["Message", "Prompt", "Sampling", "answer", "log_probs", "prompt_of"]

ROOM_SHARE, MOST_ROOM = 4, 1024  # a quarter of the context, at most so many tokens, for the answer
LONGEST_CHARACTER = 4  # bytes in UTF-8, so as many tokens at most
TOP = 5
PLAIN_ROLES: dict[Role, str] = {"system": "System", "user": "User", "assistant": "Assistant"}
NEXT_TURN = f"\n{PLAIN_ROLES['user']}:"  # where a model without a chat template speaks for the user
NO_TEMPLATE = (
    "this model has no chat template, so it was given plain text with roles; "
    "its answers say more about the text it was trained on than about quantization"
)
Finish = Literal["end", "length", "context", "stopped"]


# -- prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What the model is given."""

    ids: list[int]
    dropped: int  # oldest turns (a user's message and its answer) that the context had no room for
    templated: bool  # False: plain text with roles


def prompt_of(run: Run, messages: Sequence[Message]) -> Prompt:
    """The chat template, applied once, around as many of the last turns as leave room to answer.

    A system message stays, and so does the last turn. ValueError if that one alone is too long.
    """
    check_conversation(messages)
    tokenizer, templated = run.tokenizer, bool(run.tokenizer.chat_template)
    system = [m for m in messages[:1] if m.role == "system"]
    starts = [at for at, m in enumerate(messages) if m.role == "user"]
    starts[0] = len(system)  # an answer before the first question belongs to the first turn
    room = answer_room(run.context)

    def without(dropped: int) -> list[int]:
        kept = [*system, *messages[starts[dropped] :]]
        return templated_ids(tokenizer, kept) if templated else plain_ids(tokenizer, kept)

    # Ascending in `dropped`: the first that is not negative is the fewest turns to drop.
    dropped = bisect_left(
        range(len(starts) - 1), 0, key=lambda n: run.context - room - len(without(n))
    )
    ids = without(dropped)
    if len(ids) >= run.context:
        raise ValueError(
            f"the last message and its template take {len(ids):,} tokens, the model's context is "
            f"{run.context:,}; write a shorter one"
        )
    if not ids:
        raise ValueError("the message gives no tokens; write something")
    return Prompt(ids, dropped, templated)


def answer_room(context: int) -> int:
    """Tokens kept free for the answer. The same for every answer, so that a prompt is too."""
    return min(context // ROOM_SHARE, MOST_ROOM)


def templated_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The template's text as it is: it writes BOS itself, so the tokenizer must not add another."""
    from jinja2 import TemplateError

    conversation = [message.data() for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the conversation: {error}") from None
    return encoded(tokenizer, str(text), add_special_tokens=False)


def plain_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Roles as words, with the special tokens that the tokenizer puts around any text."""
    said = [f"{PLAIN_ROLES[m.role]}: {m.content.strip()}\n" for m in messages]
    return encoded(tokenizer, "".join([*said, f"{PLAIN_ROLES['assistant']}:"]))


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, **how: Any) -> list[int]:
    """Token ids of a text; no warning that it is long, since turns are dropped for that."""
    return list(tokenizer(text, verbose=False, **how)["input_ids"])


# -- answers -------------------------------------------------------------------------------------


def answer(
    run: Run, ids: Sequence[int], sampling: Sampling, prefix: Sequence[int] = ()
) -> Iterator[int]:
    """New tokens, at most max_new, after the prompt `ids` and the first tokens of an answer."""
    if len(ids) + len(prefix) >= run.context:
        raise ValueError(
            f"prompt and answer so far take {len(ids) + len(prefix):,} tokens, the model's context "
            f"is {run.context:,}; start a new conversation"
        )
    return run.generate(
        torch.tensor([[*ids, *prefix]]),
        max_new=sampling.max_new,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
    )


def finish_of(new: int, sampling: Sampling, given: int, context: int) -> Finish:
    """Why an answer that was left alone ended after `new` tokens; `given` are prompt and prefix."""
    if new >= sampling.max_new:
        return "length"
    return "context" if given + new >= context else "end"


class Detokenizer:
    """Text of an answer as its tokens come: each piece is what the new token makes certain.

    A token can end inside a character, and some tokenizers drop the space at the start of a text.
    So a token is decoded together with those before it, and what may become another character is
    held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        """`before`: ids that stand ahead of the answer, whose text is known."""
        self._tokenizer = tokenizer
        self._ids = list(before[-LONGEST_CHARACTER:])  # the window that is decoded
        self._known = len(self._ids)  # of them: their text is out, and whole
        self._out = decoded(tokenizer, self._ids)  # text of the window that is out

    def push(self, token: int) -> str:
        """The text that is certain with this token, "" while a character is incomplete."""
        self._ids.append(token)
        text = decoded(self._tokenizer, self._ids)
        # A decoder of byte tokens shows a whole row of them as unknown until all of it is whole.
        early = len(self._ids) - self._known < LONGEST_CHARACTER
        if early and not text.startswith(self._out):
            return ""
        end = max(len(self._out), len(text) - incomplete(text))
        news = text[len(self._out) : end]
        self._out = text[:end]
        if news and end == len(text):
            # From now on decode what gave this text and what follows it.
            del self._ids[: self._known]
            self._known = len(self._ids)
            self._out = decoded(self._tokenizer, self._ids)
        return news

    def flush(self) -> str:
        """What is left at the end, incomplete characters included."""
        text = decoded(self._tokenizer, self._ids)
        news, self._out = text[len(self._out) :], text
        return news


def incomplete(text: str) -> int:
    """Characters at the end of a decoded text that more bytes may turn into others."""
    unknown = len(text) - len(text.rstrip("\ufffd"))
    return min(unknown, LONGEST_CHARACTER - 1)


def decoded(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False
) -> str:
    """Text of ids, as it stands: no space is tidied away. `special`: with special tokens."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    return str(text)


class AnswerText:
    """Text of an answer that ends where the model would speak for the user, in `stop` words."""

    def __init__(self, detokenizer: Detokenizer, stop: str = "") -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""  # may be the start of the stop words
        self.ended = False  # the stop words came; nothing of them is text

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        return self._cut(self._detokenizer.push(token))

    def flush(self) -> str:
        """What was held back at the end."""
        text = self._cut(self._detokenizer.flush())
        return text if self.ended else text + self._held

    def _cut(self, text: str) -> str:
        if not self._stop or self.ended:
            return "" if self.ended else text
        text, found, _ = (self._held + text).partition(self._stop)
        self.ended = bool(found)
        self._held = "" if found else beginning(self._stop, text)
        return text[: len(text) - len(self._held)]


def beginning(words: str, text: str) -> str:
    """The longest end of `text` that `words` begin with."""
    sizes = range(min(len(text), len(words) - 1), 0, -1)
    return next((words[:n] for n in sizes if text.endswith(words[:n])), "")


# -- scores --------------------------------------------------------------------------------------


def log_probs(run: Run, ids: Sequence[int], start: int) -> Tensor:
    """ids [T0] -> ln p of ids[start:] before each of them [T0 - start, V], fp32 on the CPU."""
    if not 0 < start < len(ids):
        raise ValueError(f"there is nothing to score after token {start} of {len(ids)}")
    if len(ids) > run.context:
        raise ValueError(
            f"prompt and answer take {len(ids):,} tokens, the model's context is {run.context:,}"
        )
    logits = run.logits(torch.tensor([list(ids)]), keep=len(ids) - start + 1)  # [1, T + 1, V]
    return logits[0, :-1].float().log_softmax(-1).cpu()


@dataclass(frozen=True)
class Top:
    """One of the likeliest next tokens."""

    token: int
    text: str
    probability: float


def top_tokens(tokenizer: PreTrainedTokenizerBase, log_p: Tensor, k: int = TOP) -> list[list[Top]]:
    """log_p [T, V] -> the k likeliest tokens of each position."""
    chances, tokens = log_p.exp().topk(min(k, log_p.shape[1]), -1)
    texts: dict[int, str] = {}
    return [
        [
            Top(t, texts.setdefault(t, token_text(tokenizer, t)), p)
            for t, p in zip(*row, strict=True)
        ]
        for row in zip(tokens.tolist(), chances.tolist(), strict=True)
    ]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Text of one token inside a text, special tokens by their name."""
    if token >= len(tokenizer):
        return ""  # a row of the output layer that no token has
    anchor = encoded(tokenizer, "a", add_special_tokens=False)  # keeps the space in front
    alone = decoded(tokenizer, anchor, special=True)
    return decoded(tokenizer, [*anchor, token], special=True)[len(alone) :]


def score_rows(base: Tensor, own: Tensor, tokens: Sequence[int]) -> TokenScores:
    """Log-probabilities [T, V] of the 16-bit model and of this one along the tokens."""
    if base.shape != own.shape:
        raise ValueError(
            f"the models predict {base.shape[-1]} and {own.shape[-1]} tokens; they need one "
            "vocabulary"
        )
    return compare(base, own, torch.tensor(list(tokens)))


# -- loading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A run ready to chat."""

    run: Run
    packed: bool  # the 16-bit model counts as packed
    notes: tuple[str, ...]


def open_run(
    spec: RunSpec,
    blocks: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    falling_back: Callable[[], None] = lambda: None,
) -> Opened:
    """Load a finished run: packed if every linear has a kernel on this device, else simulated.

    `dtype`: what the 16-bit model computes in, to compare it with a run that computes in that.
    `falling_back` is called before a simulated model, which takes more memory, is loaded.
    """
    packed = spec.model_copy(update={"storage": "packed"})
    if spec.is_baseline:
        return Opened(opened(packed, blocks, device, dtype), True, ())
    try:
        return Opened(opened(packed, blocks, device), True, ())
    except ValueError as error:
        reason = str(error)  # the error itself would keep the half-built model in memory
    falling_back()
    # What is wrong with the files is wrong here too, and is raised.
    simulated = spec.model_copy(update={"storage": "simulated"})
    run = opened(simulated, blocks, device)
    return Opened(run, False, (f"simulated, so its speed is no speed figure: {reason}",))


def opened(spec: RunSpec, blocks: Path, device: str, dtype: torch.dtype | None = None) -> Run:
    """The run's model in the dtype that its storage computes in, unless one is given."""
    dtype = dtype or compute_dtype(spec, device, spec.storage)
    return Run.open(spec, device=device, blocks=blocks, dtype=dtype)
