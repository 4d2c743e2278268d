"""θ⁺ and θ⁻ trained on a parameter mask over a frozen base.

ΔΘ_C = θ⁺ − θ⁻ (C-ΔΘ, arXiv 2602.04521). Only the mask's entries exist as trainable tensors, in
fp32: a slice of output rows adds ``x Δᵀ`` to those outputs of its linear layer, a slice of input
columns adds ``x[cols] Δᵀ``. Nothing below the first masked layer needs a gradient, and none is
computed there. The paper leaves loss, optimiser and stopping open; what stands here is our choice.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from cdelta.circuit.circuit import ParameterMask
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.forward import (
    BaseAnswers,
    Parts,
    focused,
    margin,
    predictions,
    products_in_bf16,
    prompt_logits,
    retained,
)
from cdelta.edit.recipe import DIFFERENCE, SIDES, EditRecipe
from cdelta.edit.rows import Data, length
from cdelta.edit.slices import SliceHooks, new_leaves, slice_values
from cdelta.errors import CdeltaError
from cdelta.memory import peak_memory
from cdelta.state import StateFile

if TYPE_CHECKING:
    from torch import Tensor

LOG_EVERY = 10
"""Steps between two reads of the losses from the device."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of every leaf."""


class Verdict(Enum):
    """What a stop rule says of a training."""

    SELECTIVE = "selective"
    """The update does what it should, and nothing else: stop."""
    NOT_YET = "not yet"
    """More steps may make it so."""
    RESTART = "restart"
    """More steps will not: begin again with other batches."""


Stop = Callable[..., Verdict]
"""``stop(model with the update applied, which update, step)``."""


