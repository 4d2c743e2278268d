"""TODO delta.lora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Sequence

import torch
from safetensors.torch import save_file

from cdelta.delta.weight_delta import (
    WeightDelta,
    check_scale,
    put,
)
from cdelta.errors import CdeltaError
from cdelta.files import new_folder

if TYPE_CHECKING:
    from torch import Tensor


# ---------------------------------------------------------------------- LoRA


def export_lora(delta: WeightDelta, out: str | Path, scale: float = 1.0) -> Path:
    """Write scale·ΔΘ_C as a PEFT adapter, exactly: rows are B = one-hot selector, A = values; columns are B = values, A = selector.

    The rank of every module is its number of masked rows or columns. Deltas of biases become `lora_bias`; PEFT then runs the adapter but
    cannot merge it into modules that have no bias (`cdelta apply` can). Raises `CdeltaError` if `out` exists or the delta records no
    shapes.
    """
    check_scale(scale)
    tensors, ranks = {}, {}
    for name, module in sorted(
        (n, n.removesuffix(".weight")) for n in delta.values if n.endswith(".weight")
    ):
        a, b = _lora_pair(delta, name)
        prefix = f"base_model.model.{module}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b * scale}
        ranks[module] = a.shape[0]
    biases = [n for n in delta.values if n.endswith(".bias")]
    if biases:
        _check_biases(biases, ranks)
        tensors |= {
            f"base_model.model.{module}.lora_B.bias": _lora_bias(delta, module, tensors) * scale
            for module in ranks
        }
    with new_folder(out) as partial:
        save_file(
            {name: t.contiguous() for name, t in tensors.items()},
            partial / "adapter_model.safetensors",
        )
        config = _lora_config(delta, ranks, bool(biases))
        (partial / "adapter_config.json").write_text(
            json.dumps(config, indent=1, sort_keys=True) + "\n"
        )
    return Path(out)


def _lora_pair(delta: WeightDelta, name: str) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) of one weight."""
    dim, index = delta.slices[name]
    shapes = delta.metadata.get("shapes", {})
    if name not in shapes:
        raise CdeltaError(
            "the delta does not record its parameters' shapes: fit it with this version of cdelta to export a LoRA."
        )
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
        raise CdeltaError(
            f"{alone[0]} is edited without its weight: a LoRA cannot express that, use cdelta apply."
        )


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
