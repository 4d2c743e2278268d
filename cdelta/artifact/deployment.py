"""What notebook 06 measures of an edited checkpoint: its entries, other runtimes, LoRA, formats,
rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from cdelta.artifact.external import apply_memory, runtime_answers
from cdelta.circuit.circuit import module_of
from cdelta.delta.quantise import SCHEMES, quantisation_survival, quantised
from cdelta.delta.verify import VerifyReport, verify
from cdelta.delta.weight_delta import WeightDelta
from cdelta.errors import CdeltaError
from cdelta.evaluation.measure import judged
from cdelta.evaluation.rates import kind_rates
from cdelta.models.chat import chat_ids
from cdelta.models.checkpoint import Checkpoint, rewrite_tensors
from cdelta.models.loading import load_model

if TYPE_CHECKING:
    from cdelta.artifact.bench import Bench

WHOLE = "unrounded"
SMALL = 1e8
"""Parameters up to which a model is also saved in other formats."""


def files_table(base: str | Path, edited: str | Path) -> pd.DataFrame:
    """Sizes of the files of two checkpoints, in bytes."""
    rows = []
    for path in sorted(Path(edited).iterdir()):
        if path.is_file():
            other = Path(base) / path.name
            before = other.stat().st_size if other.exists() else 0
            sizes = {"base bytes": before, "edited bytes": path.stat().st_size}
            rows.append({"file": path.name, **sizes})
    return pd.DataFrame(rows)


def changed_entries(
    base: str | Path, edited: str | Path, delta: WeightDelta, most: int = 4
) -> dict[str, np.ndarray]:
    """|difference| of the weights that the delta changes most, one of every kind of module."""
    before, after = Checkpoint(base), Checkpoint(edited)
    norms = {name: norm for name, norm in delta.norms().items() if delta.values[name].dim() == 2}
    by_module = {module_of(name): name for name in sorted(norms, key=norms.get)}
    attention = [name for module, name in by_module.items() if "attn" in module]
    others = [name for module, name in by_module.items() if "attn" not in module]
    found = {}
    for name in (*attention[-(most // 2) :], *others[-(most // 2) :]):
        old, new = (folder.get(folder.key_of[name]).float() for folder in (before, after))
        found[name.removesuffix(".weight").removeprefix("model.")] = (new - old).abs().numpy()
    return found


def flip_a_bit(edited: Path, delta: WeightDelta) -> None:
    """Flip one bit of a tensor that the delta leaves alone; a second call flips it back."""
    after = Checkpoint(edited)
    owned = {after.key_of[name] for name in delta.values}
    file = after.file_of[min(owned)]  # a file of its own, no hard link of the base's
    bystanders = [key for key in after.shards[file] if key not in owned]

    def flip(tensor: torch.Tensor) -> None:
        tensor.view(torch.uint8).view(-1)[:1].bitwise_xor_(1)

    rewrite_tensors(Path(edited) / file, {bystanders[0]: flip})


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
        row = {"runtime": runtime, "n": len(rows), "same answers": same}
        found.append(
            row | {f"{kind}_rate": rates.get(kind) for kind in ("target", "benign", "skills")}
        )
    columns = ["runtime", "n", "same answers", "target_rate", "benign_rate", "skills_rate"]
    return pd.DataFrame(found).reindex(columns=columns)


def lora_table(base: str | Path, edited: Path, adapter: Path, ids: list[int]) -> pd.DataFrame:
    """Logits of base, PEFT's adapter and its merge beside the edited checkpoint's, in fp32."""
    from peft import PeftModel

    prompt = torch.tensor([ids])
    logits = {}
    with torch.no_grad():
        for name, folder in (("base", base), ("edited", edited)):
            logits[name] = load_model(folder, dtype="float32", device="cpu")[0](prompt).logits
        plain = load_model(base, dtype="float32", device="cpu")[0]
        adapted = PeftModel.from_pretrained(plain, adapter).eval()
        logits["adapter"] = adapted(prompt).logits
        logits["merged"] = adapted.merge_and_unload()(prompt).logits
    rows = []
    for name in ("base", "adapter", "merged"):
        gap = (logits[name] - logits["edited"]).abs().max().item()
        rows.append({"against the edited checkpoint": name, "largest |difference of logits|": gap})
    return pd.DataFrame(rows)


def formats_table(
    base: str | Path, delta: WeightDelta, saved: Path, formats: Iterable[str], work: Path
) -> pd.DataFrame:
    """The edit in other dtypes and numbers of files: verification, entries that survive rounding,
    and peak memory of a fresh process.

    Args:
        saved: folder of the delta.
        formats: ``DTYPE in N`` (files).
        work: folder for the copies.
    """
    found = []
    for name, source in _copies(base, formats, work):
        out = work / f"edited {name}"
        used = apply_memory(source, saved, out, delta.metadata["k"])
        report: VerifyReport = verify(source, out, delta, force=True)
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


def _copies(base: str | Path, formats: Iterable[str], work: Path) -> Iterator[tuple[str, Path]]:
    yield "as it is", Path(base)
    for name in formats:
        dtype, files = name.split(" in ")
        model, _ = load_model(base, dtype=dtype, device="cpu")
        size = 2 * model.num_parameters() // int(files) + 1024
        model.save_pretrained(work / name, max_shard_size=size)
        yield name, work / name


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
            under = {"method": "cdelta", "edit_category": category, "k": delta.metadata["k"]}
            with delta.applied(bench.model, delta.metadata["k"]), rounding():
                rows.append(bench.answers(test, attack=scheme, **under))
    return pd.concat(rows, ignore_index=True)


def rounding_table(
    base: str | Path, deltas: Mapping[str, WeightDelta], rows: pd.DataFrame
) -> pd.DataFrame:
    """What is left after rounding, per category and scheme: stored entries that differ, the
    component along the intended change, entries outside the mask that moved, and rates of base
    and edit.
    """
    found = []
    for category, delta in deltas.items():
        own = rows[rows["edit_category"].isin(("", category))]
        rates = kind_rates(own, category).set_index(["method", "attack", "kind"])["rate"]
        stored = quantisation_survival(base, delta, delta.metadata["k"])
        for row in ({"scheme": ""}, *stored):
            scheme = row["scheme"]
            cells = {
                f"{kind}_{name}_rate": rates.get((method, scheme, kind))
                for kind in ("target", "benign", "skills")
                for method, name in (("base", "base"), ("cdelta", "edited"))
            }
            found.append({"category": category, **row, "scheme": scheme or WHOLE, **cells})
    return pd.DataFrame(found)
