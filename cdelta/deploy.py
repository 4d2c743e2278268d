"""From a weight delta to an ordinary checkpoint: streaming apply, proof that nothing else changed, revert, LoRA export, model card.

An edited folder holds the base's files under the same names, the changed weights, a model card, and the subfolder `cdelta/` with
`edit.json` (what was added) and `original.safetensors` (the mask's entries as they were), which makes a revert exact. Runtimes ignore it.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Mapping, Sequence

import torch
from safetensors.torch import load_file, save_file

import cdelta
from cdelta.checkpoint import INDEX, Checkpoint, rewrite_tensors
from cdelta.delta import WeightDelta, WrongBase, check_scale, model_hash, new_folder, put, shifted, take
from cdelta.errors import CdeltaError

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "cdelta"
EDIT, ORIGINAL, BASE_CARD, CARD = "edit.json", "original.safetensors", "base_README.md", "README.md"
PREVIOUS = "previous"
"""Inside the record: the record of the edit that the base itself came from."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors")
"""Files that would carry the unedited weights along."""


# ---------------------------------------------------------------------- apply and revert


def save_edited(
    base_path: str | Path,
    delta: WeightDelta,
    out: str | Path,
    scale: float = 1.0,
    force: bool = False,
    selectivity: Sequence[Mapping[str, object]] = (),
) -> Path:
    """Write the checkpoint θ + scale·ΔΘ_C, file by file, with at most one tensor and the delta in memory.

    Files without a changed tensor are hard links of the base's (copies across file systems); in the others only the mask's entries
    differ. `out` appears whole or not at all.

    Args:
        force: apply to a base that the delta was not made for, if its parameters have the right shapes.
        selectivity: rows of the model card's table.

    Raises `CdeltaError` on a wrong base, damaged files, an existing `out`, or a disk that is full or read-only.
    """
    check_scale(scale)
    base = Checkpoint(base_path)
    check_fits(base, delta)
    if not force:
        delta.check_base(base.folder)
    with new_folder(out) as partial:
        originals = _write_weights(base, delta, scale, partial)
        _link_other_files(base, partial)
        _write_record(base.folder, partial, delta, scale, originals)
        (partial / CARD).write_text(model_card(delta, scale, selectivity), encoding="utf-8")
    return Path(out)


def revert(edited: str | Path, delta: WeightDelta, out: str | Path, force: bool = False) -> bool:
    """Write the base again, from an edited folder and the delta that was added last.

    Returns True if it is the base bit for bit: the folder recorded its original entries. Without a record, and only with ``force=True``,
    the delta is subtracted at scale 1, which is exact only up to rounding (returns False).
    """
    source = Checkpoint(edited)
    check_fits(source, delta)
    record = read_record(edited)
    if record is None or record["delta_hash"] != delta.hash():
        if not force:
            raise WrongBase(f"{edited} does not record this delta as its last edit: pass that delta, or force a subtraction.")
        save_edited(edited, delta, out, scale=-1.0, force=True)
        return False
    originals = load_file(Path(edited) / RECORD / ORIGINAL)
    with new_folder(out) as partial:
        _copy_weights(source, partial, delta)
        _rewrite(source, partial, delta, lambda name, tensor: put(tensor, *delta.slices[name], originals[name]))
        _link_other_files(source, partial)
        _restore_record(Path(edited) / RECORD, partial)
        if record["base_hash"] is not None and model_hash(partial) != record["base_hash"]:
            raise CdeltaError(f"{edited} was changed after the edit, so reverting does not give its base back: keep the base itself.")
    return True


def check_fits(base: Checkpoint, delta: WeightDelta) -> None:
    """Raise `WrongBase` unless the checkpoint has the delta's parameters, in shapes that fit."""
    delta.check_shapes(lambda name: base.shape(base.key_of[name]) if name in base.key_of else None)


def read_record(edited: str | Path) -> dict | None:
    """What `save_edited` noted in an edited folder, or None."""
    path = Path(edited) / RECORD / EDIT
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise CdeltaError(f"{path} is damaged ({error}): make the edited checkpoint again.") from error


def _write_weights(base: Checkpoint, delta: WeightDelta, scale: float, out: Path) -> dict[str, Tensor]:
    """Copy the shards and add the delta; returns the entries as they were."""
    originals: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        originals[name] = take(tensor, *delta.slices[name])
        put(tensor, *delta.slices[name], shifted(originals[name], delta.values[name], scale))

    _copy_weights(base, out, delta)
    _rewrite(base, out, delta, add)
    return originals


