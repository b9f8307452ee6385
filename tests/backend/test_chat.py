"""Prompts, answers as text, and scores along them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from backend import chat, demo
from backend.chat import AnswerText, Detokenizer, Prompt, prompt_of
from backend.dialogue import Message, Sampling, check_conversation
from backend.metrics.divergence import divergence
from backend.model.checkpoint import Checkpoint
from backend.model.families import blocks_of
from backend.model.identity import resolve
from backend.model.loading import load_tokenizer
from backend.pipeline import quantize
from backend.recipes import parse
from backend.run import Run
from backend.spec import RunSpec

BOS = 256


def said(*texts: str, system: str = "") -> list[Message]:
    """User and assistant in turn, the user first."""
    turns = [Message(("user", "assistant")[at % 2], text) for at, text in enumerate(texts)]
    return [Message("system", system), *turns] if system else turns


def pieced_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: words with a mark for the space, bytes for what has no token."""
    words = ["<s>", "</s>", "▁", "▁the", "▁sea", "a", "b", "e", "s", "h", "t", "."]
    vocab = {word: at for at, word in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "s"), ("▁s", "e"), ("▁se", "a")]
    vocab |= {a + b: len(vocab) + at for at, (a, b) in enumerate(merges) if a + b not in vocab}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {}


def tokenizer_named(name: str, byte_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    made = {
        "bytes": lambda: byte_tokenizer,
        "demo": lambda: load_tokenizer(demo.model_folder()),
        "pieces": pieced_tokenizer,
    }
    if name not in TOKENIZERS:
        TOKENIZERS[name] = made[name]()
    return TOKENIZERS[name]


@pytest.fixture
def run(make_model, tokenizer) -> Run:
    return Run(RunSpec(model={"id": "tiny"}), make_model(), tokenizer)


@pytest.fixture
def untemplated(run, tokenizer, monkeypatch) -> Run:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    return run


# -- what may be asked ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "ends with a message of the user"),
        (said("a", "b"), "ends with a message of the user"),
        ([Message("user", "a"), Message("system", "b"), Message("user", "c")], "only be the first"),
        ([Message("tool", "a"), Message("user", "b")], "role 'tool' is not one of system, user"),  # type: ignore[arg-type]
        ([Message("user", "a\ud800")], "half a character"),
        ([Message("user", "a" * 400_001)], "400,001 characters, at most 400,000"),
        (said(*["a"] * 201), "201 messages, at most 200"),
    ],
)
def test_what_no_model_can_answer_is_refused(messages, why):
    with pytest.raises(ValueError, match=why):
        check_conversation(messages)


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.01},
        {"max_new": 0},
        {"max_new": 1025},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_sampling_has_bounds(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        Sampling(**knobs)


def test_greedy_answers_have_one_seed():
    assert Sampling(0.0, 0.5, 10, 7).decisive() == Sampling(0.0, 1.0, 10, 0)
    assert Sampling(0.1, 0.5, 10, 7).decisive() == Sampling(0.1, 0.5, 10, 7)


# -- prompts -------------------------------------------------------------------------------------


def test_the_template_is_applied_once(run, tokenizer):
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    prompt = prompt_of(run, said("hi", "yes", "why", system="be kind"))
    assert tokenizer.decode(prompt.ids) == (
        "<s>system: be kind\nuser: hi\nassistant: yes\nuser: why\nassistant:"
    )
    assert prompt.ids.count(BOS) == 1
    assert (prompt.dropped, prompt.templated) == (0, True)
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    assert BOS not in prompt_of(run, said("hi")).ids  # the template decides, not the tokenizer


def test_the_demo_has_one_beginning_and_ends_each_answer(run, tokenizer):
    run.tokenizer = tokenizer_named("demo", tokenizer)
    ids = prompt_of(run, said("one", "two", "three")).ids
    assert ids.count(run.tokenizer.bos_token_id) == 1
    assert ids.count(run.tokenizer.eos_token_id) == 1


def test_without_a_template_roles_are_words(untemplated):
    prompt = prompt_of(untemplated, said(" hi ", "yes", "why", system="be kind"))
    assert not prompt.templated
    text = untemplated.tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert text == "System: be kind\nUser: hi\nAssistant: yes\nUser: why\nAssistant:"
    assert prompt.ids[0] == BOS
    assert prompt.ids.count(BOS) == 1


@pytest.mark.parametrize("system", ["", "be kind"])
@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_the_fewest_oldest_turns_are_dropped(system, sizes):
    run = RUNS["tiny"]
    texts = [str(at % 10) * size for at, size in enumerate(sizes * 2)][:-1]
    messages = said(*texts, system=system)
    prompt = prompt_of(run, messages)
    head = messages[: bool(system)]

    def ids_of(dropped: int) -> list[int]:
        return chat.templated_ids(run.tokenizer, [*head, *messages[len(head) + 2 * dropped :]])

    turns = len(sizes)
    fits = [
        n for n in range(turns) if len(ids_of(n)) <= run.context - chat.answer_room(run.context)
    ]
    assert prompt == Prompt(ids_of(min(fits)), min(fits), True)  # 60 characters always fit


RUNS: dict[str, Run] = {}


@pytest.fixture(autouse=True)
def shared_run(run) -> None:
    """For property tests, which take no fixtures of one test."""
    RUNS["tiny"] = run


def test_a_last_message_that_does_not_fit_is_refused(run):
    wide = "x" * (run.context - len("user: \nassistant:") - 1)
    assert len(prompt_of(run, said(wide)).ids) == run.context - 1  # beyond the room, yet it fits
    with pytest.raises(ValueError, match="256 tokens, the model's context is 256"):
        prompt_of(run, said(wide + "x"))


def test_a_template_that_refuses_says_so(run, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="template refuses the conversation: no system role"):
        prompt_of(run, said("hi", system="be kind"))


# -- answers -------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_answer(run):
    ids = prompt_of(run, said("hi")).ids
    one, two = (Sampling(temperature=3.0, max_new=20, seed=seed) for seed in (1, 2))
    assert list(chat.answer(run, ids, one)) == list(chat.answer(run, ids, one))
    assert list(chat.answer(run, ids, one)) != list(chat.answer(run, ids, two))


def test_a_prefix_is_continued_as_if_the_model_had_said_it(run):
    ids = prompt_of(run, said("hi")).ids
    whole = list(chat.answer(run, ids, Sampling(max_new=12)))
    rest = list(chat.answer(run, ids, Sampling(max_new=12 - 5), whole[:5]))
    assert whole[:5] + rest == whole


def test_why_an_answer_ended(run, monkeypatch):
    sampling = Sampling(max_new=6)
    monkeypatch.setattr(run, "end_tokens", set)
    for start, finish in ((100, "length"), (run.context - 4, "context")):
        new = len(list(chat.answer(run, [1] * start, sampling)))
        assert chat.finish_of(new, sampling, start, run.context) == finish
    free = list(chat.answer(run, [1] * 9, sampling))
    monkeypatch.setattr(run, "end_tokens", lambda: {free[3]})
    new = len(list(chat.answer(run, [1] * 9, sampling)))
    assert new == free.index(free[3])
    assert chat.finish_of(new, sampling, 9, run.context) == "end"


def test_no_room_for_an_answer_is_said(run):
    with pytest.raises(ValueError, match="256 tokens, the model's context is 256"):
        chat.answer(run, [1] * 250, Sampling(), [1] * 6)


# -- text ----------------------------------------------------------------------------------------


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], before=()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, before)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


