"""Mining: put prompts to the variants of a model, and measure how far each answer is from 16 bits.

Two models are in memory at a time, the 16-bit one and one variant. Every answer is kept, so that a
chat or a battle over a mined prompt begins at once. What is reported is not done again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch

from backend.chat import (
    NEXT_TURN,
    NO_TEMPLATE,
    AnswerText,
    Detokenizer,
    Finish,
    Opened,
    answer,
    finish_of,
    log_probs,
    open_run,
    prompt_of,
    score_rows,
)
from backend.dialogue import Message, Sampling
from backend.environment import environment
from backend.execute import BLOCKS, SPEC, events
from backend.metrics.divergence import TokenScores
from backend.pipeline import Cancelled
from backend.prompts import Prompt, by_id, digest, pool
from backend.run import Run
from backend.spec import MineSpec, ModelRef, RunSpec

Emit = Callable[..., None]


@dataclass(frozen=True)
class Answered:
    """An answer that ended by itself, and how it came about."""

    pieces: tuple[tuple[int, str], ...]  # token, and the text that it made certain
    finish: Finish
    ttft_s: float | None
    seconds: float
    dropped: int
    notes: tuple[str, ...]
    packed: bool
    dtype: str

    @property
    def tokens(self) -> list[int]:
        """Token ids."""
        return [token for token, _ in self.pieces]

    @property
    def text(self) -> str:
        """What is read."""
        return "".join(text for _, text in self.pieces)

    @property
    def digest(self) -> str:
        """16 hex digits over the text: two answers that read alike are alike."""
        return sha256(self.text.encode("utf-8", "replace")).hexdigest()[:16]

    @property
    def storage(self) -> str:
        """How the weights were held."""
        return "packed" if self.packed else "simulated"


@dataclass(frozen=True)
class Distance:
    """How far a variant is from the 16-bit model along the 16-bit answer."""

    kld: float | None  # nats, mean over its tokens; None where it has none
    kld_max: float | None
    agreement: float | None  # share of its tokens at which both prefer the same token

    @staticmethod
    def of(scores: TokenScores) -> Distance:
        """From the scores of its tokens."""
        kld, same = scores.kld, scores.same
        return Distance(float(kld.mean()), float(kld.max()), float(same.mean()))


ITSELF = Distance(0.0, 0.0, 1.0)
UNKNOWN = Distance(None, None, None)


class Answers(Protocol):
    """Where answers are kept."""

    def get(
        self, artifact: str, messages: Sequence[Message], sampling: Sampling, how: Opened
    ) -> Answered | None:
        """The answer that a model held like this gave before."""

    def put(
        self, artifact: str, messages: Sequence[Message], sampling: Sampling, given: Answered
    ) -> None:
        """Keep an answer."""


@dataclass(frozen=True)
class Variant:
    """What a finished run made."""

    run_id: str
    spec: RunSpec
    blocks: Path


def mine(
    spec: MineSpec,
    folder: Path,
    *,
    device: str,
    home: Path,
    emit: Emit,
    should_stop: Callable[[], bool],
    answers: Answers,
) -> None:
    """The job in `folder`. Raises Cancelled; any other exception is a failure."""
    prompts = by_id(pool(spec.model.id, home), spec.prompts)
    if digest(prompts) != spec.pool:
        raise ValueError("the prompts have changed since the job was submitted; submit it again")
    variants = [variant_of(home, run_id, spec.model) for run_id in spec.runs]
    emit("env", env={**environment(), "threads": torch.get_num_threads()})
    done = {(e["run_id"], e["prompt_id"]) for e in events(folder) if e["type"] == "mined"}
    Mining(spec, device, emit, should_stop, answers).work(prompts, variants, done)


def variant_of(home: Path, run_id: str, model: ModelRef) -> Variant:
    """A run's folder -> its variant. ValueError in one sentence if it made none of this model."""
    folder = home / "runs" / run_id
    try:
        spec = RunSpec.model_validate_json((folder / SPEC).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"the spec of run {run_id} cannot be read; leave this run out") from None
    if spec.model != model:
        raise ValueError(f"run {run_id} is one of {spec.model.id}, not of this {model.id}")
    return Variant(run_id, spec, folder / BLOCKS)


