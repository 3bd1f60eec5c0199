"""The lm-eval task of the arithmetic word problems: greedy answers, exact match of the final number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASK = "arithmetic_words"


def arithmetic_task(test_file: Path) -> dict[str, Any]:
    """The YAML task over a file of ``kdlib.data.arithmetic`` rows; the prompt is what the demo's chat template renders."""
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(test_file.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "<|bos|><|user|>{{question}}<|end|><|assistant|>",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|end|>"], "max_gen_toks": 48, "do_sample": False},
        "filter_list": [
            {
                "name": "final-number",
                "filter": [{"function": "regex", "regex_pattern": r"#### (\d+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
