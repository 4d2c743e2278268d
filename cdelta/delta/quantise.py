"""What remains of an edit when the weights are rounded afterwards: bf16, fp16, int8 per output channel, 4 bit per group.

The integer schemes are plain symmetric round-to-nearest with torchao's scales (largest |w| over half the integer range), held equal to
torchao's in the tests. They quantise the weights of linear layers inside the blocks; embeddings, norms and biases stay.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cdelta.circuit.mask import is_block_parameter
from cdelta.delta.apply import check_fits
from cdelta.delta.weight_delta import WeightDelta, check_scale, put, take
from cdelta.errors import CdeltaError
from cdelta.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


SCHEMES = ("bf16", "fp16", "int8", "int4")
GROUP = 32
"""Neighbouring inputs that share a scale in int4."""


def codes(
    weight: Float[Tensor, "out in"], scheme: str, group: int = GROUP
) -> tuple[Tensor, Tensor | float]:
    """(stored numbers [out group width], their scale [out group 1]) with weight ≈ numbers × scale; for floats the rounded weight and 1.

    A row whose length `group` does not divide is one group. Raises `CdeltaError` on an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise CdeltaError(f"unknown quantisation {scheme!r}: use {', '.join(SCHEMES)}.")
    weight = weight.float()
    if scheme in ("bf16", "fp16"):
        return weight.to(torch.bfloat16 if scheme == "bf16" else torch.float16).float().unsqueeze(
            1
        ), 1.0
    bits, width = (8, weight.shape[1]) if scheme == "int8" else (4, group)
    width = width if weight.shape[1] % width == 0 else weight.shape[1]
    groups = weight.unflatten(1, (-1, width))
    scale = (groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).clamp(
        min=torch.finfo(torch.float32).eps
    )
    return (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), scale


def fake_quantised(
    weight: Float[Tensor, "out in"], scheme: str, group: int = GROUP
) -> Float[Tensor, "out in"]:
    """fp32 values that the rounded weight stands for; see `codes`."""
    numbers, scale = codes(weight, scheme, group)
    return (numbers * scale).flatten(1)


@contextmanager
def quantised(model, scheme: str, group: int = GROUP) -> Iterator[None]:
    """The model with rounded weights, for evaluation; on exit, also by an exception, the old bits are back."""
    linear = [
        m
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and is_block_parameter(f"{name}.weight")
    ]
    old = [module.weight.data for module in linear]
    try:
        for module in linear:
            conv1d = isinstance(module, Conv1D)
            rounded = fake_quantised(
                module.weight.data.T if conv1d else module.weight.data, scheme, group
            )
            module.weight.data = (
                (rounded.T if conv1d else rounded).to(module.weight.dtype).contiguous()
            )
        yield
    finally:
        for module, weight in zip(linear, old):
            module.weight.data = weight


def quantisation_survival(
    base_path: str | Path,
    delta: WeightDelta,
    scale: float = 1.0,
    schemes: Sequence[str] = SCHEMES,
    group: int = GROUP,
) -> list[dict[str, object]]:
    """One row per scheme: how much of scale·ΔΘ_C is left between the rounded base and the rounded edit. One weight in memory at a time.

    Columns: ``scheme``; ``entries`` that the delta changes; ``survived`` of them whose stored number differs; ``share``; ``projection``,
    the rounded change's component along the intended one (1 = all of it arrived); ``error``, the norm of their difference over the
    intended norm; ``outside``, entries beyond the mask whose stored number differs because the delta changed their group's scale.
    """
    check_scale(scale)
    base = Checkpoint(base_path)
    check_fits(base, delta)
    flip = (lambda w: w.T) if delta.metadata.get("conv1d") else (lambda w: w)
    totals = {
        scheme: dict.fromkeys(("entries", "survived", "outside", "along", "wanted", "missed"), 0.0)
        for scheme in schemes
    }
    for name in (n for n in delta.values if n.endswith(".weight")):
        old = base.get(base.key_of[name]).float()
        new = old.clone()
        put(new, *delta.slices[name], take(old, *delta.slices[name]) + delta.values[name] * scale)
        for scheme in schemes:
            moved = flip(
                (codes(flip(old), scheme, group)[0] != codes(flip(new), scheme, group)[0]).flatten(
                    1
                )
            )
            change = flip(
                fake_quantised(flip(new), scheme, group) - fake_quantised(flip(old), scheme, group)
            )
            _add_survival(
                totals[scheme], moved, change, delta.slices[name], delta.values[name] * scale
            )
    return [_survival_row(scheme, total) for scheme, total in totals.items()]


def _add_survival(
    total: dict[str, float],
    moved: Tensor,
    change: Tensor,
    where: tuple[int, Tensor],
    wanted: Tensor,
) -> None:
    inside, got = take(moved, *where), take(change, *where).double()
    total["entries"] += int((wanted != 0).sum())
    total["survived"] += int(((wanted != 0) & inside).sum())
    total["outside"] += int(moved.sum() - inside.sum())
    total["along"] += (got * wanted.double()).sum().item()
    total["wanted"] += wanted.double().square().sum().item()
    total["missed"] += (got - wanted.double()).square().sum().item()


def _survival_row(scheme: str, total: dict[str, float]) -> dict[str, object]:
    norm = max(total["wanted"], 1e-300)
    return {
        "scheme": scheme,
        "entries": int(total["entries"]),
        "survived": int(total["survived"]),
        "share": total["survived"] / max(total["entries"], 1),
        "projection": total["along"] / norm,
        "error": (total["missed"] / norm) ** 0.5,
        "outside": int(total["outside"]),
    }
