"""Train the bundled model from nothing: `python -m backend.demo.train`.

Killed and started again with the same arguments, it continues from the checkpoint in --scratch.
"""

import argparse
import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from backend.demo import model_folder
from backend.demo.corpus import ASSISTANT, BEGIN, END, PAD, SPECIAL, archive, documents

CONTEXT = 1024  # tokens
VOCABULARY = 2048
STEPS = 27_000
RESTART = 20_000  # step at which the learning rate rises once more
LONG = 8_000  # step from which every third batch has rows as long as the context
# step -> weight of drills beside the 31.5 of MIXTURE, and the skills drilled: what is learned last
# gets more room
DRILLS: dict[int, tuple[float, tuple[str, ...]]] = {
    0: (8, ("codes", "lists", "race")),
    5_000: (
        8,
        ("addition", "addition", "subtraction", "subtraction", "whereabouts", "race", "lists"),
    ),
    10_000: (
        8,
        (
            *("whereabouts", "whereabouts", "race", "race", "lists", "comparison"),
            *("addition", "subtraction", "codes"),
        ),
    ),
    14_400: (
        8,
        ("whereabouts", "race", "race", "lists", "codes", "codes", "addition", "subtraction"),
    ),
    RESTART: (
        24,
        (
            *("whereabouts", "whereabouts", "whereabouts", "race", "race", "race", "lists"),
            *("lists", "codes", "addition"),
        ),
    ),
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|> {{ message.content | trim }}{{ eos_token }}"
    "{% else %}<|user|> {{ message.content | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on documents of the training side; digits stand alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(islice(documents(f"tokenizer {seed}"), 20_000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A small Llama with grouped-query attention; every width is a multiple of 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def orthogonal(g: Tensor) -> Tensor:
    """Roughly the nearest matrix with all singular values 1 (Newton-Schulz). g [N, K] -> [N, K]."""
    x = g.bfloat16() / (g.norm() + 1e-7)
    x = x.mT if len(g) > g.shape[1] else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return (x.mT if len(g) > g.shape[1] else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonal matrices, as large as a step of Adam (0.2 per weight).

    torch.optim.Muon is twenty times slower on a CPU.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix from its gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                step = orthogonal(p.grad.lerp(mean, group["momentum"]))
                p.sub_(step, alpha=0.2 * math.sqrt(max(p.shape)) * group["lr"])


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, Adam for embeddings and norms; no weight decay."""
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    return [
        Muon(blocks, lr=rate),
        torch.optim.Adam(others, lr=rate, betas=(0.9, 0.98), fused=True),
    ]


def rate_at(step: int, steps: int) -> float:
    """Factor on the learning rate: warm-up, plateau, down to 2 %; then all of it again at 60 %."""
    if step < RESTART:
        return cycle(step, min(steps, RESTART))
    return 0.6 * cycle(step - RESTART, steps - RESTART)


def cycle(step: int, steps: int) -> float:
    """One warm-up, plateau and way down."""
    return min(1.0, (step + 1) / 100, 0.02 + 1.4 * (1 - step / steps))


def shape_at(step: int, tokens: int) -> tuple[int, int]:
    """Rows and their length: short rows first, full context in every third step later on."""
    length = CONTEXT if step > LONG and step % 3 == 0 else CONTEXT // 4
    return tokens // length, length


def packed(tokenizer: PreTrainedTokenizerFast, source: Iterator[str], count: int) -> list[int]:
    """The first `count` tokens of documents one after another."""
    ids: list[int] = []
    while len(ids) < count:
        ids += tokenizer.encode("\n".join(islice(source, 8)) + "\n", add_special_tokens=False)
    return ids[:count]


def batch(
    tokenizer: PreTrainedTokenizerFast, step: int, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed documents -> inputs, targets [B, T] and the weight of each target [B, T].

    Depends on the arguments and the step alone, so a resumed run sees what an unbroken one would.
    Every row begins with a document, so that no question is cut off from its passage; rows as long
    as the context begin with a long passage of codes. Targets inside an answer weigh 1, all others
    `args.weight`, a fifth of it where most of the row is codes that nothing can foretell, and half
    of it once there are many drills.
    """
    rows, length = shape_at(step, args.tokens)
    drills, skills = [value for at, value in DRILLS.items() if step >= at][-1]
    source = documents(f"train {args.seed} {step}", drilled=skills, drills=drills)
    full = length == CONTEXT
    rng = random.Random(f"archive {args.seed} {step}")
    first = [[archive(rng, heldout=False)] if full else [] for _ in range(rows)]
    ids = torch.tensor([packed(tokenizer, chain(head, source), length + 1) for head in first])
    vocabulary = tokenizer.get_vocab()
    answer, end = vocabulary[ASSISTANT], vocabulary[END]
    opened = (ids.eq(answer).int() - ids.eq(end).int()).cumsum(1)
    inside = (opened == opened.amax(1, keepdim=True)).float()[:, :-1].reshape(rows, length)
    x, y = ids[:, :-1].reshape(rows, length), ids[:, 1:].reshape(rows, length)
    outside = args.weight / (5 if full else 2 if step >= RESTART else 1)
    return x, y, outside + (1 - outside) * inside


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16 with its tokenizer, then move it into place in one step."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half = LlamaForCausalLM(model.config)
    nn.Module.to(half, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=160,
        do_sample=False,
    )
    half.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for file in fresh.iterdir():
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def loss_of(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy. [B, T, V], [B, T], [B, T] -> scalar."""
    nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (nll * weights.flatten()).sum() / weights.sum()


def train(args: argparse.Namespace) -> None:
    """The whole run, from the tokenizer to the exported folder."""
    random.seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(args.seed)
    model = build(tokenizer, args.seed)
    opts = optimizers(model, args.rate)
    args.scratch.mkdir(parents=True, exist_ok=True)
    checkpoint = args.scratch / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(state)
    forward = torch.compile(model) if args.compile else model
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=10)
    mean = math.nan
    for step in bar:
        x, y, w = batch(tokenizer, step, args)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(input_ids=x, use_cache=False).logits
        loss = loss_of(logits, y, w)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.rate * rate_at(step, args.steps)
            opt.step()
            opt.zero_grad()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "optimizers": [opt.state_dict() for opt in opts],
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    export(model, tokenizer, args.out)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=model_folder(), help="folder of the result")
    parser.add_argument("--scratch", type=Path, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--rate", type=float, default=2.5e-3, help="highest learning rate")
    parser.add_argument("--weight", type=float, default=0.5, help="loss weight outside answers")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; needs a C++ compiler"
    )
    args = parser.parse_args()
    args.scratch = args.scratch or Path(tempfile.gettempdir()) / "quantarena-demo"
    return args


if __name__ == "__main__":
    train(parse())
