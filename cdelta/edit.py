"""θ⁺ and θ⁻ trained on a parameter mask over a frozen base, and the scale k.

ΔΘ_C = θ⁺ − θ⁻ (C-ΔΘ, arXiv 2602.04521). Only the mask's entries exist as trainable tensors, in fp32: a slice of output rows adds
``x Δᵀ`` to those outputs of its linear layer, a slice of input columns adds ``x[cols] Δᵀ``. The paper leaves loss, optimiser and
stopping open; what stands here is our choice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import __version__ as transformers_version
from transformers.pytorch_utils import Conv1D

import cdelta
from cdelta.attribution import frozen
from cdelta.delta import WeightDelta, model_hash
from cdelta.errors import CdeltaError, refuse_test
from cdelta.mask import ParameterMask, Slices
from cdelta.policy.pairs import chat_ids

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Rows = Sequence[tuple[str, str]]
"""(prompt, response) strings."""
Stop = Callable[[nn.Module, str, int], "bool | str"]
"""``stop(model with the update applied, which update, step)``: is it selective? Asked of what `Settings.retain_on` names. `IN_VAIN`: it is not,
and more steps will not help, so that training begins again with other batches."""
IN_VAIN = "in vain"
SIDES = ("plus", "minus")
DIFFERENCE = "difference"
OTHER_BATCHES = 1000
"""What the next attempt adds to the seed."""
POOL = 16
"""Batches whose rows are drawn together, sorted by length and cut, so that a batch pads little."""
NO_LABEL = -100


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
        for name in ("steps", "lr", "batch_size", "beta", "clip", "check_every", "retain_pool", "attempts"):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise CdeltaError(f"{name} must be positive and finite, not {getattr(self, name)}.")
        if not 0 <= self.retain_share < 1:
            raise CdeltaError(f"retain_share must lie in [0, 1), not {self.retain_share}.")
        for name, known in (("objective", TARGET_LOSSES), ("retain_loss", RETAIN_LOSSES), ("retain_on", (DIFFERENCE, "sides"))):
            if getattr(self, name) not in known:
                raise CdeltaError(f"unknown {name} {getattr(self, name)!r}: use {', '.join(known)}.")

    @classmethod
    def of(cls, **values: object) -> Settings:
        """Settings from keywords; an unknown one is an error."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise CdeltaError(f"unknown setting {', '.join(unknown)}: known are {', '.join(f.name for f in fields(cls))}.")
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


# ---------------------------------------------------------------------- fitting


def fit_delta(
    model,
    tok,
    mask: ParameterMask,
    positive: Rows,
    negative: Rows,
    retain: Rows,
    *,
    stop: Stop | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    metadata: Mapping[str, object] | None = None,
    **settings: object,
) -> WeightDelta:
    """ΔΘ_C = θ⁺ − θ⁻ on `mask`; θ⁺ alone under ``objective="positive"``.

    Args:
        positive, negative: the same prompts in the same order, refused and answered.
        retain: prompts whose behaviour must stay, with the base model's own answers.
        stop, checkpoint, progress, metadata, settings: as `fit_sides` takes them.

    The model is as it was, bit for bit, afterwards. `metadata` records base, mask, settings, versions, and how the training ended.
    """
    plus, minus, _ = fit_sides(
        model, tok, mask, positive, negative, retain,
        stop=stop, checkpoint=checkpoint, progress=progress, metadata=metadata, **settings,
    )  # fmt: skip
    return plus if minus is None else plus - minus


