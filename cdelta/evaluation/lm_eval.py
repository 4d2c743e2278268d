"""lm-evaluation-harness on a model in memory, so that an applied delta or a steered model is what
gets measured; its tasks by name, or the local files of `multiple_choice` without a network.

Importing the harness costs seconds and needs ``lm_eval``; `multiple_choice.answered` gives the same
rows without it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cdelta.errors import CdeltaError, first_line
from cdelta.evaluation.multiple_choice import TASKS, Task


def harness(
    model,
    tok,
    tasks: Sequence[str],
    limit: int = 0,
    batch_size: int = 8,
    chat: bool = False,
    include: str | Path = "",
) -> pd.DataFrame:
    """Rows ``task, item, metric, correct`` of the model as it stands, one per question and metric
    of value 0 or 1.

    Args:
        tasks: names of the harness's tasks (their data come from the hub), or of those in
            `include`.
        limit: questions per task; 0: all.
        chat: put the questions through the chat template.
        include: a folder of task files (YAML), in place of the harness's.

    Raises `CdeltaError` when the harness is missing, a task is unknown or its data cannot be had.
    The model's weights are not touched.
    """
    simple_evaluate, wrapper, manager = _imported(include)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise CdeltaError(
            f"the harness has no task {', '.join(unknown)}: see `lm_eval ls tasks`, "
            "or give their folder as include."
        )
    wrapped = wrapper(
        pretrained=model, tokenizer=tok, batch_size=batch_size, device=str(model.device)
    )
    try:
        result = simple_evaluate(
            wrapped,
            tasks=list(tasks),
            limit=limit or None,
            apply_chat_template=chat,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise CdeltaError(
            f"the harness could not run {', '.join(tasks)}: {first_line(error)}"
        ) from error
    return _rows(result["samples"])


def _imported(include: str | Path):
    """``(simple_evaluate, HFLM, TaskManager)`` of the harness, the last one made."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CdeltaError("lm-evaluation-harness is not installed: pip install lm_eval.") from error
    manager = TaskManager(include_path=str(include) or None, include_defaults=not include)
    return simple_evaluate, HFLM, manager


def _rows(samples: dict[str, list[dict]]) -> pd.DataFrame:
    found = [
        {"task": task, "item": row["doc_id"], "metric": metric, "correct": bool(row[metric])}
        for task, rows in samples.items()
        for row in rows
        for metric in row["metrics"]
        if row[metric] in (0, 1)
    ]
    return pd.DataFrame(found, columns=["task", "item", "metric", "correct"])


# ---------------------------------------------------------------------- local files


def local_harness(
    model,
    tok,
    folder: str | Path,
    tasks: Sequence[str] = tuple(TASKS),
    limit: int = 0,
    batch_size: int = 8,
) -> pd.DataFrame:
    """`multiple_choice.answered`'s rows by the harness itself, from the files in `folder`."""
    with tempfile.TemporaryDirectory() as configs:
        for name in tasks:
            write_config(TASKS[name], folder, Path(configs))
        rows = harness(
            model, tok, [f"local_{name}" for name in tasks], limit, batch_size, include=configs
        )
    rows["task"] = rows["task"].str.removeprefix("local_")
    metric = rows["task"].map(
        {n: "acc_norm" if t.by_character else "acc" for n, t in TASKS.items()}
    )
    return rows[rows["metric"] == metric].drop(columns="metric").reset_index(drop=True)


def write_config(task: Task, folder: str | Path, configs: Path) -> Path:
    """Write the harness's task file for a local file; JSON is YAML."""
    data = Path(folder).absolute() / task.file
    if not data.exists():
        raise CdeltaError(f"{task.name} needs {data}: give the folder of the task files.")
    text, choice, target = (
        ("{{gold}}", "{{context_options}}", "{{continuation}}")
        if task.schema
        else (task.prompt.replace("{query}", "{{query}}"), "{{choices}}", "{{gold}}")
    )
    config = {
        "task": f"local_{task.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": text,
        "doc_to_choice": choice,
        "doc_to_target": target,
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    path = configs / f"{task.name}.yaml"
    path.write_text(json.dumps(config))
    return path
