"""Task accuracy through lm-eval: the bundled tasks offline, any lm-eval task by name."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from backend.cache.build import cache_argument
from backend.metrics import METRICS
from backend.metrics.base import Measurement, Metric
from backend.model.identity import DEMOS
from backend.registry import nearest, short_hash

if TYPE_CHECKING:
    from backend.run import Run

DEMO_GROUP = "demo"
SHARES = ("acc", "exact_match", "bleu_acc", "f1", "em")  # beginnings of metrics between 0 and 1
SEED = 1234  # lm-eval's own for few-shot examples; ours for the choice of items


@dataclass(frozen=True)
class Plan:
    """Tasks ready to run. `items`: the documents of each task that are asked."""

    loaded: Mapping[str, Any]  # lm-eval's {"tasks": {name: Task}, "groups": ...}
    items: Mapping[str, list[int]]
    how: str


@METRICS.register
class Tasks(Metric):
    """Accuracy on tasks of lm-eval, with the standard error and the result of every item.

    Without names the bundled model answers its own skills, each item scored 1 where the greedy
    continuation is the answer; other models need names (`arc_easy`, `gsm8k`, `mmlu`, ...).
    """

    kind: ClassVar[str] = "tasks"
    names: tuple[str, ...] = Field(
        (), description="lm-eval tasks or groups; empty is the bundled model's skills."
    )
    limit: int = Field(
        200,
        ge=0,
        description="Items asked: over all bundled skills together, else per task; 0 is all.",
    )
    shots: int = Field(
        -1, ge=-1, le=64, description="Examples in the prompt; -1 is the task's own."
    )

    def data_hash(self, run: Run) -> str:
        plan = self.plan(run)
        return short_hash([[name, documents(plan, name)] for name in sorted(plan.loaded["tasks"])])

    def plan(self, run: Run) -> Plan:
        """The tasks loaded and their items chosen; once per run."""
        return run.once(f"tasks {self.data()}", lambda: self._plan(run.spec.model.id))

    def _plan(self, model: str) -> Plan:
        names = self.names or ((DEMO_GROUP,) if model in DEMOS else ())
        if not names:
            raise ValueError(
                "tasks: name at least one lm-eval task (names=[arc_easy]); only the bundled model "
                "has tasks of its own"
            )
        bundled, rest = chosen_bundled(names)
        with quiet():
            loaded = load([*map(in_memory, bundled), *rest], rest)
        for task in loaded["tasks"].values():
            shots = task.get_config("num_fewshot")
            if shots is None or (self.shots >= 0 and shots != 0):  # a task's own 0 is kept: lm-eval
                task.set_config(key="num_fewshot", value=max(self.shots, 0))
            task.set_fewshot_seed(seed=SEED)
        own = [task["task"] for task in bundled]
        return Plan(loaded, choose_items(loaded["tasks"], own, self.limit), how(self.limit, own))

    def measure(self, run: Run) -> Iterator[Measurement]:
        plan = self.plan(run)
        out = evaluate(run, plan)
        results = list(task_measurements(out, plan))
        yield from results
        bundled = [m for m in results if m.name.startswith(f"{DEMO_GROUP}_")]
        if len(bundled) > 1:
            yield mean_of(bundled, plan.how)


def chosen_bundled(names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Names -> the bundled tasks among them, as lm-eval dictionaries, and the other names."""
    from backend.demo.tasks import tasks

    bundled = {task["task"]: task for task in tasks()}
    wanted = [task for name, task in bundled.items() if name in names or DEMO_GROUP in names]
    rest = [name for name in names if name not in bundled and name != DEMO_GROUP]
    return wanted, rest


def in_memory(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task over a JSON-lines file, its rows read here: no data set cache, no lock, no network."""
    import datasets

    (split, file), *_ = task["dataset_kwargs"]["data_files"].items()
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]

    def read(**metadata: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows)})

    kept = {k: v for k, v in task.items() if k not in ("dataset_path", "dataset_kwargs")}
    return {**kept, "custom_dataset": read}


def load(tasks: Sequence[str | Mapping[str, Any]], names: Sequence[str]) -> Mapping[str, Any]:
    """lm-eval's task objects; its index of all tasks is read only where names are given."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(
                f"tasks: lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}"
            )
    try:
        return manager.load(list(tasks))
    except Exception as error:  # data sets raise anything; what matters is which task and why
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"tasks: {', '.join(names) or 'bundled'} cannot be loaded: {reason}"
        ) from error


def choose_items(
    tasks: Mapping[str, Any], bundled: Sequence[str], limit: int
) -> dict[str, list[int]]:
    """Documents of each task. Bundled skills share `limit`, drawn once with a fixed seed."""
    items = {}
    for at, name in enumerate(tasks):
        there = len(tasks[name].eval_docs)
        order, count = list(range(there)), limit or there
        if name in bundled:
            random.Random(f"{SEED} {name}").shuffle(order)
            share, left = divmod(limit, len(bundled))
            count = share + (at < left) if limit else there
        items[name] = sorted(order[: max(1, min(count, there))])
    return items


def how(limit: int, bundled: Sequence[str]) -> str:
    """Which items are asked, in words."""
    if not limit:
        return "all items"
    if bundled:
        return f"{limit} items over {len(bundled)} bundled skills, drawn with seed {SEED}"
    return f"the first {limit} items of each task, as lm-eval's limit takes them"


