"""θ⁺ and θ⁻ trained on a parameter mask over a frozen base, and the scale k.

ΔΘ_C = θ⁺ − θ⁻ (C-ΔΘ, arXiv 2602.04521). Only the mask's entries exist as trainable tensors, in fp32: a slice of output rows adds
``x Δᵀ`` to those outputs of its linear layer, a slice of input columns adds ``x[cols] Δᵀ``. The paper leaves loss, optimiser and
stopping open; what stands here is our choice.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from cdelta.circuit.mask import ParameterMask
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.data import Data
from cdelta.edit.losses import RETAIN_LOSSES, TARGET_LOSSES, row_losses
from cdelta.edit.recipe import DIFFERENCE, IN_VAIN, SIDES, Settings, Stop
from cdelta.edit.slices import Entries, SliceHooks
from cdelta.edit.state import StateFile
from cdelta.memory import peak_memory_mb
from cdelta.models.chat import Batch, answer_logits

if TYPE_CHECKING:
    from torch import Tensor


# ---------------------------------------------------------------------- training


class Training:
    """θ⁺ ("plus") and θ⁻ ("minus") in lockstep. `log` and `ended` tell how it went."""

    def __init__(
        self,
        model,
        hooks: SliceHooks,
        mask: ParameterMask,
        data: Data,
        how: Settings,
        checkpoint=None,
        attempt: int = 0,
    ):
        self.how, self.log, self.attempt, self.in_vain = how, [], attempt, False
        self._model, self._hooks, self._data = model, hooks, data
        self._entries = {side: Entries(mask, how, data.device) for side in how.sides}
        self.optimizer = torch.optim.Adam([leaf for _, leaf in self._leaves()], lr=how.lr)
        identity = json.dumps([asdict(how), mask.hash(), data.hash()], sort_keys=True)
        self._state = (
            StateFile(Path(checkpoint) / f"training{attempt or ''}.safetensors", identity)
            if checkpoint
            else None
        )
        self._step, self._stopped = 0, False

    @property
    def ended(self) -> dict[str, object]:
        """Steps taken, whether the stop rule ended the training (else it ran out of steps), and at which attempt."""
        return {"steps": self._step, "stopped": self._stopped, "attempt": self.attempt + 1}

    def delta(self, which: str) -> WeightDelta:
        """A frozen copy of a side, or of the difference."""
        if which in self._entries:
            return self._entries[which].delta()
        return self.delta("plus") - self.delta("minus")

    def run(self, stop: Stop | None = None, progress: bool = False) -> None:
        """Train until `stop` says so, or that it is `in_vain`, or the steps are used up."""
        if self._state:
            self._resume()
        with tqdm(
            total=self.how.steps,
            initial=self._step,
            desc=" and ".join(f"θ {side}" for side in self.how.sides),
            disable=not progress,
        ) as bar:
            while self._step < self.how.steps and not self._stopped and not self.in_vain:
                rows = self._take_step()
                bar.update()
                bar.set_postfix(
                    loss=f"{rows[0]['loss']:.3f}",
                    s_per_step=f"{rows[0]['seconds']:.2f}",
                    peak_mb=f"{peak_memory_mb():.0f}",
                )
                if self._step % self.how.check_every == 0 or self._step == self.how.steps:
                    self._check(stop)

    def _leaves(self) -> Iterator[tuple[str, Tensor]]:
        for side, entries in self._entries.items():
            for key, leaf in entries.leaves.items():
                yield f"{side}/{key}", leaf

    def _take_step(self) -> list[dict]:
        start = time.perf_counter()
        lr = self.how.lr * self.how.lr_factor(self._step)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        share = self.how.retain_share if self._data.retain_plan else 0.0
        target = {
            side: self._backward(side, self._target_loss, 1 - share) for side in self.how.sides
        }
        retain = {
            which: self._backward(which, self._retain_loss, share)
            for which in self.how.keepers
            if share
        }
        norms = {
            side: clip(entries.leaves.values(), self.how.clip)
            for side, entries in self._entries.items()
        }
        self.optimizer.step()
        self._step += 1
        rows = []
        for side in self.how.sides:
            kept = retain.get(side, retain.get(DIFFERENCE, 0.0))
            parts = {
                "loss": (1 - share) * target[side] + share * kept,
                "target_loss": target[side],
                "retain_loss": kept,
            }
            rows.append(
                {
                    "side": side,
                    "step": self._step,
                    **parts,
                    "grad_norm": norms[side],
                    "lr": lr,
                    "seconds": time.perf_counter() - start,
                }
            )
        self.log += rows
        return rows

    def _backward(self, which: str, loss_of: Callable[[str], Tensor], share: float) -> float:
        """Add one loss's gradient; target and retain rows go through the model one after the other to save memory."""
        self._hooks.values = self._values(which)
        with torch.autocast(self._data.device.type, torch.bfloat16, enabled=self.how.autocast):
            loss = loss_of(which)
        (share * loss).backward()
        self._hooks.values = {}
        return loss.item()

    def _values(self, which: str) -> dict[str, Tensor]:
        if which in self._entries:
            return self._entries[which].values()
        plus, minus = (self._entries[side].values() for side in SIDES)
        return {name: plus[name] - minus[name] for name in plus}

    def _target_loss(self, side: str) -> Tensor:
        rows = self._data.target_plan[self._step]
        wanted = self._data.batch(side, rows)
        other = (
            self._data.batch(SIDES[side == SIDES[0]], rows)
            if self.how.objective == "margin"
            else None
        )
        return TARGET_LOSSES[self.how.objective](
            self._logits, self._base_logits, wanted, other, self.how
        )

    def _retain_loss(self, which: str) -> Tensor:
        batch = self._data.batch("retain", self._hardest(self._data.retain_plan[self._step]))
        return RETAIN_LOSSES[self.how.retain_loss](
            self._logits, self._base_logits, batch, None, self.how
        )

    @torch.no_grad()
    def _hardest(self, rows: list[int]) -> list[int]:
        """Of a pool of retain rows, the share that is trained on: those with the largest loss now."""
        if self.how.retain_pool == 1:
            return rows
        batch = self._data.batch("retain", rows)
        chosen = (
            row_losses(self._logits(batch), batch.labels)
            .topk(len(rows) // self.how.retain_pool)
            .indices
        )
        return [rows[i] for i in chosen.tolist()]

    def _logits(self, batch: Batch) -> Tensor:
        return answer_logits(self._model, batch)

    @torch.no_grad()
    def _base_logits(self, batch: Batch) -> Tensor:
        with self._hooks.off():
            return answer_logits(self._model, batch)

    def _check(self, stop: Stop | None) -> None:
        said = [self._said(stop, which) for which in self.how.keepers] if stop else [False]
        self._stopped = all(said) and IN_VAIN not in said
        self.in_vain = IN_VAIN in said and self.attempt + 1 < self.how.attempts
        if self._state:
            self._save()

    def _said(self, stop: Stop, which: str) -> bool | str:
        with self.delta(which).applied(self._model):
            return stop(self._model, which, self._step)

    def _save(self) -> None:
        tensors = {f"leaf/{key}": leaf.detach() for key, leaf in self._leaves()}
        for key, leaf in self._leaves():
            tensors |= {
                f"adam/{key}/{part}": value for part, value in self.optimizer.state[leaf].items()
            }
        self._state.write(
            tensors,
            {
                "step": self._step,
                "stopped": self._stopped,
                "in_vain": self.in_vain,
                "log": self.log,
            },
        )

    def _resume(self) -> None:
        found = self._state.read()
        if found is None:
            return
        tensors, facts = found
        self._step, self._stopped, self.in_vain, self.log = (
            facts["step"],
            facts["stopped"],
            facts["in_vain"],
            facts["log"],
        )
        for key, leaf in self._leaves():
            leaf.data.copy_(tensors[f"leaf/{key}"])
            state = {
                part: tensors[f"adam/{key}/{part}"] for part in ("step", "exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[leaf] = state | {
                p: state[p].to(leaf.device) for p in ("exp_avg", "exp_avg_sq")
            }


def clip(leaves: Iterable[Tensor], largest: float) -> float:
    """Clip one side's gradient by its norm; returns the norm before. Raises an error if it is not finite."""
    return nn.utils.clip_grad_norm_(leaves, largest, error_if_nonfinite=True).item()
