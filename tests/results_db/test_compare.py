import math
import random

import numpy as np
import pandas as pd
import pytest

from results_db.compare import NORMAL_95, front_line, near_front, on_front, paired, unlike

DIRECTIONS = [(x, y) for x in ("lower", "higher") for y in ("lower", "higher")]


def beaten(a, b):
    return (b <= a).all() and (b < a).any()


def costs(rows, x_better, y_better):
    signs = [1 if better == "lower" else -1 for better in (x_better, y_better)]
    return [np.array([px * signs[0], py * signs[1]]) for px, py in zip(rows.x, rows.y, strict=True)]


def some_rows(rng):
    values = [0.0, 1.0, 2.0, 3.0, 4.0, math.nan, math.inf, -math.inf]
    points = [(rng.choice(values), rng.choice(values)) for _ in range(rng.randint(0, 8))]
    index = rng.sample(range(100), len(points))
    return pd.DataFrame(points, columns=["x", "y"], index=index, dtype=float)


@pytest.mark.parametrize(("x_better", "y_better"), DIRECTIONS)
def test_front_equals_brute_force(x_better, y_better):
    rng = random.Random(0)
    for _ in range(300):
        rows = some_rows(rng)
        points = costs(rows, x_better, y_better)
        brute = [
            not np.isnan(a).any() and not any(beaten(a, b) for b in points if not np.isnan(b).any())
            for a in points
        ]
        front = on_front(rows, "x", "y", x_better, y_better)
        assert front.tolist() == brute
        assert front.index.equals(rows.index)
        assert front.dtype == bool
        # Without standard errors every difference is clear.
        assert near_front(rows, "x", "y", x_better, y_better).tolist() == brute


def test_near_front_equals_brute_force():
    rng = random.Random(1)
    for _ in range(200):
        n = rng.randint(1, 8)
        rows = pd.DataFrame(
            {
                "x": [rng.choice([1, 2, 3]) for _ in range(n)],
                "y": [rng.uniform(0, 4) for _ in range(n)],
                "y__stderr": [rng.choice([0.0, 0.5, 1.0, math.nan]) for _ in range(n)],
            }
        )

        def clearly(a, b):
            error = math.hypot(np.nan_to_num(a.y__stderr), np.nan_to_num(b.y__stderr))
            sure = b.x <= a.x and a.y - b.y >= NORMAL_95 * error
            return sure and (b.x < a.x or b.y < a.y)

        each = list(rows.itertuples())
        brute = [not any(clearly(a, b) for b in each) for a in each]
        near = near_front(rows, "x", "y")
        assert near.tolist() == brute
        assert near[on_front(rows, "x", "y")].all()


def test_a_difference_within_noise_keeps_both():
    rows = pd.DataFrame({"x": [1, 1], "y": [7.0, 7.1], "y__stderr": [0.1, 0.1]})
    assert on_front(rows, "x", "y").tolist() == [True, False]
    assert near_front(rows, "x", "y").tolist() == [True, True]
    assert near_front(rows.assign(y__stderr=0.01), "x", "y").tolist() == [True, False]


@pytest.mark.parametrize(("x_better", "y_better"), DIRECTIONS)
def test_line_is_the_edge_of_what_is_attainable(x_better, y_better):
    """Between two corners the line is at the best y among points whose x is as good."""
    rng = random.Random(2)
    for _ in range(100):
        rows = some_rows(rng)
        rows = rows[np.isfinite(rows).all(axis=1)]
        line = front_line(rows, "x", "y", x_better, y_better)
        sx, sy = (1 if better == "lower" else -1 for better in (x_better, y_better))
        cost = line * [sx, sy]
        assert cost.x.is_monotonic_increasing
        assert cost.y.is_monotonic_decreasing
        for (x0, y0), (x1, y1) in zip(cost.values[:-1], cost.values[1:], strict=True):
            assert (x0 == x1) != (y0 == y1)
            within = rows[sx * rows.x <= (x0 + x1) / 2]
            assert x0 == x1 or (sy * within.y).min() == y0
        ends = set(map(tuple, rows[on_front(rows, "x", "y", x_better, y_better)].values))
        assert ends <= set(map(tuple, line.values))
        assert len(line) == max(2 * len(ends) - 1, 0)


