"""Needle in a haystack: prompts against brute force, scores against an oracle, the demo's grid."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch

from backend.demo import tasks_folder
from backend.demo.skills import is_heldout
from backend.metrics import METRICS, needle
from backend.metrics.needle import FIVE_KEYS, INTRO, Answer, Prompt, TooShort, lay, remembering
from backend.model import loading
from backend.recipes import parse
from backend.run import Run
from backend.spec import ModelRef, RunSpec


@pytest.fixture(scope="module")
def demo():
    return loading.load(ModelRef(id="demo"), "cpu", torch.float32)


def demo_run(demo, recipe: str = "") -> Run:
    return Run(RunSpec(model={"id": "demo"}, steps=parse(recipe) if recipe else ()), *demo)


@pytest.fixture
def text_run(make_model, tokenizer):
    """A random model of another name, one token per byte, with a context of 2,100."""
    model = make_model("llama", max_position_embeddings=2100)
    return Run(RunSpec(model={"id": "other"}), model, tokenizer)


def metric(**knobs):
    return METRICS.build({"kind": "needle", **knobs})


def measured(run: Run, **knobs):
    (found,) = metric(**knobs).measure(run)
    return found


def as_oracle(run: Run, monkeypatch, answer=lambda key: f" {key}.") -> None:
    """The run answers with the key that stands in the prompt beside what is asked for."""

    def generate(ids, *, max_new):
        text = run.tokenizer.decode(ids[0].tolist())
        name = text.rsplit("What is the ", 1)[1].split("?")[0]
        key = text.split(f"he {name} is ", 1)[1].split(".")[0]
        yield from needle.plain_ids(run.tokenizer, answer(key))[:max_new]

    monkeypatch.setattr(run, "generate", generate)


# -- where needles lie ---------------------------------------------------------------------------


def puzzle(words: list[int], count: int = 1) -> needle.Puzzle:
    """Filler sentences of `words` letters, needles of five capitals, a question of two signs."""
    return needle.Puzzle(
        before=[1, 2, 3],
        filler=[chr(ord("a") + at % 26) * n for at, n in enumerate(words)],
        needles=["NEEDL"] * count,
        keys=["K"] * count,
        questions=["??"] * count,
    )


def by_letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize("seed", range(40))
def test_a_needle_lies_at_the_last_sentence_end_before_its_depth(seed):
    rng = random.Random(seed)
    words = [rng.randint(1, 9) for _ in range(rng.randint(0, 30))]
    depth = rng.choice([0, 100, rng.uniform(0, 100)])
    length = rng.randint(21, 150)
    (prompt,) = lay(puzzle(words), by_letters, length, [depth])
    assert len(prompt.ids) + prompt.room <= length
    fitting, total = [], 0  # brute force: sentence by sentence
    for count in words:
        if total + count > length - 3 - 5 - 2 - 2 - needle.SPARE:
            break
        fitting.append(count)
        total += count
    ends = [sum(fitting[:at]) for at in range(len(fitting) + 1)]
    allowed = max(end for end in ends if end <= round(depth / 100 * total))
    assert prompt.start == 3 + allowed
    assert prompt.ids[prompt.start : prompt.stop] == by_letters("NEEDL")
    rest = prompt.ids[: prompt.start] + prompt.ids[prompt.stop :]
    text = "".join(chr(ord("a") + at % 26) * n for at, n in enumerate(fitting))
    assert rest == [1, 2, 3, *by_letters(text + "??")]


def test_a_length_without_room_for_the_needle_is_refused():
    lay(puzzle([4, 4]), by_letters, 20 + 1, [50])
    least = 3 + 5 + 2 + len(" K") + needle.SPARE
    assert lay(puzzle([4]), by_letters, least, [50])[0].start == 3
    with pytest.raises(TooShort, match=f"which take {least}"):
        lay(puzzle([4]), by_letters, least - 1, [50])


def test_several_needles_lie_in_one_haystack_in_order():
    prompts = lay(puzzle([2] * 20, 3), by_letters, 100, [10, 40, 70])
    assert [p.start for p in prompts] == [3 + 4, 3 + 16 + 5, 3 + 28 + 10]
    assert len({tuple(p.ids) for p in prompts}) == 1
    together = lay(puzzle([2] * 20, 2), by_letters, 100, [100, 100])
    assert [p.start for p in together] == [43, 48]


# -- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("needles", [1, 3])
def test_the_demo_grid_is_within_its_lengths_and_at_its_depths(demo, needles):
    run, asked = demo_run(demo), metric(needles=needles, repeats=2)
    grid = asked.grid(run)
    assert grid.lengths == [128, 256, 384, 512, 768, 1024]
    places = product(grid.lengths, grid.depths, range(2), range(needles))
    code = len(needle.plain_ids(run.tokenizer, " The code of the turquoise umbrella is 1234."))
    for (length, depth, _, at), prompt in zip(places, grid.prompts, strict=True):
        assert len(prompt.ids) + prompt.room <= length <= run.context
        assert len(prompt.ids) + prompt.room > length - code - needle.SPARE - 4
        text = run.tokenizer.decode(prompt.ids)
        own = run.tokenizer.decode(prompt.ids[prompt.start : prompt.stop])
        assert own.endswith(f" is {prompt.key}.")
        assert text.count(prompt.key) == 1
        assert is_heldout(prompt.key)
        question = own.removeprefix(" The").split(" is ")[0]
        assert text.endswith(f"What is the{question}?<|assistant|>")
        hay = len(prompt.ids) - (prompt.stop - prompt.start) * needles
        wanted = (depth + at * (100 - depth) / needles) / 100
        others = at * (prompt.stop - prompt.start)
        # Moved back by less than a sentence; question and opening belong to no depth.
        assert abs((prompt.start - others) - wanted * hay) <= code + 0.02 * length + 16


def test_demo_prompts_are_worded_as_the_bundled_task(demo):
    line = (tasks_folder() / "long_codes.jsonl").read_text(encoding="utf-8").splitlines()[0]
    prompt = metric(lengths=(128,), depths=1).grid(demo_run(demo)).prompts[0]
    text = demo[1].decode(prompt.ids)
    for part in ("<|begin|><|user|> The code of the ", ". What is the code of the "):
        assert part in text
        assert part in line
    assert text.endswith("?<|assistant|>")


def test_the_same_seed_is_the_same_grid_and_another_is_not(demo):
    keys = [
        [p.key for p in metric(lengths=(256,), seed=seed).grid(demo_run(demo)).prompts]
        for seed in (0, 0, 1)
    ]
    assert keys[0] == keys[1] != keys[2]
    assert len(set(keys[0])) > 25  # 33 draws of 1,125 codes
    first, again = (metric(lengths=(256,)).data_hash(demo_run(demo)) for _ in range(2))
    assert first == again != metric(lengths=(256,), seed=1).data_hash(demo_run(demo))


def test_a_text_grid_fits_the_context_and_says_what_it_leaves_out(text_run, monkeypatch):
    notes: list[str] = []
    text_run.note = notes.append
    as_oracle(text_run, monkeypatch)
    found = measured(text_run, lengths=(200, 1024, 4096), depths=3, repeats=1)
    assert found.detail["lengths"] == [1024]
    assert list(found.detail["left_out"]) == ["200", "4096"]
    assert "longer than the context of 2100" in found.detail["left_out"]["4096"]
    assert "which take" in found.detail["left_out"]["200"]
    assert len(notes) == 2
    assert found.n == 3
    with pytest.raises(ValueError, match="no length can be asked: 30 is shorter"):
        measured(text_run, lengths=(30,))


@pytest.mark.parametrize(
    ("context", "lengths"),
    [
        (1024, [128, 256, 384, 512, 768, 1024]),
        (2048, [1024, 2048]),
        (2100, [1024, 2048, 2100]),
        (32768, [1024, 2048, 4096, 8192, 16384, 32768]),
        (131072, [1024, 2048, 4096, 8192, 16384, 32768]),
    ],
)
def test_lengths_go_up_to_the_context(context, lengths):
    assert metric().length_list(context) == lengths
    assert metric().read_tokens(context) == 33 * sum(lengths)


def test_pass_keys_stand_once_in_their_wording(text_run):
    for prompt in metric(lengths=(900,), depths=3).grid(text_run).prompts:
        text = text_run.tokenizer.decode(prompt.ids)
        assert text.startswith(f"<s>{INTRO}\n The ")
        stated = f" The pass key is {prompt.key}. Remember it. {prompt.key} is the pass key."
        assert text.count(stated) == 1
        assert text.count(prompt.key) == 2
        assert text.endswith("What is the pass key? The pass key is")
        assert not prompt.key.isdigit()
        assert not prompt.key.isalpha()


def test_a_chat_template_goes_around_all_of_it(text_run):
    (prompt, *_) = metric(lengths=(900,), depths=1, template=True).grid(text_run).prompts
    text = text_run.tokenizer.decode(prompt.ids)
    assert text.startswith(f"user: {INTRO}\n The ")
    assert text.endswith("What is the pass key?\nassistant: The pass key is")
    text_run.tokenizer.chat_template, kept = None, text_run.tokenizer.chat_template
    try:
        run = Run(text_run.spec, text_run.model, text_run.tokenizer)
        with pytest.raises(ValueError, match="no chat template"):
            metric(template=True).grid(run)
    finally:
        text_run.tokenizer.chat_template = kept


def test_the_five_needle_protocol_hides_the_published_keys_at_half_depth(text_run, demo):
    prompts = metric(protocol="five").grid(text_run).prompts
    assert [p.key for p in prompts] == list(FIVE_KEYS)
    for prompt in prompts:
        assert len(prompt.ids) + prompt.room <= text_run.context
        # opening and question take 190 of 2,100 tokens
        assert prompt.start / len(prompt.ids) == pytest.approx(0.5, abs=0.05)
    assert len({tuple(p.ids[: p.start]) for p in prompts}) == 1
    assert len(metric(protocol="five").grid(demo_run(demo)).prompts) == 5


def test_the_five_needle_haystack_ends_where_the_published_one_does(text_run, monkeypatch):
    monkeypatch.setattr(type(text_run), "context", 1 << 20)
    prompt = metric(protocol="five").grid(text_run).prompts[0]
    text = text_run.tokenizer.decode(prompt.ids)
    assert text.count("There and back again.") == 1270
    before, after = text.split("The pass key is 47x291. Remember it. 47x291 is the pass key.")
    assert before.count("Here we go.") == after.count("Here we go.") == 635


# -- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("needles", [1, 4])
def test_a_model_that_reads_the_prompt_finds_everything(demo, text_run, monkeypatch, needles):
    for run, lengths in ((demo_run(demo), (128, 1024)), (text_run, (1500, 2100))):
        as_oracle(run, monkeypatch)
        found = measured(run, lengths=lengths, depths=5, repeats=2, needles=needles)
        assert found.value == 1.0
        assert found.detail["prefix_score"] == 1.0
        assert found.n == 2 * 5 * 2 * needles


def test_cells_equal_brute_force(demo, monkeypatch):
    run = demo_run(demo)
    as_oracle(run, monkeypatch, lambda key: key if int(key) % 3 else key[:2] + "0")
    knobs = {"lengths": (128, 256, 512), "depths": 4, "repeats": 5, "needles": 2}
    found, prompts = measured(run, **knobs), metric(**knobs).grid(run).prompts
    right = np.array([int(p.key) % 3 > 0 for p in prompts], float)
    assert found.items == right.tolist()
    assert found.value == pytest.approx(right.mean())
    assert found.detail["cells"] == right.reshape(3, 4, 10).mean(2).tolist()
    haystacks = right.reshape(-1, 2).mean(1)
    assert found.stderr == pytest.approx(haystacks.std(ddof=1) / len(haystacks) ** 0.5)
    assert found.detail["keys"] == [p.key for p in prompts]
    assert found.detail["tokens"] == [len(p.ids) for p in prompts]


@pytest.mark.parametrize(
    ("text", "correct", "prefix"),
    [
        (" 47x291.", 1, 1),
        ("It is 47x291", 1, 0),
        (" 47x", 0, 0.5),
        ("47x192", 0, 0.5),
        ("", 0, 0),
    ],
)
def test_an_answer_counts_if_it_contains_the_key(text, correct, prefix):
    found = Answer(Prompt([], "47x291", 8, 0, 1), text, {}, 0.0)
    assert found.correct == correct
    assert found.prefix == prefix


def test_answers_are_greedy(demo):
    run = demo_run(demo)
    (prompt, *_) = metric(lengths=(256,), depths=1).grid(run).prompts
    ids = list(prompt.ids)
    for _ in range(6):
        ids.append(int(run.logits(torch.tensor([ids]))[0, -1].argmax()))
    said = needle.answer(run, prompt).text
    assert said == run.tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True)
    assert prompt.key in said


def test_the_16_bit_demo_finds_nine_in_ten(demo):
    """The whole default grid, to the full context: 0.99 when written."""
    found = measured(demo_run(demo))
    assert found.n == 6 * 11 * 3
    assert found.value >= 0.95
    held = np.array(found.detail["cells"]) == 1
    assert held.mean() >= 0.9


# -- rounded caches ------------------------------------------------------------------------------


def test_every_answer_has_the_share_of_its_own_cache(demo):
    run = demo_run(demo, "kivi(bits=2,group=32,residual=64)")
    found = measured(run, lengths=(128, 512), depths=3, repeats=1)
    detail = found.detail
    told = detail["cache_rounded"]["fp"]
    for side in ("keys", "values"):
        shares = detail[f"rounded_{side}"]
        assert len(shares) == found.n
        assert told[side] == pytest.approx(np.mean(shares), abs=1e-3)
        assert max(shares[:3]) < min(shares[3:])  # the residual weighs more in a short cache
    for tokens, keys, values in zip(
        detail["tokens"], detail["rounded_keys"], detail["rounded_values"], strict=True
    ):
        low, high = tokens / (tokens + needle.SPARE + 8), (tokens + needle.SPARE + 8) / tokens
        assert low <= keys / ((tokens - tokens % 64) / tokens) <= high
        assert low <= values / ((tokens - 64) / tokens) <= high
    # the last needle of the short prompts is among the newest tokens
    assert detail["needle_rounded"][2] == 0.0
    assert detail["needle_rounded"][0] == detail["needle_rounded"][3] == 1.0


def test_the_rounded_share_of_a_needle_equals_a_count_of_tokens(demo):
    run = demo_run(demo, "kivi(bits=2,group=32,residual=64)")
    for start, stop in ((0, 13), (120, 133), (125, 140), (300, 313)):
        prompt = Prompt([0] * 201, "1", 8, start, stop)
        keys = [at < 192 for at in range(start, stop)]
        values = [at < 201 - 64 for at in range(start, stop)]
        assert needle.needle_rounded(run, prompt) == pytest.approx(np.mean(keys + values))
    assert needle.needle_rounded(demo_run(demo), Prompt([0], "1", 8, 0, 1)) == 0.0


def test_a_residual_as_long_as_the_context_answers_as_16_bits_do(demo):
    knobs = {"lengths": (256, 512), "depths": 3, "repeats": 1}
    plain = measured(demo_run(demo), **knobs)
    kept = measured(demo_run(demo, "kivi(bits=2,group=32,residual=1024)"), **knobs)
    assert kept.detail["answers"] == plain.detail["answers"]
    assert set(kept.detail["needle_rounded"]) == {0.0}
    assert kept.detail["cache_rounded"] == {"fp": {"keys": 0.0, "values": 0.0}}


def test_two_bits_lose_keys_that_four_bits_keep(demo):
    knobs = {"lengths": (512, 1024), "depths": 5, "repeats": 2}
    four, two = (
        measured(demo_run(demo, f"kivi(bits={bits},group=32,residual=32)"), **knobs)
        for bits in (4, 2)
    )
    assert four.value >= 0.9
    assert two.value <= four.value - 0.2


def test_remembered_sentences_are_tokens_of_their_own(demo):
    ids_of = remembering(demo[1])
    assert ids_of(" The sky is blue.") is ids_of(" The sky is blue.")
    assert demo[1].decode(ids_of(" The sky is blue.")) == " The sky is blue."