WORDS = st.text(st.sampled_from("ab éß€😀　\n語th e.s"), max_size=30)


@pytest.mark.parametrize("name", ["bytes", "demo", "pieces"])
@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30) | WORDS)
def test_pieces_make_the_text_and_hold_no_half_characters(name, text):
    tokenizer = tokenizer_named(name, RUNS["tiny"].tokenizer)
    ids = chat.encoded(tokenizer, text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == chat.decoded(tokenizer, ids)
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""  # nothing was left for the end
    if name != "pieces":
        assert "".join(pieces) == text


@pytest.mark.parametrize("name", ["bytes", "demo"])
@settings(deadline=None)
@given(data=st.data())
def test_any_tokens_give_the_text_of_all_of_them_in_time(name, data):
    tokenizer = tokenizer_named(name, RUNS["tiny"].tokenizer)
    ids = data.draw(st.lists(st.integers(0, 255), max_size=40))
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == chat.decoded(tokenizer, ids)
    late = [len("".join(pieces[: at + 1])) for at in range(len(ids))]
    for at, characters in enumerate(late):  # never more than one character behind
        assert characters >= len(chat.decoded(tokenizer, ids[: at + 1])) - 3


def test_a_space_between_pieces_survives():
    tokenizer = tokenizer_named("pieces", RUNS["tiny"].tokenizer)
    the, sea = (tokenizer.convert_tokens_to_ids(word) for word in ("▁the", "▁sea"))
    assert pieces_of(tokenizer, [the, sea, the]) == ["the", " sea", " the", ""]
    assert pieces_of(tokenizer, [sea], before=[the]) == [" sea", ""]
    special = tokenizer.convert_tokens_to_ids("<s>")
    assert pieces_of(tokenizer, [the, special, sea]) == ["the", "", " sea", ""]
    assert chat.token_text(tokenizer, sea) == " sea"
    assert chat.token_text(tokenizer, special) == "<s>"


@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["a", "\n", "\nU", "\nUser", "\nUser:", "er", ":"])))
def test_an_answer_ends_where_the_user_would_speak(words):
    writer = AnswerText(Letters(words), chat.NEXT_TURN)
    text = ""
    for at in range(len(words)):
        text += writer.push(at)
        assert "".join(words[: at + 1]).startswith(text)
        assert writer.ended == (chat.NEXT_TURN in "".join(words[: at + 1]))
    text += writer.flush()
    assert text == "".join(words).partition(chat.NEXT_TURN)[0]


