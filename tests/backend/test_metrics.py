"""Metrics: conformance of every one of them, and the maths against definitions and vectors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.demo.tasks import tasks
from backend.methods import METHODS
from backend.methods.base import Seen
from backend.metrics import METRICS, Measurement
from backend.metrics.divergence import (
    LEAST_TOKENS,
    TokenScores,
    compare,
    correlation,
    divergence,
    measurements,
    perplexities,
    quantile,
    uncertainty,
)
from backend.metrics.perplexity import perplexity
from backend.metrics.speed import PeakMemory, spread
from backend.metrics.tasks import choose_items, mean_of
from backend.metrics.text import token_nll
from backend.model import loading
from backend.model.stats import LayerStats
from backend.pipeline import Cancelled
from backend.run import Run
from backend.spec import ModelRef, RunSpec

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
needs_vectors = pytest.mark.skipif(
    not (VECTORS / "divergence_a.npz").is_file(), reason="the shared test vectors are not here"
)


def logits_pair(n: int, v: int, noise: float, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(n, v, generator=g) * 2
    quant = base + noise * torch.randn(n, v, generator=g)
    return base, quant, torch.randint(v, (n,), generator=g)


# -- token NLL and perplexity ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nll_equals_float64(dtype):
    logits, _, targets = logits_pair(70, 33, 0)
    logits = logits.to(dtype)
    exact = -logits.double().log_softmax(1)[torch.arange(70), targets]
    # fp32 log-sum-exp of logits below 10: a few units in the 7th digit
    assert (token_nll(logits, targets) - exact).abs().max() < 2e-6


def test_nll_in_chunks_equals_nll_at_once():
    logits, _, targets = logits_pair(1000, 1500, 0)  # 174 rows a chunk
    whole = -logits.log_softmax(1)[torch.arange(1000), targets]
    assert torch.equal(token_nll(logits, targets), whole.double())


def test_uniform_logits_give_the_vocabulary_size():
    nll = token_nll(torch.zeros(60, 37), torch.arange(60) % 37).view(3, 20)
    assert perplexity(nll, {}).value == pytest.approx(37, rel=1e-6)


def test_perplexity_is_window_means_of_equal_weight():
    nll = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.5, 0.5]], dtype=torch.float64)
    found = perplexity(nll, {})
    means = [1.5, 3.5, 0.5]
    se = np.std(means, ddof=1) / math.sqrt(3)
    assert found.value == pytest.approx(math.exp(np.mean(means)))
    assert found.stderr == pytest.approx(found.value * se)
    assert list(found.items) == means
    assert found.n == 6
    assert perplexity(nll.flip(0), {}).value == pytest.approx(found.value, rel=1e-12)


def test_one_window_has_no_uncertainty():
    assert perplexity(torch.ones(1, 9, dtype=torch.float64), {}).stderr is None


def test_infinite_and_broken_tokens_are_counted_and_not_hidden():
    nll = torch.ones(2, 5, dtype=torch.float64)
    nll[0, 3] = torch.inf
    found = perplexity(nll, {})
    assert found.value == math.inf
    assert found.detail["nonfinite"] == 1
    nll[1, 1] = torch.nan
    assert math.isnan(perplexity(nll, {}).value)
    assert perplexity(nll, {}).detail["nonfinite"] == 2


# -- divergence ----------------------------------------------------------------------------------


def test_hand_example_of_three_tokens():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.6, 0.3, 0.1]])
    target = torch.tensor([1])
    found = divergence(p.log(), q.log(), target)
    assert found["mean_kld"] == pytest.approx(0.0268125, abs=1e-6)
    assert found["median_kld"] == found["mean_kld"]
    assert found["mean_dp"] == pytest.approx(0.1, abs=1e-6)
    assert found["same_top"] == 1
    assert divergence(q.log(), p.log(), target)["mean_kld"] == pytest.approx(0.0291491, abs=1e-6)


def test_perplexity_statistics_of_the_protocol():
    """Section 12 of the protocol, computed there by other means, the n > 10 rule off."""
    nll, base = np.array([1, 2, 0.5, 3]), np.array([0.9, 2.1, 0.4, 2.8])
    found = perplexities(nll, base)
    assert found["perplexity"] == pytest.approx(5.078419, abs=1e-6)
    assert found["perplexity_base"] == pytest.approx(4.711470, abs=1e-6)
    assert found["ln_ppl_ratio"] == pytest.approx(0.075)
    assert found["ppl_ratio"] == pytest.approx(1.077884, abs=1e-6)
    assert correlation(nll, base) == pytest.approx(0.993547, abs=1e-6)
    assert uncertainty(nll, least=1) * found["perplexity"] == pytest.approx(2.815165, abs=1e-6)
    assert uncertainty(nll - base, least=1) == pytest.approx(0.0629153, abs=1e-7)
    assert uncertainty(nll) == 0  # llama.cpp's rule for n <= 10


def test_quantiles_of_the_protocol():
    x = np.arange(1, 101) / 100
    expected = {99.9: 0.99901, 99: 0.9901, 95: 0.9505, 90: 0.901, 50: 0.505, 10: 0.109}
    assert {q: quantile(x, q) for q in expected} == pytest.approx(expected)


def test_the_same_model_twice_is_exactly_zero():
    base, _, targets = logits_pair(200, 50, 0)
    found = divergence(base, base.clone(), targets)
    zero = ("mean_kld", "max_kld", "kld_p99", "rms_dp", "rms_dp_err", "max_dp", "ppl_ratio_err")
    assert {found[name] for name in zero} == {0.0}
    assert found["ppl_ratio"] == found["same_top"] == found["correlation"] == 1


@pytest.mark.parametrize("noise", [1e-4, 0.1, 3.0])
def test_bounds_and_order(noise):
    base, quant, targets = logits_pair(300, 64, noise)
    found = divergence(base, quant, targets)
    ladder = ("min_kld", "kld_p0_1", "kld_p1", "kld_p5", "kld_p10", "median_kld")
    ladder += ("kld_p90", "kld_p95", "kld_p99", "kld_p99_9", "max_kld")
    values = [found[name] for name in ladder]
    assert values == sorted(values)
    assert found["mean_kld"] >= 0
    scores = compare(base, quant, targets)
    assert scores.dp.abs().max() <= 1
    p, q = base.double().softmax(1), quant.double().softmax(1)
    total_variation = (p - q).abs().sum(1) / 2
    assert (total_variation <= (scores.kld / 2).sqrt() + 1e-6).all()  # Pinsker
    exact = (p * (p.log() - q.log())).sum(1)
    assert (scores.kld - exact).abs().max() < 2e-6
    assert float(scores.kld.mean()) == pytest.approx(float(exact.mean()), rel=1e-3, abs=0)


def test_a_constant_on_the_logits_changes_nothing():
    base, quant, targets = logits_pair(150, 40, 0.3)
    shift = torch.linspace(-4, 4, 150)[:, None]
    one, two = divergence(base, quant, targets), divergence(base - shift, quant + shift, targets)
    assert one == pytest.approx(two, rel=1e-4, abs=2e-6)


def test_perplexity_of_both_sections_agrees():
    base, quant, targets = logits_pair(300, 64, 0.5)
    found = divergence(base, quant, targets)
    assert found["perplexity"] == perplexity(token_nll(quant, targets)[None], {}).value


def test_ratio_uncertainty_is_the_paired_bootstrap_one():
    base, quant, targets = logits_pair(2000, 40, 0.5)
    found = divergence(base, quant, targets)
    d = (token_nll(quant, targets) - token_nll(base, targets)).numpy()
    rng = np.random.default_rng(0)
    boot = [d[rng.integers(len(d), size=len(d))].mean() for _ in range(1000)]
    assert found["ln_ppl_ratio_err"] == pytest.approx(np.std(boot), rel=0.1)


def test_impossible_tokens_and_broken_logits():
    base = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, 2.0]])
    quant = torch.tensor([[0.5, 1.0, -math.inf], [0.0, 1.0, 2.0]])
    assert math.isfinite(divergence(base, quant, torch.tensor([1, 2]))["mean_kld"])
    sure, other = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    assert divergence(sure, other, torch.tensor([0]))["mean_kld"] == pytest.approx(200)
    quant[1, 0] = torch.nan
    found = divergence(base, quant, torch.tensor([1, 2]))
    assert math.isnan(found["mean_kld"])
    assert math.isnan(found["same_top"])


def test_shapes_that_do_not_match_are_refused():
    base, quant, targets = logits_pair(20, 8, 0.1)
    with pytest.raises(ValueError, match=r"\[20, 8\] and \[20, 7\]"):
        divergence(base, quant[:, :7], targets)
    with pytest.raises(ValueError, match="no tokens"):
        divergence(base[:0], quant[:0], targets[:0])


def test_few_tokens_give_reasons_instead_of_numbers():
    scores = compare(*logits_pair(LEAST_TOKENS - 1, 8, 0.1))
    found = list(measurements(scores, [0.1], {}))
    assert {m.value for m in found} == {None}
    assert all("need 100" in m.detail["reason"] for m in found)
    enough = TokenScores.join([scores, compare(*logits_pair(1, 8, 0.1))])
    assert all(m.value is not None for m in measurements(enough, [0.1], {}))


@needs_vectors
def test_divergence_vectors():
    """Values of exllamav3 and llama.cpp run on these logits, and float64 formulas."""
    arrays = np.load(VECTORS / "divergence_a.npz")
    stats = json.loads((VECTORS / "divergence_a.json").read_text())["stats"]
    base, quant, targets = (
        torch.from_numpy(arrays[f"in_{name}"])
        for name in ("logits_base", "logits_quant", "target_tokens")
    )
    scores = compare(base, quant, targets)
    assert np.abs(scores.kld.numpy() - arrays["def__kld64"]).max() < 2e-6
    assert np.abs(scores.kld.numpy() - arrays["llamacpp__kld"]).max() < 1e-4
    assert np.abs(scores.dp.numpy() - arrays["llamacpp__delta_p"]).max() < 1e-5
    found, exact = divergence(base, quant, targets), stats["by_definition_float64"]
    same_names = ("ppl_ratio", "ppl_ratio_err", "mean_kld_err", "max_kld", "min_kld")
    renamed = {
        "perplexity": "ppl_quant",
        "perplexity_err": "ppl_quant_err",
        "perplexity_base": "ppl_base",
        "perplexity_base_err": "ppl_base_err",
        "correlation": "cor_ln_ppl",
        "ln_ppl_ratio_err": "ln_ppl_ratio_err",
        "ppl_difference": "ppl_diff",
        "ppl_difference_err": "ppl_diff_err",
        "rms_dp": "rms_delta_p",
        "rms_dp_err": "rms_delta_p_err",
        "mean_dp_err": "mean_delta_p_err",
        "same_top": "same_top_token",
        "same_top_err": "same_top_token_err",
    }
    for ours, theirs in {**dict(zip(same_names, same_names, strict=True)), **renamed}.items():
        assert found[ours] == pytest.approx(exact[theirs], rel=1e-5, abs=1e-6), ours
    quantiles = {"median_kld": "0.5", "kld_p99": "0.99", "kld_p99_9": "0.999", "kld_p10": "0.1"}
    for ours, share in quantiles.items():
        assert found[ours] == pytest.approx(exact["kld_quantiles"][share], abs=1e-5)
    dp_quantiles = {"dp_p99_9": "0.999", "dp_p50": "0.5", "dp_p0_1": "0.001", "dp_p5": "0.05"}
    for ours, share in dp_quantiles.items():
        assert found[ours] == pytest.approx(exact["delta_p_quantiles"][share], abs=1e-5)


# -- conformance of every metric -----------------------------------------------------------------

QUICK = {  # knobs that make the registered metrics quick; a new metric runs with its defaults
    "perplexity": {"dataset": "demo", "window": 64, "limit": 4},
    "divergence": {"dataset": "demo", "window": 64, "limit": 4},
    "sliding_perplexity": {"dataset": "demo", "window": 64, "stride": 48, "limit": 4},
    "tasks": {"limit": 24},
    "speed": {"prompt": 8, "output": 4, "repeats": 3},
}
KINDS = sorted(METRICS.load())


@pytest.fixture(scope="module")
def demo():
    """Model and tokenizer of the bundled model, round-to-nearest at 3 bits, and the 16-bit spec."""
    model, tokenizer = loading.load(ModelRef(id="demo"), "cpu", torch.float32)
    plain = Run(RunSpec(model={"id": "demo"}), model, tokenizer)
    step = METHODS.build({"kind": "rtn", "format": {"kind": "int", "bits": 3, "group": 32}})
    for block in plain.blocks():
        step.apply(block, Seen({name: LayerStats() for name in block.linears()}))
    return model, tokenizer, step


def demo_run(demo, kind: str) -> Run:
    model, tokenizer, step = demo
    steps = () if METRICS.find(kind).storage == "packed" else (step,)
    return Run(RunSpec(model={"id": "demo"}, steps=steps), model, tokenizer)


def test_every_metric_file_loads():
    assert METRICS.broken == {}
    assert {"perplexity", "divergence", "tasks", "size", "speed"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_knobs_have_help_and_json(kind):
    cls = METRICS.find(kind)
    assert cls.summary()
    assert all(knob.description for knob in cls.model_fields.values())
    metric = METRICS.build({"kind": kind, **QUICK.get(kind, {})})
    again = METRICS.build(json.loads(json.dumps(metric.data())))
    assert again == metric
    assert again.digest() == metric.digest()
    assert METRICS.build({"kind": kind}).digest() == cls().digest()


@pytest.mark.parametrize("kind", KINDS)
def test_measurements_are_whole(kind, demo):
    metric = METRICS.build({"kind": kind, **QUICK.get(kind, {})})
    run, seen = demo_run(demo, kind), []
    run.on_progress = lambda done, total, item: seen.append((done, total))
    found = list(metric.measure(run))
    assert found
    assert all(isinstance(m, Measurement) for m in found)
    assert all(0 <= done <= total for done, total in seen)
    if metric.yields:
        assert [m.name for m in found if m.layer is None] == list(metric.yields)
    for m in found:
        assert m.better in ("lower", "higher")
        assert m.n >= 1
        assert (m.value is None) == ("reason" in m.detail)
        assert m.value is None or math.isfinite(m.value)
        assert m.stderr is None or m.stderr >= 0
        json.dumps(dict(m.detail))
    if not metric.alone:
        again = list(metric.measure(demo_run(demo, kind)))
        assert [m.value for m in again] == [m.value for m in found]
        assert metric.data_hash(run) == metric.data_hash(demo_run(demo, kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in QUICK])
def test_metrics_can_be_cancelled(kind, demo):
    run = demo_run(demo, kind)
    run.should_stop = lambda: True
    with pytest.raises(Cancelled):
        list(METRICS.build({"kind": kind, **QUICK[kind]}).measure(run))


# -- sliding perplexity --------------------------------------------------------------------------


def nll_by_hand(run: Run, ids: torch.Tensor, window: int, stride: int) -> list[float]:
    """NLL of every token scored once, window after window."""
    found: list[float] = []
    for start in range(0, len(ids) - window + 1, stride):
        part = ids[start : start + window]
        logp = run.logits(part[None])[0].double().log_softmax(-1)
        first = 1 if start == 0 else window - min(stride, window - 1)
        found += [-float(logp[at - 1, part[at]]) for at in range(first, window)]
    return found


def sliding_of(run: Run, **knobs) -> Measurement:
    metric = METRICS.build({"kind": "sliding_perplexity", "dataset": "demo", **knobs})
    return next(iter(metric.measure(run)))


def test_sliding_with_a_stride_of_a_window_is_perplexity(demo):
    run = demo_run(demo, "perplexity")
    plain = METRICS.build({"kind": "perplexity", "dataset": "demo", "window": 64, "limit": 5})
    slid = sliding_of(run, window=64, stride=64, limit=5)
    assert slid.value == pytest.approx(next(iter(plain.measure(run))).value, rel=1e-12)


@pytest.mark.parametrize("stride", [16, 31, 63])
def test_sliding_scores_every_token_once(demo, stride):
    run = demo_run(demo, "perplexity")
    ids = run.tokens("demo", 0, 1).flatten()[: 64 + 5 * stride]
    by_hand = nll_by_hand(run, ids, 64, stride)
    slid = sliding_of(run, window=64, stride=stride, limit=6)
    assert slid.n == len(by_hand) == 63 + 5 * stride
    assert slid.detail["mean_nll"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_a_shorter_stride_gives_more_context(demo):
    run = demo_run(demo, "perplexity")
    values = [sliding_of(run, window=64, stride=s, limit=0).value for s in (16, 64)]
    assert values[0] < values[1]


def test_sliding_refuses_what_it_cannot_do(demo):
    run = demo_run(demo, "perplexity")
    with pytest.raises(ValueError, match="would skip tokens"):
        sliding_of(run, window=64, stride=65)
    metric = METRICS.build({"kind": "sliding_perplexity", "dataset": "c4", "window": 64})
    with pytest.raises(ValueError, match="one continuous text"):
        metric.windows(run)


# -- tasks ---------------------------------------------------------------------------------------


class FakeTask:
    def __init__(self, docs: int) -> None:
        self.eval_docs = range(docs)


def test_bundled_skills_share_the_limit_and_real_tasks_do_not():
    skills = {"demo_a": FakeTask(100), "demo_b": FakeTask(100), "demo_c": FakeTask(3)}
    items = choose_items(skills, list(skills), 20)
    assert {name: len(chosen) for name, chosen in items.items()} == {
        "demo_a": 7, "demo_b": 7, "demo_c": 3,
    }  # fmt: skip
    assert items == choose_items(skills, list(skills), 20)
    assert items["demo_a"] != list(range(7))
    more = choose_items(skills, list(skills), 50)
    assert set(items["demo_a"]) < set(more["demo_a"])
    assert choose_items({"boolq": FakeTask(50)}, [], 20) == {"boolq": list(range(20))}
    assert choose_items({"boolq": FakeTask(50)}, [], 0) == {"boolq": list(range(50))}


def test_the_mean_over_skills_is_unweighted():
    skills = [
        Measurement("demo_a/acc", 1.0, "share", "higher", n=2, stderr=0.3, items=[1, 1]),
        Measurement("demo_b/acc", 0.5, "share", "higher", n=4, stderr=0.4, items=[1, 0, 1, 0]),
    ]
    mean = mean_of(skills, "all items")
    assert (mean.name, mean.value, mean.n) == ("demo/acc", 0.75, 6)
    assert mean.stderr == pytest.approx(0.25)
    assert list(mean.items) == [1, 1, 1, 0, 1, 0]


def test_accuracy_is_the_mean_of_its_items_with_the_binomial_error(demo):
    metric = METRICS.build({"kind": "tasks", "limit": 8 * len(tasks())})
    found = list(metric.measure(demo_run(demo, "tasks")))
    skills = [m for m in found if m.name != "demo/acc"]
    assert {m.n for m in skills} == {8}
    for m in skills:
        assert set(m.items) <= {0.0, 1.0}
        assert m.value == pytest.approx(sum(m.items) / m.n)
        assert m.stderr == pytest.approx(math.sqrt(m.value * (1 - m.value) / (m.n - 1)))
    assert found[-1].name == "demo/acc"
    assert found[-1].value == pytest.approx(sum(m.value for m in skills) / len(skills))


def test_task_results_do_not_depend_on_the_batch(demo, monkeypatch):
    names = tuple(task["task"] for task in tasks()[:3])
    metric = METRICS.build({"kind": "tasks", "names": names, "limit": 30})
    items = []
    for size in (1, 8):
        run = demo_run(demo, "tasks")
        monkeypatch.setattr(run, "batch_size", lambda length, size=size, **how: size)
        items.append({m.name: m.items for m in metric.measure(run)})
    assert items[0] == items[1]


class Oracle(torch.nn.Module):
    """Logits that always prefer the token that follows in one of the known sequences."""

    def __init__(self, known: list[list[int]], vocabulary: int) -> None:
        super().__init__()
        self.following = {tuple(ids[:i]): ids[i] for ids in known for i in range(1, len(ids))}
        self.vocabulary = vocabulary

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*ids.shape, self.vocabulary)
        for row, tokens in enumerate(ids.tolist()):
            for at in range(len(tokens)):
                following = self.following.get(tuple(tokens[: at + 1]))
                if following is not None:
                    out[row, at, following] = 9.0
        return out


def test_a_model_that_knows_the_answers_scores_one(demo, monkeypatch):
    pair = tasks()[:2]
    names = tuple(task["task"] for task in pair)
    files = [Path(task["dataset_kwargs"]["data_files"]["test"]) for task in pair]
    docs = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    known = [demo[1](d["prompt"] + d["answer"])["input_ids"] for d in docs]
    metric = METRICS.build({"kind": "tasks", "names": names, "limit": 0})
    run = demo_run(demo, "tasks")
    monkeypatch.setattr(run, "logits", Oracle(known, run.vocabulary).logits)
    found = {m.name: m.value for m in metric.measure(run)}
    assert found == {f"{name}/acc": 1.0 for name in (*names, "demo")}


MULTIPLE_CHOICE = {
    "task": "colours",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
GENERATING = {
    "task": "repeat",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "strict", "filter": [{"function": "take_first"}]},
        {"name": "none", "filter": [{"function": "take_first"}]},
    ],
}


def test_any_task_of_lm_eval_keeps_its_own_names(demo, monkeypatch):
    """Multiple choice and generation, as a named task would come from lm-eval's index."""
    import datasets
    from lm_eval.tasks import TaskManager

    from backend.metrics import tasks as module

    rows = [
        {"question": f"What is {i}?", "choices": ["red", "green", "blue"], "label": i % 3}
        for i in range(9)
    ]
    made = {"test": datasets.Dataset.from_list(rows)}
    given = [{**t, "custom_dataset": lambda **m: made} for t in (MULTIPLE_CHOICE, GENERATING)]
    loaded = TaskManager(include_defaults=False).load(given)
    monkeypatch.setattr(module, "load", lambda tasks, names: loaded)
    metric = METRICS.build({"kind": "tasks", "names": ("colours", "repeat"), "limit": 6})
    found = {m.name: m for m in metric.measure(demo_run(demo, "tasks"))}
    assert set(found) == {
        "colours/acc",
        "colours/acc_norm",
        "repeat/exact_match",
        "repeat/exact_match,strict",
    }
    assert {m.n for m in found.values()} == {6}
    assert all(len(m.items) == 6 for m in found.values())
    assert found["colours/acc"].detail["items"].startswith("the first 6 items of each task")


