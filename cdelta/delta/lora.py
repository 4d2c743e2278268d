"""A weight delta as a PEFT adapter: exact, or of a chosen rank with its error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cdelta.delta.base import CARD, markdown_table, published_facts, render
from cdelta.delta.weight_delta import WeightDelta, put
from cdelta.errors import CdeltaError
from cdelta.files import new_folder, sorted_json, write_text

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PREFIX = "base_model.model"


class Factors(NamedTuple):
    """One weight's change as ``b @ a``, and the norm of what it misses."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    missed: float = 0.0


@dataclass(frozen=True)
class Adapter:
    """A written adapter."""

    folder: Path
    rank: int
    """The largest rank of a module."""
    error: float
    """Norm of what the adapter misses of the delta, over the delta's norm; 0 for the exact one."""
    errors: Mapping[str, float]
    """The same for each module."""


def export_lora(
    delta: WeightDelta, out: str | Path, scale: float | None = None, rank: int | None = None
) -> Adapter:
    """Write scale·ΔΘ_C as a PEFT adapter.

    Without `rank` it is exact, and a module's rank is its number of masked rows or columns: rows
    are B = one-hot selector, A = values; columns are B = values, A = selector. With `rank` every
    module has that one (as vLLM wants it, which takes at most 512): the truncated SVD, the best
    approximation of that rank in the Frobenius norm (Eckart and Young).

    Deltas of biases become `lora_bias`; PEFT then runs the adapter but cannot merge it into modules
    that have no bias (`cdelta apply` can).

    Args:
        delta: records the shapes of its parameters.
        out: new folder.
        scale: k; by default the delta's own.
        rank: at least 1.

    Raises `CdeltaError` if `out` exists, the rank is below 1, or a LoRA cannot express the delta.
    """
    scale = delta.scale_or_own(scale)
    if rank is not None and rank < 1:
        raise CdeltaError(f"a LoRA's rank is at least 1, not {rank}.")
    modules = {name: _factors(delta, name, rank) for name in _expressible(delta)}
    each = delta.norms()
    norms = {name: each[f"{name}.weight"] for name in modules}
    missed = math.hypot(*(factors.missed for factors in modules.values()))
    adapter = Adapter(
        folder=Path(out),
        rank=max(len(factors.a) for factors in modules.values()),
        error=missed / (math.hypot(*norms.values()) or 1.0),
        errors={name: found.missed / (norms[name] or 1.0) for name, found in modules.items()},
    )
    with new_folder(out) as folder:
        save_file(_tensors(delta, modules, scale), folder / "adapter_model.safetensors")
        config = sorted_json(_config(delta, modules, adapter.rank))
        write_text(folder / "adapter_config.json", config)
        rows = [{"module": "all", "relative error": adapter.error}]
        rows += [{"module": m, "relative error": error} for m, error in adapter.errors.items()]
        card = render(
            "adapter.md.j2",
            **published_facts(delta.metadata),
            category=delta.metadata.get("category") or "one category",
            scale=scale,
            rank=adapter.rank,
            delta_hash=delta.hash(),
            table=markdown_table(rows),
        )
        write_text(folder / CARD, card)
    return adapter


def _expressible(delta: WeightDelta) -> list[str]:
    """The modules of the delta, sorted. Raises `CdeltaError` if a LoRA cannot express it."""
    shapes = delta.metadata.get("shapes") or {}
    if not all(name in shapes for name in delta.values):
        raise CdeltaError(
            "the delta does not record its parameters' shapes: "
            "fit it with this version of cdelta to export a LoRA."
        )
    delta.check_shapes(shapes)
    modules = [n.removesuffix(".weight") for n in sorted(delta.values) if n.endswith(".weight")]
    if not modules:
        raise CdeltaError("the delta changes no weight: there is nothing to export as a LoRA.")
    for name in delta.values:
        if not name.endswith(".weight") and name.removesuffix(".bias") not in modules:
            raise CdeltaError(
                f"{name} is edited without its weight: a LoRA cannot express that, "
                "use cdelta apply."
            )
    return modules


def _factors(delta: WeightDelta, module: str, rank: int | None) -> Factors:
    name = f"{module}.weight"
    (dim, index), values = delta.slices[name], delta.values[name]
    selector = F.one_hot(index, delta.metadata["shapes"][name][dim]).float()
    if delta.metadata.get("conv1d"):  # stored [in, out]
        dim, values = 1 - dim, values.T
    if rank is None:
        return Factors(values, selector.T) if dim == 0 else Factors(selector, values)
    left, singular, right = torch.linalg.svd(values.double(), full_matrices=False)
    root = singular[:rank].sqrt()
    b, a = (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()
    missed = (values.double() - b.double() @ a.double()).norm().item()
    b, a = (selector.T @ b, a) if dim == 0 else (b, a @ selector)
    absent = rank - len(a)  # of modules with fewer masked rows
    return Factors(F.pad(a, (0, 0, 0, absent)), F.pad(b, (0, absent)), missed)


def _tensors(delta: WeightDelta, modules: Mapping[str, Factors], scale: float) -> dict[str, Tensor]:
    tensors = {}
    for module, (a, b, _) in modules.items():
        tensors[f"{PREFIX}.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}.{module}.lora_B.weight"] = (b * scale).contiguous()
        if _has_biases(delta):
            bias, name = torch.zeros(len(b)), f"{module}.bias"
            if name in delta.values:
                put(bias, *delta.slices[name], delta.values[name])
            tensors[f"{PREFIX}.{module}.lora_B.bias"] = bias * scale
    return tensors


def _has_biases(delta: WeightDelta) -> bool:
    return any(name.endswith(".bias") for name in delta.values)


def _config(delta: WeightDelta, modules: Mapping[str, Factors], rank: int) -> dict[str, object]:
    facts = published_facts(delta.metadata)
    odd = {module: len(found.a) for module, found in modules.items() if len(found.a) != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": facts["base"],
        "revision": facts["base_revision"],
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": _has_biases(delta),
        "fan_in_fan_out": bool(delta.metadata.get("conv1d")),
    }