def fit_sides(
    model,
    tok,
    mask: ParameterMask,
    positive: Rows,
    negative: Rows,
    retain: Rows,
    *,
    stop: Stop | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    metadata: Mapping[str, object] | None = None,
    **settings: object,
) -> tuple[WeightDelta, WeightDelta | None, list[dict]]:
    """Δ⁺, Δ⁻ (None under ``objective="positive"``) and the log, trained in lockstep on the same batches.

    Args:
        stop: called every `check_every` steps with the update in the model's weights (with each side, under ``retain_on="sides"``); the
            training ends when it is True of all, and begins again when it is `IN_VAIN` for any.
        checkpoint: folder for the training state; a run that finds its own state there goes on from it, to the same result.
        progress: show loss, seconds per step and peak memory.
        metadata: entries to record with the deltas (category, ...).
        settings: fields of `Settings`.

    Log rows: ``side, step, loss, target_loss, retain_loss, grad_norm, lr, seconds``.
    """
    how = Settings.of(**settings)
    for rows, what in ((positive, "training θ⁺"), (negative, "training θ⁻"), (retain, "training with retain rows")):
        refuse_test(rows, what)
    if model.training:
        raise CdeltaError("the model is in training mode, where dropout makes the sides differ: call model.eval() first.")
    facts = {**_facts(model, mask, how), **(metadata or {})}
    with frozen(model), SliceHooks(model, mask.slices) as hooks:
        for attempt in range(how.attempts):
            again = replace(how, seed=how.seed + OTHER_BATCHES * attempt)
            data = Data.build(model, tok, positive, negative, retain, again)
            training = Training(model, hooks, mask, data, again, checkpoint, attempt)
            training.run(stop, progress)
            if training.ended["stopped"] or not (training.in_vain or attempt):
                break
    plus, minus = (training.delta(side).with_metadata(**facts, training=training.ended) if side in how.sides else None for side in SIDES)
    return plus, minus, training.log


def _facts(model, mask: ParameterMask, how: Settings) -> dict[str, object]:
    return {
        "base": str(model.config._name_or_path),
        "base_revision": getattr(model.config, "_commit_hash", None),
        "base_hash": model_hash(model),
        "conv1d": any(isinstance(module, Conv1D) for module in model.modules()),
        "shapes": {name: list(shape) for name, shape in mask.shapes.items()},
        "mask_hash": mask.hash(),
        "mask": mask.report(),
        "settings": asdict(how),
        "versions": {"cdelta": cdelta.__version__, "torch": torch.__version__, "transformers": transformers_version},
    }


# ---------------------------------------------------------------------- data


@dataclass(frozen=True)
class Batch:
    """Rows laid out as ``padding | prompt | answer | padding``, so that the answers' logits are the last columns."""

    input_ids: Int[Tensor, "row pos"]
    attention_mask: Int[Tensor, "row pos"]
    position_ids: Int[Tensor, "row pos"]
    labels: Int[Tensor, "row answer"]


@dataclass(frozen=True)
class Data:
    """Token ids of the rows, and which rows every step sees: the same for both sides."""

    answers: Mapping[str, list[tuple[list[int], list[int]]]] = field(repr=False)
    """Side, or "retain" -> (prompt ids, answer ids) per row."""
    target_plan: list[list[int]]
    retain_plan: list[list[int]]
    pad: int
    device: torch.device

    @classmethod
    def build(cls, model, tok, positive: Rows, negative: Rows, retain: Rows, how: Settings) -> Data:
        """Tokenise once, and draw every step's rows from the seed. Raises `CdeltaError` on rows that cannot be trained on."""
        _check_rows(positive, negative, retain, how)
        stops = stop_ids(model, tok)
        rows = {"plus": positive, "minus": negative, "retain": retain if how.retain_share else []}
        answers = {key: [example_ids(tok, *row, stops) for row in value] for key, value in rows.items()}
        size = lambda *keys: [sum(len(part) for key in keys for part in answers[key][i]) for i in range(len(answers[keys[0]]))]
        n_retain = min(max(round(how.batch_size * how.retain_share), 1), how.batch_size - 1) if answers["retain"] else 0
        generator = torch.Generator().manual_seed(how.seed)
        target_plan = plan(size(*(s for s in SIDES if answers[s])), how.steps, how.batch_size - n_retain, generator)
        retain_plan = plan(size("retain"), how.steps, n_retain * how.retain_pool, generator) if n_retain else []
        pad = tok.pad_token_id if tok.pad_token_id is not None else stops[0]
        return cls(answers, target_plan, retain_plan, pad, next(model.parameters()).device)

    def batch(self, key: str, rows: Sequence[int]) -> Batch:
        """Tensors of the given rows of a side, or of "retain"."""
        return collate([self.answers[key][i] for i in rows], self.pad, self.device)

    def hash(self) -> str:
        """sha256 of all token ids."""
        return hashlib.sha256(json.dumps(self.answers, sort_keys=True).encode()).hexdigest()