class Mining:
    """One job at work."""

    def __init__(
        self,
        spec: MineSpec,
        device: str,
        emit: Emit,
        should_stop: Callable[[], bool],
        answers: Answers,
    ) -> None:
        self.sampling = spec.sampling()
        self.plain = RunSpec(model=spec.model)  # the 16-bit model; no run of it is needed
        self.device = device
        self.emit = emit
        self.should_stop = should_stop
        self.answers = answers
        self._base: Opened | None = None

    def work(
        self,
        prompts: Sequence[Prompt],
        variants: Sequence[Variant],
        done: Collection[tuple[str, str]],
    ) -> None:
        """Every answer that is not among the `done` (run, prompt)."""
        left = {v.run_id: [p for p in prompts if (v.run_id, p.id) not in done] for v in variants}
        asked = [p for p in prompts if any(p in own for own in left.values())]
        steps = len(asked) + len(prompts) * len(variants)
        meter = Meter(self.emit, steps, len(prompts) * len(variants) - sum(map(len, left.values())))
        base = self.base_answers(asked, meter) if asked else {}
        wrong: list[str] = []
        for at, variant in enumerate(variants, 1):
            own = [p for p in left[variant.run_id] if p.id in base]
            try:
                self.variant(variant, own, base, meter.named(f"variant {at} of {len(variants)}"))
            except ValueError as error:
                wrong.append(f"run {variant.run_id}: {' '.join(str(error).split())}")
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(variants)} variants could not be asked, the others are "
                f"done; {'; '.join(wrong)}"
            )
        meter.end()

    def base_answers(self, asked: Sequence[Prompt], meter: Meter) -> dict[str, Answered]:
        """{prompt id: the 16-bit answer}; a prompt that does not fit the context is left out."""
        base, step = self.base(), meter.named("16-bit answers")
        found = {}
        for prompt in asked:
            try:
                found[prompt.id] = self.answered(base, self.plain.artifact_id(), prompt)
            except ValueError as error:
                text = f"prompt {prompt.id} is left out: {error}"
                self.emit("note", block=None, module="", text=text)
            step(prompt)
        return found

    def base(self, dtype: str = "") -> Opened:
        """The 16-bit model, as a chat holds it or in another dtype; one at a time."""
        if self._base is None or (dtype and self._base.run.dtype != dtype):
            self._base = None
            release()
            wanted = getattr(torch, dtype) if dtype else None
            self._base = open_run(self.plain, Path(), device=self.device, dtype=wanted)
        return self._base

    def variant(
        self,
        variant: Variant,
        prompts: Sequence[Prompt],
        base: Mapping[str, Answered],
        step: Callable[[Prompt], None],
    ) -> None:
        """One variant's answers to some prompts, each reported."""
        if not prompts:
            return
        if variant.spec.is_baseline:
            for prompt in prompts:
                self.report(variant, prompt, base[prompt.id], base[prompt.id], ITSELF)
                step(prompt)
            return
        opened = open_run(variant.spec, variant.blocks, device=self.device)
        plain = self.base(opened.run.dtype).run
        for prompt in prompts:
            given = self.answered(opened, variant.spec.artifact_id(), prompt)
            distance = along(plain, opened.run, messages_of(prompt), base[prompt.id])
            self.report(variant, prompt, given, base[prompt.id], distance)
            step(prompt)
        del opened
        release()

    def answered(self, opened: Opened, artifact: str, prompt: Prompt) -> Answered:
        """The model's answer to the first turn, from those given before where it is there."""
        messages = messages_of(prompt)
        known = self.answers.get(artifact, messages, self.sampling, opened)
        if known is None:
            known = answer_to(opened, messages, self.sampling, self.should_stop)
            self.answers.put(artifact, messages, self.sampling, known)
        return known

    def report(
        self,
        variant: Variant,
        prompt: Prompt,
        given: Answered,
        base: Answered,
        distance: Distance,
    ) -> None:
        """One row: the answer beside the 16-bit one."""
        self.emit(
            "mined",
            run_id=variant.run_id,
            artifact_id=variant.spec.artifact_id(),
            prompt_id=prompt.id,
            category=prompt.category,
            language=prompt.language,
            prompt=prompt.turns[0],
            kld=distance.kld,
            kld_max=distance.kld_max,
            agreement=distance.agreement,
            departs=departure(given.tokens, base.tokens),
            tokens=len(given.pieces),
            base_tokens=len(base.pieces),
            finish=given.finish,
            identical=given.text == base.text,
            answer_hash=given.digest,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_new=self.sampling.max_new,
            seed=self.sampling.seed,
            device=self.device_name(),
            dtype=given.dtype,
            storage=given.storage,
        )
        if self.should_stop():
            raise Cancelled

    def device_name(self) -> str:
        """cpu, or the GPU's own name."""
        if self.device.startswith("cuda"):
            return torch.cuda.get_device_name(torch.device(self.device))
        return self.device