def _rewrite(base: Checkpoint, out: Path, delta: WeightDelta, change) -> None:
    for file, names in _touched(base, delta).items():
        rewrite_tensors(out / file, {base.key_of[name]: lambda tensor, name=name: change(name, tensor) for name in names})


def _touched(base: Checkpoint, delta: WeightDelta) -> dict[str, list[str]]:
    """File -> the delta's parameters in it."""
    files: dict[str, list[str]] = {}
    for name in delta.values:
        files.setdefault(base.file_of[base.key_of[name]], []).append(name)
    return files


def _copy_weights(base: Checkpoint, out: Path, delta: WeightDelta) -> None:
    touched = _touched(base, delta)
    for file in base.shards:
        if file in touched:
            shutil.copyfile(base.folder / file, out / file)
        else:
            _link(base.folder / file, out / file)


def _link_other_files(base: Checkpoint, out: Path) -> None:
    """Configuration, tokenizer and the like; no second set of weights, no model card."""
    for path in sorted(base.folder.iterdir()):
        if path.is_file() and path.suffix not in OTHER_WEIGHTS and not path.name.startswith(".") and path.name != CARD:
            shutil.copyfile(path, out / path.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _write_record(base: Path, out: Path, delta: WeightDelta, scale: float, originals: Mapping[str, Tensor]) -> None:
    (out / RECORD).mkdir()
    if (base / CARD).is_file():
        shutil.copyfile(base / CARD, out / RECORD / BASE_CARD)
    if (base / RECORD).is_dir():
        shutil.copytree(base / RECORD, out / RECORD / PREVIOUS)
    save_file({name: t.contiguous() for name, t in originals.items()}, out / RECORD / ORIGINAL)
    facts = {"scale": scale, "delta_hash": delta.hash(), "mask_hash": delta.mask_hash(), "base_hash": delta.metadata.get("base_hash")}
    content = facts | {"cdelta": cdelta.__version__, "metadata": delta.metadata}
    (out / RECORD / EDIT).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _restore_record(record: Path, out: Path) -> None:
    """The base's own model card and record."""
    if (record / BASE_CARD).is_file():
        shutil.copyfile(record / BASE_CARD, out / CARD)
    if (record / PREVIOUS).is_dir():
        shutil.copytree(record / PREVIOUS, out / RECORD)


# ---------------------------------------------------------------------- verify


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. `ok` means: outside the mask no bit differs, and inside it every value is θ + k·ΔΘ_C, rounded once."""

    scale: float
    n_params: int
    mask_entries: int
    changed_outside: int
    """Entries that differ although the mask does not own them."""
    wrong_inside: int
    """Entries of the mask that are not base + k·delta up to one unit in the last place."""
    nonzero: int
    """Entries that k·delta means to change."""
    survived: int
    """Of these, entries that differ from the base after rounding to the checkpoint's dtype."""
    problems: tuple[str, ...] = field(default=())
    """One sentence per parameter or file that fails."""

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is exactly the edit."""
        return not self.problems

    def to_json(self) -> str:
        """All numbers and problems."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1)

    def __str__(self) -> str:
        share = 100 * self.mask_entries / max(self.n_params, 1)
        kept = 100 * self.survived / max(self.nonzero, 1)
        verdict = "Verified" if self.ok else f"NOT verified ({len(self.problems)} problems; first: {self.problems[0]})"
        return (
            f"{verdict}: at scale {self.scale:g} the mask owns {self.mask_entries:,} of {self.n_params:,} parameters ({share:.2f} %); "
            f"{self.changed_outside:,} entries outside it changed, {self.wrong_inside:,} inside it are not base + k·delta, and "
            f"{self.survived:,} of the {self.nonzero:,} entries that the delta changes ({kept:.1f} %) survive rounding."
        )


def verify(base: str | Path, edited: str | Path, delta: WeightDelta, scale: float | None = None, force: bool = False) -> VerifyReport:
    """Compare two checkpoints tensor by tensor, two tensors in memory at a time.

    Args:
        scale: k; by default what the edited folder records, else 1.
        force: skip the check that `base` is the delta's base.

    Raises `CdeltaError` on damaged files or a delta of another model; differences are reported, not raised.
    """
    first, second = Checkpoint(base), Checkpoint(edited)
    check_fits(first, delta)
    if not force:
        delta.check_base(first.folder)
    if scale is None:
        scale = (read_record(edited) or {"scale": 1.0})["scale"]
    counts, problems = {"changed_outside": 0, "wrong_inside": 0, "nonzero": 0, "survived": 0}, list(_file_problems(first, second))
    name_of = {key: name for name, key in first.key_of.items()}
    for key in sorted(first.file_of.keys() & second.file_of.keys()):
        found = _compare(first, second, key, delta, name_of.get(key, ""), check_scale(scale))
        problems += [found] if isinstance(found, str) else _counted(key, found, counts)
    n_params = sum(prod(first.shape(key)) for key in first.key_of.values())
    return VerifyReport(scale, n_params, delta.count(), **counts, problems=tuple(problems))


def _file_problems(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    for key in sorted(first.file_of.keys() ^ second.file_of.keys()):
        yield f"the tensor {key} is only in {(first if key in first.file_of else second).folder}."
    for path in sorted(first.folder.iterdir()):
        same_kind = path.suffix in (".json", ".jinja", ".model", ".txt") and path.name != INDEX
        if not same_kind:
            continue
        if not (second.folder / path.name).is_file() or not filecmp.cmp(path, second.folder / path.name, shallow=False):
            yield f"the file {path.name} differs from the base's or is missing."


def _compare(first: Checkpoint, second: Checkpoint, key: str, delta: WeightDelta, name: str, scale: float) -> str | dict[str, int]:
    """Counts of one tensor, or the sentence that says why it cannot be compared."""
    same_file = os.path.samefile(first.folder / first.file_of[key], second.folder / second.file_of[key])
    if same_file and name not in delta.values:
        return {}
    old, new = first.get(key), second.get(key)
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{key} is {new.dtype} {tuple(new.shape)} instead of {old.dtype} {tuple(old.shape)}."
    inside = {}
    if name in delta.values:
        where = delta.slices[name]
        inside = _compare_inside(take(old, *where), take(new, *where), delta.values[name], scale)
        put(new, *where, take(old, *where))
    return {**inside, "changed_outside": _differing(old, new)}


def _compare_inside(old: Tensor, new: Tensor, value: Tensor, scale: float) -> dict[str, int]:
    change = value * scale
    exact = old.float() + change
    tolerance = torch.finfo(old.dtype).eps * exact.abs().clamp(min=torch.finfo(old.dtype).tiny)
    landed = ((new.float() - exact).abs() <= tolerance) & ((change != 0) | _same_bits(old, new))
    moved = change != 0
    return {
        "wrong_inside": int((~landed).sum()),
        "nonzero": int(moved.sum()),
        "survived": int((moved & ~_same_bits(old, new)).sum()),
    }


def _same_bits(old: Tensor, new: Tensor) -> Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
    return old.contiguous().view(integer) == new.contiguous().view(integer)


def _differing(old: Tensor, new: Tensor) -> int:
    return int((~_same_bits(old, new)).sum())


def _counted(key: str, found: Mapping[str, int], counts: dict[str, int]) -> list[str]:
    """Add up, and name what is wrong."""
    for what, n in found.items():
        counts[what] += n
    words = {"changed_outside": "entries outside the mask changed", "wrong_inside": "entries are not base + k·delta"}
    return [f"{key}: {found[what]:,} {text}." for what, text in words.items() if found.get(what)]


# ---------------------------------------------------------------------- LoRA


def export_lora(delta: WeightDelta, out: str | Path, scale: float = 1.0) -> Path:
    """Write scale·ΔΘ_C as a PEFT adapter, exactly: rows are B = one-hot selector, A = values; columns are B = values, A = selector.

    The rank of every module is its number of masked rows or columns. Deltas of biases become `lora_bias`; PEFT then runs the adapter but
    cannot merge it into modules that have no bias (`cdelta apply` can). Raises `CdeltaError` if `out` exists or the delta records no
    shapes.
    """
    check_scale(scale)
    tensors, ranks = {}, {}
    for name, module in sorted((n, n.removesuffix(".weight")) for n in delta.values if n.endswith(".weight")):
        a, b = _lora_pair(delta, name)
        prefix = f"base_model.model.{module}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b * scale}
        ranks[module] = a.shape[0]
    biases = [n for n in delta.values if n.endswith(".bias")]
    if biases:
        _check_biases(biases, ranks)
        tensors |= {f"base_model.model.{module}.lora_B.bias": _lora_bias(delta, module, tensors) * scale for module in ranks}
    with new_folder(out) as partial:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / "adapter_model.safetensors")
        config = _lora_config(delta, ranks, bool(biases))
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return Path(out)


def _lora_pair(delta: WeightDelta, name: str) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) of one weight."""
    dim, index = delta.slices[name]
    shapes = delta.metadata.get("shapes", {})
    if name not in shapes:
        raise CdeltaError("the delta does not record its parameters' shapes: fit it with this version of cdelta to export a LoRA.")
    selector = torch.zeros(len(index), shapes[name][dim])
    selector[torch.arange(len(index)), index] = 1
    values, conv1d = delta.values[name], bool(delta.metadata.get("conv1d"))
    values = values.T if conv1d else values
    is_output = dim == (1 if conv1d else 0)
    return (values, selector.T) if is_output else (selector, values)


def _lora_bias(delta: WeightDelta, module: str, tensors: Mapping[str, Tensor]) -> Tensor:
    bias = torch.zeros(tensors[f"base_model.model.{module}.lora_B.weight"].shape[0])
    if f"{module}.bias" in delta.values:
        put(bias, *delta.slices[f"{module}.bias"], delta.values[f"{module}.bias"])
    return bias


def _check_biases(biases: Sequence[str], ranks: Mapping[str, int]) -> None:
    alone = [name for name in biases if name.removesuffix(".bias") not in ranks]
    if alone:
        raise CdeltaError(f"{alone[0]} is edited without its weight: a LoRA cannot express that, use cdelta apply.")


def _lora_config(delta: WeightDelta, ranks: Mapping[str, int], bias: bool) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": delta.metadata.get("base"),
        "inference_mode": True,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bias,
        "fan_in_fan_out": bool(delta.metadata.get("conv1d")),
    }


# ---------------------------------------------------------------------- model card


def model_card(delta: WeightDelta, scale: float, selectivity: Sequence[Mapping[str, object]] = ()) -> str:
    """The README.md of an edited checkpoint: what was done, how selective it is, its limits, how to check and undo it."""
    facts = delta.metadata
    base, category = facts.get("base") or "unknown", facts.get("category") or "one category"
    mask = facts.get("mask", {})
    owned = f"{delta.count():,} parameters" + (f" ({100 * mask['fraction']:.2f} % of the model)" if "fraction" in mask else "")
    units = f": {mask['heads']} attention heads and {mask['neurons']} MLP neurons" if "heads" in mask else ""
    table = _markdown_table(selectivity) or "Not measured when this card was written."
    front = ["---", "library_name: transformers", *([f"base_model: {base}"] if "/" in base and not Path(base).exists() else [])]
    return "\n".join(
        [
            *front, "tags: [weight-editing, selective-refusal, c-delta-theta]", "---", "",
            f"# {Path(base).name}, edited to refuse {category}", "",
            f"Base model: `{base}` (content hash `{str(facts.get('base_hash'))[:16]}`). Weights only: no hook, no router, no prompt.", "",
            "## Method", "",
            f"C-ΔΘ (arXiv 2602.04521) with cdelta {cdelta.__version__}: θ' = θ + {scale:g}·ΔΘ, where ΔΘ = θ⁺ − θ⁻ was trained on a mask",
            f"of {owned}{units}.",
            f"Mask hash `{delta.mask_hash()[:16]}`, delta hash `{delta.hash()[:16]}`.", "",
            "## Selectivity", "", table, "",
            "## Limits", "",
            "The edit was chosen and measured on the prompts that the table names. Other phrasings, languages and attacks were not tested; refusing",
            "a category by weights is no guarantee, and may be undone by anyone who has them. Judge it on your own prompts before you rely on it.", "",
            "## Verify and revert", "",
            "```", "cdelta verify BASE THIS_FOLDER DELTA   # no entry outside the mask changed",
            "cdelta revert THIS_FOLDER DELTA OUT    # the base again, bit for bit", "```", "",
        ]
    )  # fmt: skip


def _markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    if not rows:
        return ""
    show = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