def _check_rows(positive: Rows, negative: Rows, retain: Rows, how: Settings) -> None:
    if not positive:
        raise CdeltaError("no target rows to train on: the category is empty in this split.")
    if how.objective != "positive" and [row[0] for row in positive] != [row[0] for row in negative]:
        raise CdeltaError("positive and negative rows must hold the same prompts in the same order, refused and answered.")
    if how.retain_share and not retain:
        raise CdeltaError("no retain rows: give benign prompts with the base model's answers, or set retain_share to 0.")
    if how.retain_share and how.batch_size < 2:
        raise CdeltaError("batch_size must be at least 2 to hold a target row and a retain row.")


def stop_ids(model, tok) -> list[int]:
    """Token ids that end an answer. Raises `CdeltaError` if neither tokenizer nor generation config names one."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    found = [i for i in dict.fromkeys([tok.eos_token_id, *ids]) if i is not None]
    if not found:
        raise CdeltaError("the tokenizer has no end-of-sequence token: set tok.eos_token, or answers would never end.")
    return found


def example_ids(tok, prompt: str, response: str, stops: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with its end token as the chat template writes them.

    Where the template does not continue the prompt's own ids (or there is none), the answer's plain tokens and end-of-sequence.
    """
    start = chat_ids(tok, prompt)
    if tok.chat_template is not None:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        whole = tok.apply_chat_template(turns, return_dict=True)["input_ids"]
        if whole[: len(start)] == start and len(whole) > len(start):
            return start, _ended(whole[len(start) :], stops)
    return start, _ended(tok(response, add_special_tokens=False)["input_ids"], stops)


def _ended(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return ids[: end + 1] if end is not None else [*ids, stops[0]]


def plan(sizes: Sequence[int], steps: int, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Rows of every step's batch: whole passes in random order, in pools of `POOL` batches that are cut by length and shuffled."""
    batches: list[list[int]] = []
    queue: list[int] = []
    while len(batches) < steps:
        while len(queue) < POOL * batch_size:
            queue += torch.randperm(len(sizes), generator=generator).tolist()
        pool, queue = sorted(queue[: POOL * batch_size], key=lambda i: sizes[i]), queue[POOL * batch_size :]
        cut = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        batches += [cut[i] for i in torch.randperm(POOL, generator=generator).tolist()]
    return batches[:steps]


def collate(rows: Sequence[tuple[list[int], list[int]]], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Tensors of (prompt ids, answer ids) rows. The answer's last token is only ever a label."""
    width, n_answer = max(len(p) for p, _ in rows), max(len(a) for _, a in rows)
    ids, seen, labels = [], [], []
    for prompt, answer in rows:
        left, right = width - len(prompt), n_answer - len(answer)
        ids.append([pad] * left + prompt + answer[:-1] + [pad] * right)
        seen.append([0] * left + [1] * (len(prompt) + len(answer) - 1) + [0] * right)
        labels.append(answer + [NO_LABEL] * right)
    mask = torch.tensor(seen)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(*(t.to(device) for t in (torch.tensor(ids), mask, positions, torch.tensor(labels))))


# ---------------------------------------------------------------------- losses


def answer_logits(model, batch: Batch) -> Float[Tensor, "row answer vocab"]:
    """fp32 logits that predict each answer token."""
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.labels.shape[1],
        use_cache=False,
    )
    return out.logits.float()


def _cross_entropy(side: Callable, base: Callable, wanted: Batch, other: Batch | None, how: Settings) -> Tensor:
    """Mean over the answers' tokens."""
    return F.cross_entropy(side(wanted).flatten(0, 1), wanted.labels.flatten(), ignore_index=NO_LABEL)


def _focused(side: Callable, base: Callable, wanted: Batch, other: Batch | None, how: Settings) -> Tensor:
    """Mean over rows, each row's mean over its answer's tokens, weighted by the row's own loss to the power of `focus`."""
    rows = row_losses(side(wanted), wanted.labels)
    weights = rows.detach().clamp(min=1e-6) ** how.focus
    return (weights * rows).sum() / weights.sum()


def _margin(side: Callable, base: Callable, wanted: Batch, other: Batch, how: Settings) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7) of the side's answer over the other side's, mean over rows."""
    gain = lambda batch: sequence_logp(side(batch), batch.labels) - sequence_logp(base(batch), batch.labels)
    return -F.logsigmoid(how.beta * (gain(wanted) - gain(other))).mean()


def _kl(side: Callable, base: Callable, wanted: Batch, other: Batch | None, how: Settings) -> Tensor:
    """KL(base ‖ side), mean over the answers' tokens."""
    real = wanted.labels != NO_LABEL
    return F.kl_div(side(wanted)[real].log_softmax(-1), base(wanted)[real].log_softmax(-1), reduction="batchmean", log_target=True)


def sequence_logp(logits: Float[Tensor, "row answer vocab"], labels: Int[Tensor, "row answer"]) -> Float[Tensor, "row"]:
    """Summed log-probability of each row's answer."""
    return -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=NO_LABEL, reduction="none").sum(-1)