class Meter:
    """Progress of the stage in answers."""

    def __init__(self, emit: Emit, total: int, done: int) -> None:
        self.emit, self.total, self.done = emit, total, done

    def named(self, where: str) -> Callable[[Prompt], None]:
        """What to call after each answer of a part of the work."""

        def step(prompt: Prompt) -> None:
            self.done += 1
            self._tell(min(self.done / max(self.total, 1), 0.999), f"{where}, {prompt.id}")

        return step

    def end(self) -> None:
        """Everything is answered."""
        self._tell(1.0, "")

    def _tell(self, fraction: float, item: str) -> None:
        self.emit("progress", stage="mine", block=None, blocks=None, item=item, fraction=fraction)


def messages_of(prompt: Prompt) -> tuple[Message, ...]:
    """What begins a conversation about a prompt."""
    return (Message("user", prompt.turns[0]),)


def answer_to(
    opened: Opened,
    messages: Sequence[Message],
    sampling: Sampling,
    should_stop: Callable[[], bool] = lambda: False,
) -> Answered:
    """A whole answer, as a chat with this model gives it. Raises Cancelled when told to stop."""
    run, began, first_s = opened.run, time.perf_counter(), None
    prompt = prompt_of(run, messages)
    stop = "" if prompt.templated else NEXT_TURN
    writer = AnswerText(Detokenizer(run.tokenizer, prompt.ids), stop)
    pieces: list[tuple[int, str]] = []
    for token in answer(run, prompt.ids, sampling):
        if should_stop():
            raise Cancelled
        first_s = first_s or time.perf_counter() - began
        pieces.append((token, writer.push(token)))
        if writer.ended:
            break
    finish = finish_of(len(pieces), sampling, len(prompt.ids), run.context)
    if pieces:
        token, text = pieces[-1]
        pieces[-1] = token, text + writer.flush()
    return Answered(
        pieces=tuple(pieces),
        finish="end" if writer.ended else finish,
        ttft_s=first_s,
        seconds=time.perf_counter() - began,
        dropped=prompt.dropped,
        notes=opened.notes if prompt.templated else (*opened.notes, NO_TEMPLATE),
        packed=opened.packed,
        dtype=run.dtype,
    )


def along(plain: Run, run: Run, messages: Sequence[Message], base: Answered) -> Distance:
    """Of `run` from the 16-bit model along the 16-bit answer, its end included."""
    prompt = prompt_of(plain, messages)
    whole = base.finish == "end" and prompt.templated
    ends = sorted(plain.end_tokens())[:1] if whole else []
    tokens = [*base.tokens, *ends][: plain.context - len(prompt.ids)]
    if not tokens:
        return UNKNOWN
    ids, start = [*prompt.ids, *tokens], len(prompt.ids)
    own = log_probs(run, ids, start)  # [T, V]
    return Distance.of(score_rows(log_probs(plain, ids, start), own, tokens))


def departure(one: Sequence[int], other: Sequence[int]) -> int:
    """Index of the first token that differs; the length of the shorter where none does."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def release() -> None:
    """Give back the memory of a model that is gone."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
