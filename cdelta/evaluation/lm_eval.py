"""lm-evaluation-harness on a model in memory, so that an applied delta or a steered model is what gets measured.

Import costs seconds and needs ``lm_eval``; only real-model presets use it. Tasks: MMLU, GSM8K, ARC, HellaSwag, IFEval, TruthfulQA by their
names in the harness, or a folder of task files of one's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

import pandas as pd

from cdelta.errors import CdeltaError

TASKS = ("mmlu", "gsm8k", "arc_challenge", "hellaswag", "ifeval", "truthfulqa_mc2")


def harness(
    model,
    tok,
    tasks: Sequence[str] = TASKS,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    include: str | Path = "",
    seed: int = 0,
) -> pd.DataFrame:
    """Rows ``task, metric, filter, value, stderr, n`` of the model as it stands.

    Args:
        limit: examples per task; None: all.
        chat: put the examples through the chat template.
        include: a folder of the caller's own task files (YAML), in place of the harness's.

    Raises `CdeltaError` when the harness is missing, a task is unknown or its data cannot be had. The model's weights are not touched.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CdeltaError("lm-evaluation-harness is not installed: pip install lm_eval.") from error
    manager = TaskManager(include_path=str(include) or None, include_defaults=not include)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise CdeltaError(
            f"the harness has no task {', '.join(unknown)}: see `lm_eval ls tasks`, or give their folder as include."
        )
    wrapped = HFLM(pretrained=model, tokenizer=tok, batch_size=batch_size, device=str(model.device))
    try:
        found = simple_evaluate(
            wrapped, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, apply_chat_template=chat, task_manager=manager,
            bootstrap_iters=1000, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except (OSError, ConnectionError, ValueError) as error:
        raise CdeltaError(
            f"the harness could not run {', '.join(tasks)}: {str(error).strip().splitlines()[0]}"
        ) from error
    return _rows(found)


def _rows(found) -> pd.DataFrame:
    rows = []
    for task, values in found["results"].items():
        n = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, rule = key.partition(",")
            if rule and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                stderr = values.get(f"{metric}_stderr,{rule}")
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "filter": rule,
                        "value": value,
                        "stderr": stderr if stderr != "N/A" else None,
                        "n": n,
                    }
                )
    return pd.DataFrame(rows)