def row_losses(logits: Float[Tensor, "row answer vocab"], labels: Int[Tensor, "row answer"]) -> Float[Tensor, "row"]:
    """Mean cross-entropy of each row's answer."""
    return -sequence_logp(logits, labels) / (labels != NO_LABEL).sum(-1)


TARGET_LOSSES = {"contrastive": _focused, "positive": _focused, "margin": _margin}
RETAIN_LOSSES = {"answers": _cross_entropy, "kl": _kl}


# ---------------------------------------------------------------------- the trained entries


class SliceHooks:
    """While open, the linear layers behave as if `values` were added on `slices` of their parameters.

    `values` maps parameter names to tensors and is set by the trainer; `off()` suspends it. The stored weights never change.
    """

    def __init__(self, model: nn.Module, slices: Slices):
        self.values: Mapping[str, Tensor] = {}
        self._model, self._slices = model, slices
        self._handles: list = []

    def __enter__(self) -> SliceHooks:
        for name, (dim, index) in self._slices.items():
            path, kind = name.rsplit(".", 1)
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_hook(self._hook(name, _addition(module, kind, dim), index)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base model, inside the block."""
        values, self.values = self.values, {}
        try:
            yield
        finally:
            self.values = values

    def _hook(self, name: str, add: Callable, index: Tensor):
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if name in self.values:
                add(output, inputs[0], self.values[name], index.to(output.device))

        return hook


def _addition(module: nn.Module, kind: str, dim: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """How values on a slice of a layer's weight or bias change its output (in place: nothing else has seen it yet)."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise CdeltaError(f"only plain linear layers can be edited, not {type(module).__name__}: load the model unquantised.")
    if kind == "bias":
        return _add_bias
    output_axis = 1 if isinstance(module, Conv1D) else 0
    add = _add_rows if dim == output_axis else _add_columns
    return (lambda y, x, values, index: add(y, x, values.T, index)) if output_axis else add


def _add_rows(y: Tensor, x: Tensor, values: Float[Tensor, "rows in"], index: Tensor) -> None:
    y.index_add_(-1, index, F.linear(x, values.to(x.dtype)).to(y.dtype))


def _add_columns(y: Tensor, x: Tensor, values: Float[Tensor, "out columns"], index: Tensor) -> None:
    y.add_(F.linear(x.index_select(-1, index), values.to(x.dtype)))


def _add_bias(y: Tensor, x: Tensor, values: Float[Tensor, "rows"], index: Tensor) -> None:
    y.index_add_(-1, index, values.to(y.dtype).expand(*y.shape[:-1], -1))


class Entries:
    """The trainable fp32 leaves of one side: every entry of the mask, or a rank-r factorisation of every slice."""

    def __init__(self, mask: ParameterMask, how: Settings, device: torch.device):
        zeros = WeightDelta.zeros(mask).values
        self.leaves: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(how.seed)
        for name, value in zeros.items():
            if how.rank and value.dim() == 2:
                rank = min(how.rank, *value.shape)
                self.leaves[f"{name}:down"] = torch.randn(rank, value.shape[1], generator=generator) / math.sqrt(value.shape[1])
                self.leaves[f"{name}:up"] = value.new_zeros(value.shape[0], rank)
            else:
                self.leaves[name] = value
        self.leaves = {key: leaf.to(device).requires_grad_() for key, leaf in self.leaves.items()}
        self._names, self._slices = tuple(zeros), mask.slices

    def values(self) -> dict[str, Tensor]:
        """Parameter name -> the slice's values, differentiable in the leaves."""
        get = self.leaves
        return {name: get[name] if name in get else get[f"{name}:up"] @ get[f"{name}:down"] for name in self._names}

    def delta(self) -> WeightDelta:
        """A frozen copy."""
        return WeightDelta({n: v.detach().cpu().clone() for n, v in self.values().items()}, self._slices)


# ---------------------------------------------------------------------- training


class Training:
    """θ⁺ ("plus") and θ⁻ ("minus") in lockstep. `log` and `ended` tell how it went."""

    def __init__(self, model, hooks: SliceHooks, mask: ParameterMask, data: Data, how: Settings, checkpoint=None, attempt: int = 0):
        self.how, self.log, self.attempt, self.in_vain = how, [], attempt, False
        self._model, self._hooks, self._data = model, hooks, data
        self._entries = {side: Entries(mask, how, data.device) for side in how.sides}
        self.optimizer = torch.optim.Adam([leaf for _, leaf in self._leaves()], lr=how.lr)
        identity = json.dumps([asdict(how), mask.hash(), data.hash()], sort_keys=True)
        self._state = StateFile(Path(checkpoint) / f"training{attempt or ''}.safetensors", identity) if checkpoint else None
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
        with tqdm(total=self.how.steps, initial=self._step, desc=" and ".join(f"θ {side}" for side in self.how.sides), disable=not progress) as bar:
            while self._step < self.how.steps and not self._stopped and not self.in_vain:
                rows = self._take_step()
                bar.update()
                bar.set_postfix(loss=f"{rows[0]['loss']:.3f}", s_per_step=f"{rows[0]['seconds']:.2f}", peak_mb=f"{peak_memory_mb():.0f}")
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
        target = {side: self._backward(side, self._target_loss, 1 - share) for side in self.how.sides}
        retain = {which: self._backward(which, self._retain_loss, share) for which in self.how.keepers if share}
        norms = {side: clip(entries.leaves.values(), self.how.clip) for side, entries in self._entries.items()}
        self.optimizer.step()
        self._step += 1
        rows = []
        for side in self.how.sides:
            kept = retain.get(side, retain.get(DIFFERENCE, 0.0))
            parts = {"loss": (1 - share) * target[side] + share * kept, "target_loss": target[side], "retain_loss": kept}
            rows.append({"side": side, "step": self._step, **parts, "grad_norm": norms[side], "lr": lr, "seconds": time.perf_counter() - start})
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
        other = self._data.batch(SIDES[side == SIDES[0]], rows) if self.how.objective == "margin" else None
        return TARGET_LOSSES[self.how.objective](self._logits, self._base_logits, wanted, other, self.how)

    def _retain_loss(self, which: str) -> Tensor:
        batch = self._data.batch("retain", self._hardest(self._data.retain_plan[self._step]))
        return RETAIN_LOSSES[self.how.retain_loss](self._logits, self._base_logits, batch, None, self.how)

    @torch.no_grad()
    def _hardest(self, rows: list[int]) -> list[int]:
        """Of a pool of retain rows, the share that is trained on: those with the largest loss now."""
        if self.how.retain_pool == 1:
            return rows
        batch = self._data.batch("retain", rows)
        chosen = row_losses(self._logits(batch), batch.labels).topk(len(rows) // self.how.retain_pool).indices
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
            tensors |= {f"adam/{key}/{part}": value for part, value in self.optimizer.state[leaf].items()}
        self._state.write(tensors, {"step": self._step, "stopped": self._stopped, "in_vain": self.in_vain, "log": self.log})

    def _resume(self) -> None:
        found = self._state.read()
        if found is None:
            return
        tensors, facts = found
        self._step, self._stopped, self.in_vain, self.log = facts["step"], facts["stopped"], facts["in_vain"], facts["log"]
        for key, leaf in self._leaves():
            leaf.data.copy_(tensors[f"leaf/{key}"])
            state = {part: tensors[f"adam/{key}/{part}"] for part in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[leaf] = state | {p: state[p].to(leaf.device) for p in ("exp_avg", "exp_avg_sq")}


def clip(leaves: Iterable[Tensor], largest: float) -> float:
    """Clip one side's gradient by its norm; returns the norm before. Raises an error if it is not finite."""
    return nn.utils.clip_grad_norm_(leaves, largest, error_if_nonfinite=True).item()


@dataclass(frozen=True)
class StateFile:
    """Training state in one safetensors file, replaced atomically. `identity` says which run it belongs to."""

    path: Path
    identity: str

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        """Replace the state."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        header = {"identity": self.identity, "facts": json.dumps(facts)}
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata=header)
        os.replace(partial, self.path)

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """The state, or None if there is none yet. Raises `CdeltaError` if it is damaged or another run's."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise CdeltaError(f"the training state {self.path} is damaged ({error}): remove it and start again.") from error
        if header["identity"] != self.identity:
            raise CdeltaError(f"{self.path} belongs to a run with other data, mask or settings: choose another checkpoint folder.")
        return tensors, json.loads(header["facts"])


def peak_memory_mb() -> float:
    """Peak memory so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ---------------------------------------------------------------------- stopping and scaling


def selective_stop(
    rates: Callable[[nn.Module], Mapping[str, float]],
    base: Mapping[str, float],
    target: str,
    refuse_at: float = 0.95,
    comply_at: float = 0.05,
    tolerance: float = 0.02,
    strict: Mapping[str, float] | None = None,
) -> Stop:
    """A stop rule: this update refuses (θ⁺, θ⁺ − θ⁻) or answers (θ⁻) the target, and every other group is as in the base.

    Args:
        rates: refusal rate per group of validation prompts (the target's name among them), measured on a model.
        base: the same rates of the base model; `tolerance` is the largest change of any other group.
        strict: tolerances of single groups, where they are not `tolerance`.
        refuse_at: least target rate of θ⁺ and of the difference. comply_at: largest target rate of θ⁻, or the base's if that is lower.
    """

    allowed = {group: tolerance for group in base if group != target} | dict(strict or {})

    def stop(model: nn.Module, side: str, step: int) -> bool:
        found = rates(model)
        reached = found[target] <= min(comply_at, base[target]) if side == "minus" else found[target] >= refuse_at
        return reached and all(abs(found[group] - base[group]) <= most for group, most in allowed.items() if group in base)

    return stop


@dataclass(frozen=True)
class Caps:
    """What a scale may cost on validation; None sets no cap."""

    benign: float | None = None
    """Largest refusal rate of benign twins, in the worst category."""
    other: float | None = None
    """Largest change of another category's refusal rate."""
    utility: float | None = None
    """Least accuracy on skills."""

    def excess(self, row: Mapping[str, float]) -> float:
        """By how much a row of the k curve breaks its worst-broken cap; at most 0 when it meets all."""
        upper = [row[name] - cap for name, cap in (("benign", self.benign), ("other", self.other)) if cap is not None]
        lower = [self.utility - row["utility"]] if self.utility is not None else []
        return max(upper + lower, default=0.0)


def choose_scale(curve: Sequence[Mapping[str, float]], caps: Caps | Mapping[str, float]) -> float:
    """The scale with the highest target refusal among those that meet the caps; of equals, the nearest to 1, at which the training looked.

    Args:
        curve: rows ``k, target, benign, other, utility`` measured on validation.

    Raises `CdeltaError` when no scale meets the caps, naming the nearest.
    """
    caps = caps if isinstance(caps, Caps) else Caps(**caps)
    allowed = [row for row in curve if caps.excess(row) <= 1e-9]
    if not allowed:
        nearest = min(curve, key=caps.excess)
        raise CdeltaError(f"no scale meets {caps}: the nearest, k = {nearest['k']}, exceeds one by {caps.excess(nearest):.3f}.")
    return max(allowed, key=lambda row: (row["target"], -abs(row["k"] - 1)))["k"]