def test_unknown_tasks_and_models_without_tasks_are_refused(demo, monkeypatch):
    from lm_eval import tasks as library

    class Manager:
        all_tasks = ("arc_easy", "gsm8k")

        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults

        def load(self, tasks):
            raise ConnectionError("the hub cannot be reached\nmore lines")

    monkeypatch.setattr(library, "TaskManager", Manager)
    run = demo_run(demo, "tasks")
    with pytest.raises(ValueError, match="no task 'arc_eazy'; did you mean 'arc_easy'"):
        list(METRICS.build({"kind": "tasks", "names": ("arc_eazy",)}).measure(run))
    with pytest.raises(ValueError, match="arc_easy cannot be loaded: the hub cannot be reached"):
        list(METRICS.build({"kind": "tasks", "names": ("arc_easy",)}).measure(run))
    run.spec = RunSpec(model={"id": "other"})
    with pytest.raises(ValueError, match="name at least one lm-eval task"):
        list(METRICS.build({"kind": "tasks"}).measure(run))


# -- speed ---------------------------------------------------------------------------------------


def test_a_timing_is_a_median_with_its_spread():
    steady = spread("ttft_ms", [10.0, 10.1, 9.9, 10.0, 30.0], "ms", "lower", {})
    assert steady.value == 10.0
    assert steady.detail["steady"] is False  # one of five is far out: p80 is 14.1
    assert spread("ttft_ms", [10.0, 10.1, 9.9], "ms", "lower", {}).detail["steady"] is True


def test_speed_refuses_simulated_weights_and_too_long_prompts(demo):
    model, tokenizer, step = demo
    simulated = Run(RunSpec(model={"id": "demo"}, steps=(step,)), model, tokenizer)
    metric = METRICS.build({"kind": "speed"})
    with pytest.raises(ValueError, match="speed needs packed weights"):
        list(metric.measure(simulated))
    long = METRICS.build({"kind": "speed", "prompt": 5000})
    with pytest.raises(ValueError, match="5064 tokens, the model's context is"):
        list(long.measure(demo_run(demo, "speed")))


def test_peak_memory_sees_what_was_freed_again():
    peak = PeakMemory("cpu")
    before = peak.measurement().value
    held = torch.ones(1 << 25)  # 128 MiB
    del held
    after = peak.measurement().value
    assert after >= before
    if peak.how.endswith("while generating"):
        assert after - before > 100 << 20