class Training:
    """One attempt: θ⁺ ("plus") and θ⁻ ("minus") in lockstep on the same batches."""

    def __init__(
        self,
        model,
        hooks: SliceHooks,
        mask: ParameterMask,
        data: Data,
        how: EditRecipe,
        checkpoint: str | Path | None = None,
        attempt: int = 0,
    ):
        self.how, self.attempt, self.verdict = how, attempt, Verdict.NOT_YET
        self.model, self._hooks, self.data = model, hooks, data
        self._slices = mask.slices
        self._sides = {side: new_leaves(mask, how, data.device) for side in how.sides}
        self.base = BaseAnswers(model, hooks, data, how)
        self.leaves = [leaf for own in self._sides.values() for leaf in own.values()]
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)
        self.optimizer = torch.optim.Adam(self.leaves, lr=how.lr)
        identity = json.dumps([asdict(how), mask.hash(), data.examples], sort_keys=True)
        self._state = None
        if checkpoint:
            path = Path(checkpoint) / f"training{attempt or ''}.safetensors"
            self._state = StateFile(path, hashlib.sha256(identity.encode()).hexdigest())
        self._step = 0
        self._log: list[dict] = []

    @property
    def log(self) -> list[dict]:
        """Rows ``side, step, loss, target_loss, retain_loss, grad_norm, lr, seconds``.

        Raises `CdeltaError` if a loss is not finite.
        """
        for row in self._log:
            row |= {name: float(value) for name, value in row.items() if torch.is_tensor(value)}
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise CdeltaError(
                    f"the training diverged at step {row['step']}: lower the learning rate (lr)."
                )
        return self._log

    @property
    def ended(self) -> dict[str, object]:
        """Steps taken, whether the stop rule ended the training (else it ran out of steps), and at
        which attempt.
        """
        stopped = self.verdict is Verdict.SELECTIVE
        return {"steps": self._step, "stopped": stopped, "attempt": self.attempt + 1}

    def values(self, which: str) -> dict[str, Tensor]:
        """Parameter name -> what a side, or the difference, adds to its slice; differentiable in
        the leaves.
        """
        if which in self._sides:
            return slice_values(self._sides[which], self._slices)
        plus, minus = (self.values(side) for side in SIDES)
        return {name: plus[name] - minus[name] for name in plus}

    def delta(self, which: str) -> WeightDelta:
        """A frozen copy of a side, or of the difference."""
        values = self.values(which).items()
        frozen = {name: value.detach().cpu().clone() for name, value in values}
        return WeightDelta(frozen, self._slices)

    def run(self, stop: Stop | None = None, progress: bool = False) -> Verdict:
        """Train until `stop` says that it is selective, or to restart, or the steps are used up."""
        self._resume()
        sides = " and ".join(f"θ {side}" for side in self.how.sides)
        with tqdm(
            total=self.how.steps, initial=self._step, desc=sides, disable=not progress
        ) as bar:
            while self._step < self.how.steps and self.verdict is Verdict.NOT_YET:
                self._take_step()
                bar.update()
                if self._step % LOG_EVERY == 0:
                    loss, peak = self.log[-1]["loss"], peak_memory(self.data.device) / 2**20
                    bar.set_postfix(loss=f"{loss:.3f}", peak_mb=f"{peak:.0f}")
                if self._step % self.how.check_every == 0 or self._step == self.how.steps:
                    self._check(stop)
        return self.verdict

    # ------------------------------------------------------------------ one step

    def _take_step(self) -> None:
        start, how = time.perf_counter(), self.how
        lr = how.lr * how.lr_factor(self._step)
        share = how.retain_share if self.data.retain_plan else 0.0
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=False)
        rows = self.data.target_plan[self._step]
        target = {side: self._backward(side, 1 - share, side, rows) for side in how.sides}
        retain = {which: self._retain(which, share) for which in how.keepers if share}
        norms = {side: clip_grad_norm_(own.values(), how.clip) for side, own in self._sides.items()}
        self.optimizer.step()
        self._step += 1
        for side in how.sides:
            kept = retain.get(side, retain.get(DIFFERENCE, torch.tensor(0.0)))
            row = {
                "side": side,
                "step": self._step,
                "loss": (1 - share) * target[side] + share * kept,
                "target_loss": target[side],
                "retain_loss": kept,
                "grad_norm": norms[side],
                "lr": lr,
                "seconds": time.perf_counter() - start,
            }
            self._log.append(row)

    def _gain(self, key: str, rows: list[int]) -> Tensor:
        """How much more probable than under the base the answers of `key` are, per row, in nats."""
        batch = self.data.batch(key, rows)
        found = predictions(self.model, batch)
        with torch.no_grad(), self._hooks.off():
            base = predictions(self.model, batch)
        return base.per_row(base.token_losses()) - found.per_row(found.token_losses())

    def _retain(self, which: str, share: float) -> Tensor:
        """Add the gradient of the retain loss of an update; returns the loss."""
        with self._applied(which):
            rows = self._hardest(self.data.retain_plan[self._step])
        return self._backward(which, share, "retain", rows)

    def _loss(self, key: str, rows: list[int]) -> Parts:
        """Of retain rows the retain loss, of a side's rows the objective on its answers."""
        if self.how.objective == "margin" and key in SIDES:
            other = SIDES[key == SIDES[0]]
            return margin(self._gain(key, rows), self._gain(other, rows), self.how)
        batch = self.data.batch(key, rows)
        found = predictions(self.model, batch)
        if key in SIDES:
            return focused(found, self.how)
        return retained(found, partial(self.base.log_p, rows, batch), self.how)

    @torch.no_grad()
    def _hardest(self, rows: list[int]) -> list[int]:
        """Of a pool of retain rows, the share that is trained on: those that the update damages
        most now.
        """
        if self.how.retain_pool == 1:
            return rows
        parts = self._passes("retain", rows)
        damage = torch.cat([self._damage(part) for part in parts])
        hardest = damage.topk(len(rows) // self.how.retain_pool).indices.tolist()
        order = sum(parts, [])
        return [order[i] for i in hardest]

    def _damage(self, rows: list[int]) -> Tensor:
        batch = self.data.batch("retain", rows)
        if self.how.hardest_by == "loss":
            return predictions(self.model, batch).row_losses()
        log_q = prompt_logits(self.model, batch).log_softmax(-1)
        log_p = self.base.first_log_p(rows, batch)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def _passes(self, key: str, rows: list[int]) -> list[list[int]]:
        """The rows in parts of at most `batch_tokens` tokens, padding included."""
        if not self.how.batch_tokens:
            return [rows]
        sizes = {row: length(self.data.examples[key][row]) for row in rows}
        parts: list[list[int]] = [[]]
        for row in sorted(rows, key=sizes.__getitem__):
            if parts[-1] and sizes[row] * (len(parts[-1]) + 1) > self.how.batch_tokens:
                parts.append([])
            parts[-1].append(row)
        return parts

    @contextmanager
    def _applied(self, which: str) -> Iterator[None]:
        """The model behaves as with the update, differentiable in the leaves."""
        values, bf16 = self.values(which), products_in_bf16(self.data.device, self.how.bf16)
        with self._hooks.adding(values), bf16:
            yield

    def _backward(self, which: str, share: float, key: str, rows: list[int]) -> Tensor:
        """Add `share` times the gradient of the loss of an update on some rows; returns the loss.

        Target and retain rows, and parts, go through the model one after the other to save memory.
        """
        total = weight = torch.zeros(())
        gradients = [torch.zeros_like(leaf) for leaf in self.leaves]
        for part in self._passes(key, rows):
            with self._applied(which):
                loss, weights = self._loss(key, part)
            found = torch.autograd.grad(loss, self.leaves, materialize_grads=True)
            for gradient, new in zip(gradients, found, strict=True):
                gradient += new
            total, weight = total + loss.detach(), weight + weights
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            assert leaf.grad is not None
            leaf.grad += gradient * (share / weight)
        return total / weight

    # ------------------------------------------------------------------ stopping and state

    def _check(self, stop: Stop | None) -> None:
        verdicts = set()
        if stop:
            for which in self.how.keepers:
                with self.delta(which).applied(self.model):
                    verdicts.add(stop(self.model, which, self._step))
        if Verdict.RESTART in verdicts:
            last = self.attempt + 1 >= self.how.attempts
            self.verdict = Verdict.NOT_YET if last else Verdict.RESTART
        elif verdicts == {Verdict.SELECTIVE}:
            self.verdict = Verdict.SELECTIVE
        if self._state:
            self._save(self._state)

    def _save(self, state: StateFile) -> None:
        kept = [{"leaf": leaf, **self.optimizer.state[leaf]} for leaf in self.leaves]
        tensors = {
            f"{index}/{part}": value
            for index, parts in enumerate(kept)
            for part, value in parts.items()
        }
        facts = {"step": self._step, "verdict": self.verdict.value, "log": self.log}
        state.write(tensors, facts)

    def _resume(self) -> None:
        found = self._state.read() if self._state else None
        if found is None:
            return
        tensors, facts = found
        self._step, self._log = facts["step"], facts["log"]
        self.verdict = Verdict(facts["verdict"])
        states = {}
        for index, leaf in enumerate(self.leaves):
            leaf.data.copy_(tensors[f"{index}/leaf"])
            states[index] = {part: tensors[f"{index}/{part}"] for part in MOMENTS}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})