class Letters(Detokenizer):
    """Token n is word n."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def push(self, token: int) -> str:
        return self.words[token]

    def flush(self) -> str:
        return ""


# -- scores --------------------------------------------------------------------------------------


def test_log_probs_are_those_of_a_whole_pass(run):
    ids = torch.randint(256, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    own = chat.log_probs(run, ids, 18)
    whole = run.logits(torch.tensor([ids]))[0].log_softmax(-1)
    assert own.shape == (12, run.vocabulary)
    assert (own - whole[17:-1]).abs().max() < 1e-5
    for start in (0, 30):
        with pytest.raises(ValueError, match="nothing to score"):
            chat.log_probs(run, ids, start)


def test_scores_are_those_of_the_divergence_metric(run, make_model, tokenizer):
    other = Run(run.spec, make_model(seed=1), tokenizer)
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    base, own = (chat.log_probs(r, ids, 10) for r in (run, other))
    found = chat.score_rows(base, own, ids[10:])
    wanted = divergence(
        run.logits(torch.tensor([ids]))[0, 9:-1],
        other.logits(torch.tensor([ids]))[0, 9:-1],
        torch.tensor(ids[10:]),
    )
    assert float(found.kld.mean()) == pytest.approx(wanted["mean_kld"], rel=1e-5)
    assert math.exp(float(found.nll_base.mean())) == pytest.approx(wanted["perplexity_base"])
    p, q = base.double().exp(), own.double().exp()
    brute = (p * (p / q).log()).sum(1)
    assert found.kld.numpy() == pytest.approx(brute.numpy(), rel=1e-4)
    assert chat.score_rows(base, base, ids[10:]).kld.max() == 0
    with pytest.raises(ValueError, match="320 and 319 tokens"):
        chat.score_rows(base, own[:, :-1], ids[10:])


def test_the_likeliest_tokens_come_with_their_text(run):
    log_p = torch.full((2, run.vocabulary), -30.0)
    log_p[0, [7, 257, 319]] = torch.tensor([0.5, 0.3, 0.2]).log()
    log_p[1, 7] = 0
    first, second = chat.top_tokens(run.tokenizer, log_p)
    assert [(top.token, top.text) for top in first[:3]] == [
        (7, run.tokenizer.decode([7])),
        (257, "</s>"),
        (319, ""),
    ]
    assert [top.probability for top in first[:3]] == pytest.approx([0.5, 0.3, 0.2])
    assert (len(first), second[0].token, second[0].probability) == (5, 7, 1.0)


# -- loading -------------------------------------------------------------------------------------


def quantized(folder: Path, recipe: str, blocks: Path, tokenizer) -> RunSpec:
    """The spec of a recipe on the model of a folder, its blocks written."""
    spec = resolve(RunSpec(model={"id": str(folder)}, steps=parse(recipe)))
    model = Run.open(spec.baseline(), dtype=torch.float32).model
    ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
    quantize(model, spec.steps, ids, Checkpoint(blocks))
    return spec


def test_a_run_is_packed_where_kernels_can(llama_folder, tmp_path, tokenizer):
    spec = quantized(llama_folder, "rtn(bits=4,group=32)", tmp_path / "blocks", tokenizer)
    falls = []
    opened = chat.open_run(spec, tmp_path / "blocks", falling_back=lambda: falls.append(1))
    assert (opened.packed, opened.run.dtype, opened.notes, falls) == (True, "bfloat16", (), [])
    linears = [m for block in blocks_of(opened.run.model) for m in block.linears().values()]
    assert all(linear.packed for linear in linears)


def test_a_run_without_kernels_is_simulated_and_says_why(llama_folder, tmp_path, tokenizer):
    recipe = "gptq(bits=4,group=32,act_order=true)"
    spec = quantized(llama_folder, recipe, tmp_path / "blocks", tokenizer)
    falls = []
    opened = chat.open_run(spec, tmp_path / "blocks", falling_back=lambda: falls.append(1))
    assert (opened.packed, opened.run.dtype, falls) == (False, "float32", [1])
    (note,) = opened.notes
    assert "its speed is no speed figure" in note
    assert "act order" in note


def test_the_16_bit_model_counts_as_packed(llama_folder):
    spec = resolve(RunSpec(model={"id": str(llama_folder)}))
    opened = chat.open_run(spec, llama_folder)
    assert (opened.packed, opened.run.dtype) == (True, "bfloat16")
    wide = chat.open_run(spec, llama_folder, dtype=torch.float32)
    assert (wide.packed, wide.run.dtype) == (True, "float32")


def test_missing_blocks_are_one_sentence(llama_folder, tmp_path):
    spec = resolve(RunSpec(model={"id": str(llama_folder)}, steps=parse("rtn(bits=4)")))
    with pytest.raises(ValueError, match="block 0 is missing"):
        chat.open_run(spec, tmp_path / "blocks")
