"""TODO edit.recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Callable

from torch import nn

from cdelta.errors import CdeltaError

if TYPE_CHECKING:
    pass

Stop = Callable[[nn.Module, str, int], "bool | str"]
"""``stop(model with the update applied, which update, step)``: is it selective? Asked of what `Settings.retain_on` names. `IN_VAIN`: it is not,
and more steps will not help, so that training begins again with other batches."""
IN_VAIN = "in vain"
SIDES = ("plus", "minus")
DIFFERENCE = "difference"
OBJECTIVES = ("contrastive", "positive", "margin")
RETAINING = ("answers", "kl")


@dataclass(frozen=True)
class Settings:
    """How both sides are trained. Raises `CdeltaError` on values that make no sense."""

    steps: int = 300
    """Most steps; both sides take them in lockstep, and a `stop` rule may end them earlier, together."""
    lr: float = 7e-4
    batch_size: int = 48
    seed: int = 0
    retain_share: float = 0.5
    """Share of retain rows in every batch, and their weight in the loss."""
    objective: str = "contrastive"
    """``contrastive`` and ``positive``: cross-entropy on the side's answers (``positive`` trains θ⁺ only). ``margin``: DPO."""
    retain_on: str = DIFFERENCE
    """Which model must keep the retain rows. ``difference``: the base with θ⁺ − θ⁻, so that drift which both sides share costs nothing.
    ``sides``: the base with each side by itself. Under ``positive`` both are θ⁺."""
    retain_pool: int = 3
    """A retain batch is drawn this many times too large, and those rows are trained on whose answers the update damages most (Selective-Backprop, 1910.00762)."""
    retain_loss: str = "answers"
    """``answers``: cross-entropy on the base's own answers. ``kl``: KL(base ‖ side) at every position of those answers."""
    focus: float = 1.0
    """A target row weighs its own loss to this power, so that the few rows that are hard are not given up; 0: all rows alike."""
    beta: float = 0.1
    """Temperature of the margin objective."""
    rank: int = 0
    """0 trains every entry; r > 0 trains a rank-r factorisation of every slice (LoRA on the circuit)."""
    warmup: int = 10
    """Steps of linear warm-up, before the linear decay to zero at `steps`."""
    clip: float = 1.0
    """Largest norm of the gradient of all entries together."""
    check_every: int = 50
    """Steps between two calls of `stop`, and between two saves of the state."""
    attempts: int = 3
    """How often training begins at most: again, with other batches, when `stop` says that the first attempt is in vain, until one is selective."""
    autocast: bool = False
    """Run the frozen base's products in bf16; entries and their gradients stay fp32."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "lr",
            "batch_size",
            "beta",
            "clip",
            "check_every",
            "retain_pool",
            "attempts",
        ):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise CdeltaError(f"{name} must be positive and finite, not {getattr(self, name)}.")
        if not 0 <= self.retain_share < 1:
            raise CdeltaError(f"retain_share must lie in [0, 1), not {self.retain_share}.")
        for name, known in (
            ("objective", OBJECTIVES),
            ("retain_loss", RETAINING),
            ("retain_on", (DIFFERENCE, "sides")),
        ):
            if getattr(self, name) not in known:
                raise CdeltaError(
                    f"unknown {name} {getattr(self, name)!r}: use {', '.join(known)}."
                )

    @classmethod
    def of(cls, **values: object) -> Settings:
        """Settings from keywords; an unknown one is an error."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise CdeltaError(
                f"unknown setting {', '.join(unknown)}: known are {', '.join(f.name for f in fields(cls))}."
            )
        return cls(**values)

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that the objective trains."""
        return SIDES[:1] if self.objective == "positive" else SIDES

    @property
    def keepers(self) -> tuple[str, ...]:
        """The updates that must keep the retain rows, and be selective before the training ends."""
        return self.sides if self.retain_on == "sides" or len(self.sides) == 1 else (DIFFERENCE,)

    def lr_factor(self, step: int) -> float:
        """Learning rate of a step (from 0) over `lr`."""
        return min(1.0, (step + 1) / max(self.warmup, 1)) * (1 - step / self.steps)


SKILLS_LOST = 0.01
"""Largest share of the skills' answers that an edit may change: the stop rule's tolerance and the cap on k."""
