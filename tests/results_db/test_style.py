"""Counting markdown, and ratings freed of it."""

import numpy as np
import pandas as pd
import pytest
from ballots import LOST, WON, battles, column, drawn, swapped

from results_db.estimate import ELO_PER_NAT
from results_db.ratings import bradley_terry
from results_db.style import FASTCHAT, Style, StyleControl, differences, style_of

TEXT = """# Title
Some **bold** and __strong__ text, 2 * 3 * 4, not a # header.
## Part
- one
* two
  + three
1. first
22. second
-not a list
####### seven is none
```python
# a comment, not a header
- not a list, **not bold**
```
~~~
# nor this
```
- nor this, as tildes close it
~~~
### Last"""


@pytest.mark.parametrize(
    ("answers", "counts"),
    [
        ([TEXT], (3, 5, 2)),
        ([], (0, 0, 0)),
        ([""], (0, 0, 0)),
        (["# a", "# b\n- c"], (2, 1, 0)),
        (["```\n# open to the end", "# yes"], (1, 0, 0)),  # a fence never reaches the next turn
        (["````\n```\n# in four\n````\n# out"], (1, 0, 0)),
        (["see ```**x** # y``` and **z**"], (0, 0, 1)),
        (["#no\n# \n#\ttab"], (2, 0, 0)),
        (["- a\n\n- b\n\n\n1.c\n1. c"], (0, 3, 0)),
        (["**a\nb** ** ****"], (0, 0, 0)),
        (["-"], (0, 0, 0)),
    ],
)
def test_counts(answers, counts):
    characters = sum(map(len, answers))
    assert style_of(answers) == Style(*counts, characters)


def test_fences_are_cut_in_time_linear_in_the_text():
    """A hostile answer of a megabyte: thousands of fences that never close."""
    assert style_of(["```a\n" * 200_000]).headers == 0
    assert style_of(["**" * 300_000 + "\n" + "# x\n" * 50_000]).headers == 50_000


def styled(n: int, seed: int, pull: float, strength=(0.0, 0.0, 0.0)) -> pd.DataFrame:
    """Votes that lean to the longer answer by `pull` nats per (a - b) / (a + b)."""
    rng = np.random.default_rng([seed, 1])  # not the stream that drew the models
    log = drawn([0.0] * len(strength), n, seed)
    length = rng.integers(50, 500, size=(2, n))
    lean = pull * (length[0] - length[1]) / length.sum(axis=0)
    power = [log[f"model_{s}"].str[1:].astype(int).map(dict(enumerate(strength))) for s in "ab"]
    p = 1 / (1 + np.exp(-(power[0] - power[1] + lean)))
    log["winner"] = np.where(rng.random(n) < p, WON, LOST)
    zeros = {f"{name}_{s}": 0 for name in ("headers", "lists", "bold") for s in "ab"}
    return log.assign(tokens_a=length[0], tokens_b=length[1], **zeros)


def test_no_style_is_no_control():
    log = drawn([0.5, 0, -0.5], 500, seed=0)
    zeros = {f"{n}_{s}": 0 for n in ("tokens", "headers", "lists", "bold") for s in "ab"}
    found = bradley_terry(log.assign(**zeros), style=True)
    plain = bradley_terry(log)
    for name in ("rating", "low", "high"):
        assert column(found, name) == pytest.approx(column(plain, name), abs=1e-6)
    assert all(effect["coefficient"] == 0 for effect in found.attrs["style"].values())


