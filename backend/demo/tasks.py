"""The bundled tasks as lm-eval dictionaries: one per closed skill, scored by greedy answer."""

from typing import Any

from backend.demo import tasks_folder


def tasks() -> list[dict[str, Any]]:
    """Tasks `demo_<skill>` with metric acc: 1 where the greedy continuation is the answer.

    Output type loglikelihood costs one forward pass per item and tells greedy equality on the way.
    """
    return [
        {
            "task": f"demo_{path.stem}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
            "test_split": "test",
            "output_type": "loglikelihood",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        for path in sorted(tasks_folder().glob("*.jsonl"))
    ]
