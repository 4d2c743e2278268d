"""What remains of an edit when the weights are rounded afterwards.

Schemes: ``bf16`` and ``fp16``; ``int8`` (one scale per output channel) and ``int4`` (one per 32
inputs), symmetric round-to-nearest with torchao's scales; ``q8_0`` and ``q4_1``, GGUF's blocks of
32 inputs, bit for bit as llama.cpp's `gguf` package writes and reads them. They quantise the
weights of linear layers inside the blocks; embeddings, norms and biases stay.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cdelta.circuit.circuit import is_block_parameter
from cdelta.delta.weight_delta import WeightDelta, take
from cdelta.errors import CdeltaError
from cdelta.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float

SCHEMES = ("bf16", "fp16", "int8", "int4", "q8_0", "q4_1")
GROUP = 32
"""Neighbouring inputs that share a scale in int4, q8_0 and q4_1."""


class Codes(NamedTuple):
    """A rounded weight: ``weight ≈ numbers × scale + offset``."""

    numbers: Float[Tensor, "out group width"]
    """What is stored for each entry."""
    scale: Float[Tensor, "out group 1"] | float = 1.0
    offset: Float[Tensor, "out group 1"] | float = 0.0

    def values(self) -> Float[Tensor, "out in"]:
        """The fp32 values that the stored numbers stand for."""
        return (self.numbers * self.scale + self.offset).flatten(1)


def codes(weight: Float[Tensor, "out in"], scheme: str) -> Codes:
    """What `scheme` stores of a weight. Raises `CdeltaError` on an unknown scheme."""
    if scheme not in SCHEMES:
        raise CdeltaError(f"unknown quantisation {scheme!r}: use {', '.join(SCHEMES)}.")
    one_group = scheme == "int8" or weight.shape[1] % GROUP != 0
    groups = weight.float().unflatten(1, (-1, weight.shape[1] if one_group else GROUP))
    if scheme == "bf16":
        return Codes(groups.bfloat16().float())
    if scheme == "fp16" or (one_group and scheme in ("q8_0", "q4_1")):
        return Codes(groups.half().float())  # GGUF's converters, too, where blocks do not fit
    largest = groups.abs().amax(-1, keepdim=True)
    if scheme == "q8_0":  # rounds halves away from zero, and stores the scale in 16 bits
        scale = largest / 127
        size = (groups * _inverse(scale)).abs()
        numbers = groups.sign() * (size.floor() + (2 * (size - size.floor())).floor())
        return Codes(numbers, scale.half().float())
    if scheme == "q4_1":  # 16 levels from the smallest to the largest entry, both in 16 bits
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale = (high - low) / 15
        numbers = ((groups - low) * _inverse(scale) + 0.5).trunc().clamp(0, 15)
        return Codes(numbers, scale.half().float(), low.half().float())
    limit = 2 ** (int(scheme.removeprefix("int")) - 1)
    scale = (largest / (limit - 0.5)).clamp(min=torch.finfo(torch.float32).eps)
    return Codes((groups / scale).round().clamp(-limit, limit - 1), scale)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


@contextmanager
def quantised(model, scheme: str) -> Iterator[None]:
    """The model with rounded weights, for evaluation; on exit the old bits are back.

    They are also after an exception.
    """
    old = {
        module: module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and is_block_parameter(f"{name}.weight")
    }
    try:
        for module, weight in old.items():
            flipped = isinstance(module, Conv1D)  # stored [in, out]
            rounded = codes(weight.T if flipped else weight, scheme).values().to(weight.dtype)
            module.weight.data = (rounded.T if flipped else rounded).contiguous()
        yield
    finally:
        for module, weight in old.items():
            module.weight.data = weight


def quantisation_survival(
    base_path: str | Path,
    delta: WeightDelta,
    scale: float | None = None,
    schemes: Sequence[str] = SCHEMES,
) -> list[dict[str, object]]:
    """How much of scale·ΔΘ_C is left between the rounded base and the rounded edit.

    One row per scheme, with one weight in memory at a time: ``scheme``; ``entries`` that the delta
    changes; ``survived`` of them whose stored number differs; ``share``; ``projection``, the
    rounded change's component along the intended one (1: all of it arrived); ``error``, the norm of
    their difference over the intended norm; ``outside``, entries beyond the mask whose stored
    number differs because the delta changed their group's scale.
    """
    scale = delta.scale_or_own(scale)
    base = Checkpoint(base_path)
    delta.check_shapes(base.shapes)
    totals = {scheme: torch.zeros(6, dtype=torch.float64) for scheme in schemes}
    for name in (n for n in delta.values if n.endswith(".weight")):
        dim, index = delta.slices[name]
        wanted = delta.values[name] * scale
        old = base.get(base.key_of[name]).float()
        new = old.clone()
        delta.add_to(name, new, scale)
        if delta.metadata.get("conv1d"):  # stored [in, out]
            old, new, wanted, dim = old.T, new.T, wanted.T, 1 - dim
        for scheme in schemes:
            rounded = codes(old, scheme), codes(new, scheme)
            totals[scheme] += _survival(*rounded, wanted, dim, index)
    return [_survival_row(scheme, total) for scheme, total in totals.items()]


def _survival(old: Codes, new: Codes, wanted: Tensor, dim: int, index: Tensor) -> Tensor:
    """Of one weight: entries meant, survived and outside; the sums along, wanted and missed."""
    moved = (old.numbers != new.numbers).flatten(1)
    inside, meant = take(moved, dim, index), wanted != 0
    got, wanted = take(new.values() - old.values(), dim, index).double(), wanted.double()
    counts = meant.sum(), (meant & inside).sum(), moved.sum() - inside.sum()
    sums = (got * wanted).sum(), wanted.square().sum(), (got - wanted).square().sum()
    return torch.stack([*counts, *sums])


def _survival_row(scheme: str, total: Tensor) -> dict[str, object]:
    entries, survived, outside, along, wanted, missed = total.tolist()
    norm = max(wanted, 1e-300)
    return {
        "scheme": scheme,
        "entries": int(entries),
        "survived": int(survived),
        "share": survived / max(entries, 1),
        "projection": along / norm,
        "error": (missed / norm) ** 0.5,
        "outside": int(outside),
    }
