"""Texts and windows: GPTQ's protocol, file errors, calibration samples, hashes."""

from __future__ import annotations

import pytest
import torch

from backend import data
from backend.spec import Calibration


def test_windows_are_the_text_cut_once(tokenizer, text_file):
    ids = data.windows(tokenizer, f"file:{text_file}", 100)
    whole = tokenizer(text_file.read_text())["input_ids"]
    assert len(whole) == 12001  # BOS once, at the start of the text
    assert ids.shape == (120, 100)
    assert ids.dtype == torch.int64
    assert ids.flatten().tolist() == whole[:12000]
    assert (ids == 256).sum() == 1
    assert torch.equal(data.windows(tokenizer, f"file:{text_file}", 100, limit=3), ids[:3])


def test_one_whole_window_is_the_least(tokenizer, text_file):
    text_file.write_text("x" * 63)
    assert data.windows(tokenizer, f"file:{text_file}", 64).shape == (1, 64)
    with pytest.raises(
        ValueError, match=r"text .*text.txt has 64 tokens, fewer than one window of 65"
    ):
        data.windows(tokenizer, f"file:{text_file}", 65)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b" \n\t", "is empty"), (b"ab\xff", r"is not UTF-8 \(byte 2\)")],
)
def test_unusable_files(text_file, content, says):
    text_file.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        data.text_of(f"file:{text_file}")


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the text .*nothing.txt: No such file"):
        data.text_of(f"file:{tmp_path}/nothing.txt")
    with pytest.raises(ValueError, match="unknown text 'wiki'; there are demo, demo-train, wiki"):
        data.text_of("wiki")
    with pytest.raises(ValueError, match="wikitext2 is not in the local Hugging Face cache"):
        data.text_of("wikitext2")


def test_a_pinned_file_is_checked(text_file):
    name = f"file:{text_file}#{data.text_digest(f'file:{text_file}')}"
    assert data.text_of(name) == text_file.read_text()
    text_file.write_text("something else")
    with pytest.raises(ValueError, match="has changed since the run was submitted"):
        data.text_of(name)


def test_calibration_samples_are_windows_in_seeded_order(tokenizer, text_file):
    settings = Calibration(dataset=f"file:{text_file}", samples=10, length=64)
    ids, notes = data.calibration(tokenizer, settings)
    every = data.windows(tokenizer, f"file:{text_file}", 64)
    assert ids.shape == (10, 64)
    assert notes == []
    rows = {tuple(row) for row in every.tolist()}
    assert all(tuple(row) in rows for row in ids.tolist())
    assert torch.equal(data.calibration(tokenizer, settings)[0], ids)
    other, _ = data.calibration(tokenizer, settings.model_copy(update={"seed": 1}))
    assert not torch.equal(other, ids)


def test_fewer_samples_than_asked_is_a_note(tokenizer, text_file):
    settings = Calibration(dataset=f"file:{text_file}", samples=128, length=1000)
    ids, notes = data.calibration(tokenizer, settings)
    assert len(ids) == 12
    assert notes == [f"calibrated on 12 sequences of 1000 tokens, not 128: {text_file} has no more"]


def test_documents_are_drawn_as_gptq_draws_them(tokenizer, monkeypatch):
    documents = [f"document {i} " * (i % 7 + 1) for i in range(30)]
    monkeypatch.setattr(data, "documents_tuple", lambda name: tuple(documents))
    ids = data.windows(tokenizer, "c4", 40, limit=6)
    assert ids.shape == (6, 40)
    texts = [tokenizer(d)["input_ids"] for d in documents]
    for row in ids.tolist():
        assert any(row == t[i : i + 40] for t in texts for i in range(len(t) - 40))
    assert torch.equal(data.windows(tokenizer, "c4", 40, limit=6), ids)
    with pytest.raises(ValueError, match="no documents longer than 4000 tokens"):
        data.draw(tokenizer, "c4", 1, 4000, seed=0)


def test_names_for_calibration_never_mean_the_evaluation_text():
    assert data.calibration_dataset("demo", True) == "demo-train"
    assert data.calibration_dataset("wikitext2", False) == "wikitext2-train"
    assert data.calibration_dataset("c4", False) == "c4-train"
    assert data.calibration_dataset("auto", True) == "demo-train"
    assert data.calibration_dataset("auto", False) == "demo-train"  # C4 is not cached here
    assert data.evaluation_dataset("auto", False) == "demo"
    assert data.evaluation_dataset("wikitext2", True) == "wikitext2"


def test_the_hash_depends_on_ids_and_shape():
    ids = torch.arange(12).view(3, 4)
    assert data.data_hash(ids) == data.data_hash(ids.clone().int())
    assert data.data_hash(ids) != data.data_hash(ids.view(4, 3))
    assert data.data_hash(ids) != data.data_hash(ids + 1)
    assert len(data.data_hash(ids)) == 12
