"""What remains of an edit when the weights are rounded afterwards.

Schemes: ``bf16`` and ``fp16``; ``int8`` (one scale per output channel) and ``int4`` (one per 32
inputs), symmetric round-to-nearest with torchao's scales; ``q8_0`` and ``q4_1``, GGUF's blocks of
32 inputs, bit for bit as llama.cpp's `gguf` package writes and reads them. They quantise the
weights of linear layers inside the blocks; embeddings, norms and biases stay.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cdelta.circuit.circuit import is_block_parameter
from cdelta.delta.apply import check_fits
from cdelta.delta.weight_delta import WeightDelta, put, shifted, take
from cdelta.errors import CdeltaError
from cdelta.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

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
    if scheme not in _ROUNDING:
        raise CdeltaError(f"unknown quantisation {scheme!r}: use {', '.join(SCHEMES)}.")
    return _ROUNDING[scheme](weight.float())


def fake_quantised(weight: Float[Tensor, "out in"], scheme: str) -> Float[Tensor, "out in"]:
    """fp32 values that the rounded weight stands for; see `codes`."""
    return codes(weight, scheme).values()


def _bf16(weight: Tensor) -> Codes:
    return Codes(weight.to(torch.bfloat16).float().unsqueeze(1))


def _fp16(weight: Tensor) -> Codes:
    return Codes(weight.to(torch.float16).float().unsqueeze(1))


def _int8(weight: Tensor) -> Codes:
    return _symmetric(weight.unsqueeze(1), 8)


def _int4(weight: Tensor) -> Codes:
    """A row that `GROUP` does not divide is one group."""
    return _symmetric(weight.unsqueeze(1) if weight.shape[1] % GROUP else _blocks(weight), 4)


def _symmetric(groups: Tensor, bits: int) -> Codes:
    scale = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    scale = scale.clamp(min=torch.finfo(torch.float32).eps)
    limit = 2 ** (bits - 1)
    return Codes((groups / scale).round().clamp(-limit, limit - 1), scale)


def _q8_0(weight: Tensor) -> Codes:
    """Rounds halves away from zero, and stores the scale in 16 bits."""
    if weight.shape[1] % GROUP:  # GGUF has no such block; its converters write 16 bits instead
        return _fp16(weight)
    groups = _blocks(weight)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    size = (groups * _inverse(scale)).abs()
    numbers = groups.sign() * (size.floor() + (2 * (size - size.floor())).floor())
    return Codes(numbers, scale.half().float())


def _q4_1(weight: Tensor) -> Codes:
    """Sixteen levels from the smallest to the largest entry, both stored in 16 bits."""
    if weight.shape[1] % GROUP:
        return _fp16(weight)
    groups = _blocks(weight)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    numbers = ((groups - low) * _inverse(scale) + 0.5).trunc().clamp(0, 15)
    return Codes(numbers, scale.half().float(), low.half().float())


def _blocks(weight: Tensor) -> Tensor:
    return weight.unflatten(1, (-1, GROUP))


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


_ROUNDING: Mapping[str, Callable[[Tensor], Codes]] = {
    "bf16": _bf16,
    "fp16": _fp16,
    "int8": _int8,
    "int4": _int4,
    "q8_0": _q8_0,
    "q4_1": _q4_1,
}
SCHEMES = tuple(_ROUNDING)


@contextmanager
def quantised(model, scheme: str) -> Iterator[None]:
    """The model with rounded weights, for evaluation; on exit the old bits are back.

    They are also after an exception.
    """
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and is_block_parameter(f"{name}.weight")
    ]
    old = [module.weight.data for module in linear]
    try:
        for module, weight in zip(linear, old, strict=True):
            flip = isinstance(module, Conv1D)  # stored [in, out]
            rounded = fake_quantised(weight.T if flip else weight, scheme)
            module.weight.data = (rounded.T if flip else rounded).to(weight.dtype).contiguous()
        yield
    finally:
        for module, weight in zip(linear, old, strict=True):
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
    check_fits(base, delta)
    totals: dict[str, Counter] = {scheme: Counter() for scheme in schemes}
    for name in (n for n in delta.values if n.endswith(".weight")):
        dim, index = delta.slices[name]
        wanted = delta.values[name] * scale
        old = base.get(base.key_of[name]).float()
        new = old.clone()
        put(new, dim, index, shifted(take(old, dim, index), delta.values[name], scale))
        if delta.metadata.get("conv1d"):  # stored [in, out]
            old, new, wanted, dim = old.T, new.T, wanted.T, 1 - dim
        for scheme in schemes:
            rounded = codes(old, scheme), codes(new, scheme)
            totals[scheme].update(_survival(*rounded, wanted, dim, index))
    return [_survival_row(scheme, total) for scheme, total in totals.items()]


def _survival(old: Codes, new: Codes, wanted: Tensor, dim: int, index: Tensor) -> Counter:
    moved = (old.numbers != new.numbers).flatten(1)
    got = take(new.values() - old.values(), dim, index).double()
    inside, meant = take(moved, dim, index), wanted != 0
    return Counter(
        entries=int(meant.sum()),
        survived=int((meant & inside).sum()),
        outside=int(moved.sum() - inside.sum()),
        along=(got * wanted.double()).sum().item(),
        wanted=wanted.double().square().sum().item(),
        missed=(got - wanted.double()).square().sum().item(),
    )


def _survival_row(scheme: str, total: Counter) -> dict[str, object]:
    norm = max(total["wanted"], 1e-300)
    return {
        "scheme": scheme,
        "entries": total["entries"],
        "survived": total["survived"],
        "share": total["survived"] / max(total["entries"], 1),
        "projection": total["along"] / norm,
        "error": (total["missed"] / norm) ** 0.5,
        "outside": total["outside"],
    }
