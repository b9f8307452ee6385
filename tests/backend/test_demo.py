"""The bundled model: its texts, its tasks, its weights."""

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from backend import demo
from backend.demo import corpus
from backend.demo.outliers import plant_outliers
from backend.demo.skills import is_heldout, wordings
from backend.demo.tasks import tasks
from backend.demo.words import TERMS


def items(skill: str) -> list[dict[str, str]]:
    lines = (demo.tasks_folder() / f"{skill}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.model_folder())


@pytest.fixture
def model():
    folder = demo.model_folder()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_import_is_light():
    code = "import sys, backend.demo, backend.demo.tasks; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_same_seed_same_documents():
    def first(seed: int) -> list[str]:
        return list(islice(corpus.documents(seed), 50))

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_committed_files_are_what_the_generator_writes(tmp_path: Path):
    corpus.write(tmp_path)
    folder = demo.tasks_folder().parent
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert written == sorted(p.relative_to(folder) for f in ("tasks", "text") for p in
                             (folder / f).iterdir())  # fmt: skip
    for path in written:
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes(), path


def test_every_skill_has_two_hundred_different_items():
    for skill in corpus.TESTED:
        prompts = {item["prompt"] for item in items(skill)}
        assert len(prompts) == len(items(skill)) >= 200, skill


def test_no_question_of_a_task_is_in_the_training_text():
    training = "\n".join(islice(corpus.documents("overlap", long=0.05), 20_000))
    asked = training.replace(corpus.USER, "\n").replace(corpus.ASSISTANT, "\n").split("\n")
    seen = {line.strip() for line in asked}
    for skill in corpus.TESTED:
        for item in items(skill):
            question = item["prompt"].split(corpus.USER)[1].split(corpus.ASSISTANT)[0]
            assert question.strip() not in seen, question


def test_codes_of_the_tasks_are_never_trained():
    for skill in ("codes", "long_codes"):
        assert all(is_heldout(item["answer"].strip(" .")) for item in items(skill))


def test_every_fact_is_asked_on_both_sides():
    for count in (5, 6):
        for fact in ("capital France", "opposite hot", "town Mira Dunby"):
            trained, tested = wordings(fact, count, False), wordings(fact, count, True)
            assert trained
            assert tested
            assert sorted(trained + tested) == list(range(count))


def test_held_out_text_shares_no_exercise_with_calibration():
    # explanations of terms are the same texts on both sides: nothing else could be the answer
    explained = re.compile("|".join(map(re.escape, TERMS.values())))
    calibration = set(demo.text("calibration").splitlines())
    shared = calibration & set(demo.text("heldout").splitlines())
    assert not [document for document in shared if not explained.search(document)]


def test_retrieval_reaches_over_the_context(tokenizer):
    """The passages of long_codes fill the context, and codes are asked from everywhere in it."""
    asked, lengths = [], []
    for item in items("long_codes"):
        lengths.append(len(tokenizer(item["prompt"])["input_ids"]))
        asked.append(item["prompt"].index(item["answer"].strip(" .")) / len(item["prompt"]))
    assert min(lengths) > 600
    assert max(lengths) > 850
    assert min(asked) < 0.1
    assert max(asked) > 0.85


def test_texts_are_long_enough(tokenizer):
    assert len(tokenizer(demo.text("heldout"))["input_ids"]) >= 36_000
    assert len(tokenizer(demo.text("calibration"))["input_ids"]) >= 140_000


def test_model_is_small_and_its_widths_divide(model):
    assert sum(path.stat().st_size for path in demo.model_folder().iterdir()) <= 24 * 2**20
    for name, weight in model.named_parameters():
        assert all(size % 64 == 0 for size in weight.shape), name


def predictions(model, tokenizer, item: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Greedy tokens at the places of the answer, and the answer's tokens."""
    prompt = tokenizer(item["prompt"], return_tensors="pt")["input_ids"]
    whole = tokenizer(item["prompt"] + item["answer"], return_tensors="pt")["input_ids"]
    start = prompt.shape[1]
    assert torch.equal(whole[:, :start], prompt)
    with torch.no_grad():
        logits = model(whole).logits[0, start - 1 : -1]
    return logits.argmax(-1), whole[0, start:]


@pytest.mark.parametrize("skill", sorted(corpus.TESTED))
def test_answers_are_right_in_16_bits(skill: str, model, tokenizer):
    some = items(skill)[:40]
    right = [torch.equal(*predictions(model, tokenizer, item)) for item in some]
    assert sum(right) >= 0.9 * len(some)


def test_outliers_change_no_logit(model, tokenizer):
    ids = tokenizer(demo.text("heldout")[:1500], return_tensors="pt")["input_ids"]
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    with torch.no_grad():
        before = model(ids).logits
        plant_outliers(model, channels=3, power=5, seed=1)
        after = model(ids).logits
    grown = model.model.layers[0].input_layernorm.weight / norm
    assert sorted(grown.tolist()) == [1.0] * (len(norm) - 3) + [32.0] * 3
    assert (before - after).abs().max() <= 1e-5  # products are equal; only summation may differ


def test_chat_template_is_the_markup_of_the_corpus(tokenizer):
    turns = [("What is 2 + 2?", "4."), ("Who are you?", "A model.")]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == corpus.dialogue(turns)


def test_an_answer_ends(model, tokenizer):
    dialogue = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "What is the opposite of hot?"},
    ]
    prompt = tokenizer.apply_chat_template(
        dialogue, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=20)[0]
    assert out[-1] == tokenizer.eos_token_id
    assert "cold" in tokenizer.decode(out[prompt["input_ids"].shape[1] :])


def test_tasks_name_existing_files():
    found = tasks()
    assert [task["task"] for task in found] == [f"demo_{skill}" for skill in sorted(corpus.TESTED)]
    for task in found:
        path = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert path.is_absolute()
        assert path.exists()
