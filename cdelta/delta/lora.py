"""A weight delta as a PEFT adapter: exact, or of a chosen rank with its error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, NamedTuple

import torch
from safetensors.torch import save_file

from cdelta.delta.base import CARD, published_facts
from cdelta.delta.card import markdown_table, render
from cdelta.delta.weight_delta import WeightDelta, put
from cdelta.errors import CdeltaError
from cdelta.files import new_folder

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PREFIX = "base_model.model"


class Factors(NamedTuple):
    """One weight's change as ``b @ a``."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]


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
    weights = sorted(name for name in delta.values if name.endswith(".weight"))
    _check_expressible(delta, weights)
    modules, missed, wanted = {}, {}, {}
    for name in weights:
        module = name.removesuffix(".weight")
        modules[module], missed[module] = _factors(delta, name, rank)
        wanted[module] = delta.values[name].double().norm().item()
    tensors = _tensors(delta, modules, scale)
    adapter = Adapter(
        folder=Path(out),
        rank=max(factors.a.shape[0] for factors in modules.values()),
        error=_ratio(_norm(missed.values()), _norm(wanted.values())),
        errors={module: _ratio(missed[module], wanted[module]) for module in modules},
    )
    with new_folder(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors")
        ranks = {module: factors.a.shape[0] for module, factors in modules.items()}
        config = json.dumps(_config(delta, ranks), indent=1, sort_keys=True)
        (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        (folder / CARD).write_text(_card(delta, adapter, scale), encoding="utf-8")
    return adapter


def _check_expressible(delta: WeightDelta, weights: list[str]) -> None:
    shapes = delta.metadata.get("shapes") or {}
    if not all(name in shapes for name in delta.values):
        raise CdeltaError(
            "the delta does not record its parameters' shapes: "
            "fit it with this version of cdelta to export a LoRA."
        )
    delta.check_shapes(shapes.get)
    if not weights:
        raise CdeltaError("the delta changes no weight: there is nothing to export as a LoRA.")
    for name in delta.values:
        if not name.endswith(".weight") and name.removesuffix(".bias") + ".weight" not in weights:
            raise CdeltaError(
                f"{name} is edited without its weight: a LoRA cannot express that, "
                "use cdelta apply."
            )


def _factors(delta: WeightDelta, name: str, rank: int | None) -> tuple[Factors, float]:
    """The factors of one weight, and the norm of what they miss."""
    (dim, index), values = delta.slices[name], delta.values[name]
    if delta.metadata.get("conv1d"):  # stored [in, out]
        dim, values = 1 - dim, values.T
    size = delta.metadata["shapes"][name][delta.slices[name][0]]
    selector = torch.zeros(len(index), size)
    selector[torch.arange(len(index)), index] = 1
    if rank is None:
        return (Factors(values, selector.T) if dim == 0 else Factors(selector, values)), 0.0
    left, singular, right = torch.linalg.svd(values.double(), full_matrices=False)
    root = singular[:rank].sqrt()
    b, a = (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()
    missed = (values.double() - b.double() @ a.double()).norm().item()
    b, a = (selector.T @ b, a) if dim == 0 else (b, a @ selector)
    return Factors(_padded(a, 0, rank), _padded(b, 1, rank)), missed


def _padded(factor: Tensor, dim: int, rank: int) -> Tensor:
    """Zeros up to the rank, for modules with fewer masked rows."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _tensors(delta: WeightDelta, modules: Mapping[str, Factors], scale: float) -> dict[str, Tensor]:
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"{PREFIX}.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}.{module}.lora_B.weight"] = (b * scale).contiguous()
        if _has_biases(delta):
            bias = torch.zeros(len(b))
            if f"{module}.bias" in delta.values:
                put(bias, *delta.slices[f"{module}.bias"], delta.values[f"{module}.bias"])
            tensors[f"{PREFIX}.{module}.lora_B.bias"] = bias * scale
    return tensors


def _has_biases(delta: WeightDelta) -> bool:
    return any(name.endswith(".bias") for name in delta.values)


def _config(delta: WeightDelta, ranks: Mapping[str, int]) -> dict[str, object]:
    facts, largest = published_facts(delta.metadata), max(ranks.values())
    odd = {module: rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": facts["base"],
        "revision": facts["base_revision"],
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": _has_biases(delta),
        "fan_in_fan_out": bool(delta.metadata.get("conv1d")),
    }


def _card(delta: WeightDelta, adapter: Adapter, scale: float) -> str:
    facts = published_facts(delta.metadata)
    rows = [{"module": "all", "relative error": adapter.error}]
    rows += [{"module": name, "relative error": error} for name, error in adapter.errors.items()]
    return render(
        "adapter.md.j2",
        **facts,
        category=delta.metadata.get("category") or "one category",
        scale=scale,
        rank=adapter.rank,
        delta_hash=delta.hash(),
        table=markdown_table(rows),
    )


def _norm(norms) -> float:
    return sum(norm * norm for norm in norms) ** 0.5


def _ratio(missed: float, wanted: float) -> float:
    return missed / wanted if wanted else 0.0