def test_a_direction_is_one_of_two():
    with pytest.raises(ValueError, match="'lower' or 'higher'"):
        on_front(pd.DataFrame({"x": [1.0], "y": [1.0]}), "x", "y", "up")


def test_paired_difference_of_right_and_wrong_is_the_closed_form():
    """0/1 scores: (c - b)/n, and sqrt(b + c - (c - b)^2/n)/n with n - 1 for one n."""
    rng = random.Random(3)
    for _ in range(50):
        n = rng.randint(2, 60)
        before = [rng.random() < 0.7 for _ in range(n)]
        after = [rng.random() < 0.6 for _ in range(n)]
        b = sum(x and not y for x, y in zip(before, after, strict=True))
        c = sum(y and not x for x, y in zip(before, after, strict=True))
        difference, stderr = paired(before, after)
        assert difference == pytest.approx((c - b) / n, abs=1e-12)
        closed = math.sqrt(max(b + c - (c - b) ** 2 / n, 0)) / math.sqrt(n * (n - 1))
        assert stderr == pytest.approx(closed, abs=1e-9)


def test_paired_error_equals_the_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.normal(3, 1, 400)
    other = base + rng.normal(0.02, 0.1, 400)
    difference, stderr = paired(base, other)
    picks = rng.integers(0, 400, (4000, 400))
    resampled = (other - base)[picks].mean(axis=1)
    # 4000 resamples leave 1.1 % error on a standard deviation; 5 % is over four of those.
    assert stderr == pytest.approx(resampled.std(), rel=0.05)
    assert difference == pytest.approx(0.02, abs=4 * stderr)


def test_paired_edges():
    assert paired([1, 2, 3], [1, 2, 3]) == (0.0, 0.0)
    difference, stderr = paired([1.0], [3.0])
    assert difference == 2.0
    assert math.isnan(stderr)
    assert math.isnan(paired([1.0, math.nan], [1.0, 1.0])[0])
    for a, b in (([], []), ([1, 2], [1]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="same items"):
            paired(a, b)


def conditions(**columns):
    like = {"data": "wiki", "metric_id": "m1", "n": 40, "device": "cpu", "dtype": "float32"}
    like |= {"version": 1, "storage": "simulated", "unit": "ppl"}
    named = {f"ppl__{k}": [v, v] for k, v in like.items()}
    changed = {f"ppl__{k}": v for k, v in columns.items()}
    return pd.DataFrame({"is_baseline": [True, False], "ppl": [7.0, 8.0]} | named | changed)


def test_like_rows_need_no_sentence():
    assert unlike(conditions(), ["ppl", "absent"]) == []
    assert unlike(conditions(storage=["simulated", "packed"]), ["ppl"]) == []
    assert unlike(conditions(device=["cpu", "cuda"]).iloc[:1], ["ppl"]) == []
    assert unlike(conditions(device=["cpu", "cuda"]).assign(ppl=[7.0, math.nan]), ["ppl"]) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metric_id": ["m1", "m2"]}, "with different settings: m1 (1 run), m2 (1 run)"),
        ({"n": [40, 20]}, "over different numbers of items"),
        ({"device": ["cpu", "cuda"]}, "on different devices"),
        ({"dtype": ["float32", "bfloat16"]}, "in different dtypes"),
        ({"version": [1, 2]}, "by different versions"),
        ({"data": ["wiki", "c4"], "metric_id": ["m1", "m2"]}, "on different data: wiki"),
        ({"data": ["wiki", None]}, "on different data: wiki (1 run), unknown (1 run)"),
    ],
)
def test_each_difference_is_one_sentence(changed, words):
    (sentence,) = unlike(conditions(**changed), ["ppl"])
    assert sentence.startswith("ppl was measured ")
    assert words in sentence


def test_times_also_need_the_same_storage():
    timed = conditions(unit=["ms", "ms"], storage=["packed", "simulated"])
    assert "different storage" in unlike(timed, ["ppl"])[0]
    # The baseline has nothing to pack.
    assert unlike(conditions(unit=["ms", "ms"], storage=["simulated", "packed"]), ["ppl"]) == []