def documents(plan: Plan, name: str) -> list[str]:
    """The asked documents of one task as text."""
    docs = plan.loaded["tasks"][name].eval_docs
    return [json.dumps(docs[i], sort_keys=True, default=str) for i in plan.items[name]]


def evaluate(run: Run, plan: Plan) -> Mapping[str, Any]:
    """lm-eval's results for the run's model."""
    import lm_eval
    import torch

    torch.manual_seed(SEED)
    with quiet():
        return lm_eval.evaluate(
            lm=tracked(run, sum(map(len, plan.items.values()))),
            task_dict=plan.loaded,
            samples=dict(plan.items),
            log_samples=True,
        )


def tracked(run: Run, total: int) -> Any:
    """lm-eval's wrapper of the run's model, with progress, cancelling and batches by length."""
    import torch
    from lm_eval.models.huggingface import HFLM

    class Tracked(HFLM):
        """HFLM whose every forward pass is the run's."""

        done = 0

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            run.progress(min(self.done, total), total, f"item {min(self.done, total)} of {total}")
            self.done += len(inps)
            return run.logits(inps)

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            run.progress(min(self.done, total), total, f"item {min(self.done, total)} of {total}")
            self.done += len(context)
            cache = run.caches.new()
            if run.caches.rounds:
                kwargs[cache_argument(self.model)] = cache
            with torch.inference_mode():
                out = super()._model_generate(context, *args, **kwargs)
            run.caches.count(cache)
            return out

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            # One size for all would be that of the longest request; the padding has no mask, so
            # rows that are not independent go alone (batch_size gives 1 there).
            sizes = [
                run.batch_size(len(context) + len(end), padded=True) for _, context, end in requests
            ]
            answers: list[Any] = [None] * len(requests)
            for size in sorted(set(sizes)):
                self.batch_size_per_gpu = size
                where = [i for i, own in enumerate(sizes) if own == size]
                some = super()._loglikelihood_tokens(
                    [requests[i] for i in where], disable_tqdm=True
                )
                for i, answer in zip(where, some, strict=True):
                    answers[i] = answer
            return answers

    return Tracked(
        pretrained=run.model,
        tokenizer=run.tokenizer,
        backend="causal",
        batch_size=run.batch_size(run.context, padded=True),
        max_length=run.context,
        softmax_dtype="float32",  # packed models give bf16 logits: 3 digits are too few for a sum
    )


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval without its log, its process pools and the tokenizer's threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap would start a process pool
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def task_measurements(out: Mapping[str, Any], plan: Plan) -> Iterator[Measurement]:
    """One per task (or group) and metric, named by lm-eval's keys without ",none"."""
    for task, found in out["results"].items():
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            higher = out["higher_is_better"].get(task, {}).get(metric, True)
            yield Measurement(
                f"{task}/{key.removesuffix(',none')}",
                float(value),
                "share" if metric.startswith(SHARES) else "",
                "higher" if higher is not False else "lower",
                n=asked(out, plan, task),
                stderr=number(found.get(f"{metric}_stderr,{filtered}")),
                items=item_scores(out, task, metric, filtered),
                detail={
                    "items": plan.how,
                    "shots": out["n-shot"].get(task),
                    "task_version": out["versions"].get(task),
                    "lm_eval": lm_eval_version(),
                },
            )


def asked(out: Mapping[str, Any], plan: Plan, task: str) -> int:
    """Items of a task, or of all tasks of a group."""
    if task in plan.items:
        return len(plan.items[task])
    found = out.get("results", {}).get(task, {}).get("sample_len")
    inside = [name for name in plan.items if name in leaves(plan, task)]
    return sum(len(plan.items[name]) for name in inside) or int(found or 0)


def leaves(plan: Plan, group: str) -> set[str]:
    """Names of the tasks of a group."""
    found = plan.loaded.get("groups", {}).get(group)
    return {task.task_name for task in found.get_all_tasks()} if found else set()


def item_scores(
    out: Mapping[str, Any], task: str, metric: str, filtered: str
) -> list[float] | None:
    """The metric of every document, in order; None where an item has no single number."""
    records = [r for r in out["samples"].get(task, ()) if r["filter"] == filtered]
    scores = [r.get(metric) for r in sorted(records, key=lambda r: r["doc_id"])]
    if not scores or not all(isinstance(score, int | float) for score in scores):
        return None
    return [float(score) for score in scores]


def number(value: Any) -> float | None:
    """A finite number, or None (lm-eval writes "N/A")."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def mean_of(skills: Sequence[Measurement], items: str) -> Measurement:
    """The unweighted mean over the bundled skills: demo/acc."""
    errors = [m.stderr or 0.0 for m in skills]
    return Measurement(
        f"{DEMO_GROUP}/acc",
        sum(m.value or 0.0 for m in skills) / len(skills),
        "share",
        "higher",
        n=sum(m.n for m in skills),
        stderr=math.sqrt(sum(e * e for e in errors)) / len(skills),
        items=[score for m in skills for score in m.items or ()],
        detail={"items": items, "mean_of": [m.name for m in skills], "lm_eval": lm_eval_version()},
    )


def lm_eval_version() -> str:
    """Its numbers change between versions."""
    from importlib.metadata import version

    return version("lm_eval")