def test_length_alone_explains_the_votes():
    """m0's answers are long and win for that; freed of it, all are equal."""
    log = styled(6000, seed=1, pull=4.0)
    long = log["model_a"] == "m0", log["model_b"] == "m0"
    for side, own in zip("ab", long, strict=True):
        log.loc[own, f"tokens_{side}"] *= 2
    lean = 4.0 * (log["tokens_a"] - log["tokens_b"]) / (log["tokens_a"] + log["tokens_b"])
    rng = np.random.default_rng(2)
    log["winner"] = np.where(rng.random(len(log)) < 1 / (1 + np.exp(-lean)), WON, LOST)
    plain, freed = bradley_terry(log), bradley_terry(log, style=True)
    assert column(plain)["m0"] - column(plain)["m1"] > 120
    base = bradley_terry(log, style=True, anchor=("m1", 1000.0)).set_index("model")
    assert base["low"]["m0"] <= 1000 <= base["high"]["m0"]
    share = lean / 4.0
    effect = freed.attrs["style"]["length"]
    truth = 4.0 * np.sqrt(np.mean(share**2))  # per root mean square
    assert effect["low"] <= truth <= effect["high"]
    assert effect["elo"] == pytest.approx(ELO_PER_NAT * effect["coefficient"])


def test_swapping_all_sides_changes_nothing_unless_centred():
    log = styled(800, seed=3, pull=2.0, strength=(0.5, 0.0, -0.5))
    found = bradley_terry(log, style=True)
    pd.testing.assert_frame_equal(bradley_terry(swapped(log), style=True), found)
    assert bradley_terry(swapped(log), style=True).attrs == found.attrs
    # Longer answers on side A: their mean is taken off, which favours side B.
    uneven = log.assign(tokens_a=log["tokens_a"] * 3)
    centred = bradley_terry(uneven, style=FASTCHAT)
    assert column(bradley_terry(swapped(uneven), style=FASTCHAT)) == pytest.approx(column(centred))
    assert centred.attrs["style"] != bradley_terry(uneven, style=True).attrs["style"]


def test_bootstrap_and_sandwich_agree_under_style_control():
    log = styled(1500, seed=4, pull=2.0, strength=(0.4, 0.0, -0.4))
    wide = [
        bradley_terry(log, style=True, interval=i, rounds=120).set_index("model").eval("high - low")
        for i in ("sandwich", "bootstrap")
    ]
    # 120 rounds leave 6.5 % error on a width.
    assert (wide[1] / wide[0]).between(0.8, 1.25).all()


def test_features_are_scaled_and_antisymmetric():
    log = styled(200, seed=5, pull=1.0)
    z = differences(log, StyleControl())
    share = (log["tokens_a"] - log["tokens_b"]) / (log["tokens_a"] + log["tokens_b"])
    assert z[0] == pytest.approx(share / np.sqrt(np.mean(share**2)))
    assert (z[1:] == 0).all()  # 0 against 0 is 0, and a spread of 0 divides by nothing
    assert (differences(swapped(log), StyleControl()) == -z).all()


def test_lengths_in_characters_where_tokens_are_missing():
    log = styled(100, seed=6, pull=1.0)
    letters = log.rename(columns={"tokens_a": "characters_a", "tokens_b": "characters_b"})
    z = differences(log, StyleControl())
    assert (differences(letters, StyleControl()) == z).all()
    some = letters.assign(tokens_a=7.0, tokens_b=[None] * 99 + [7.0])
    assert (differences(some, StyleControl()) == z).all()


def test_style_is_counted_in_the_texts_where_it_was_not_before():
    said = [[{"role": "user", "content": "# q"}, {"role": "assistant", "content": text}]
            for text in ("# a\n- b", "c" * 7)]  # fmt: skip
    log = battles(("A", "B", WON)).assign(conversation_a=[said[0]], conversation_b=[said[1]])
    z = differences(log, StyleControl(features=("headers", "lists", "length")))
    assert z.tolist() == [[1], [1], [0]]
    counted = log.assign(headers_a=0, headers_b=3)
    assert differences(counted, StyleControl(features=("headers",))).tolist() == [[-1]]


def test_unknown_features_are_refused():
    with pytest.raises(ValueError, match="No style feature 'emoji'; there are length, headers"):
        bradley_terry(styled(10, 0, 0), style=StyleControl(features=("emoji",)))
    with pytest.raises(ValueError, match="bold_a and _b"):
        bradley_terry(styled(10, 0, 0).drop(columns="bold_a"), style=True)
    assert len(bradley_terry(styled(10, 0, 0).iloc[:0], style=True)) == 0
