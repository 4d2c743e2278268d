"""Which edges, heads and neurons cause a metric: EAP, EAP-IG and exact patching on Hugging Face
models.

An edge's score estimates how the metric changes when that edge alone carries the corrupted run's
value: S(u→v) = mean_t Σ_n (out_u(corr) − out_u(clean))·g_v(t), with g_v(t) the metric's gradient
at reader v's own copy of the residual stream, before its norm, on the path x(t) = x_corr + a_t
(x_clean − x_corr) from block 0 on. All scores are means over pairs, in the metric's unit. (EAP:
Syed et al. 2310.10348; EAP-IG: Hanna et al. 2403.17806.)
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ClassVar

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from cdelta.attribution.batch import Batch, batches, fused_activations, input_device
from cdelta.attribution.cost import (
    STEPS_AT_ONCE,
    Cost,
    check_memory,
    fitting_micro_batch,
    memory_needed,
    passes,
)
from cdelta.attribution.differences import SourceDifferences, patch_all
from cdelta.attribution.gim import modified_gradients
from cdelta.attribution.gradients import GradientPass, Schedule
from cdelta.attribution.linear import Wiring
from cdelta.attribution.metrics import Metric, SequenceMetric
from cdelta.errors import CdeltaError, refuse_test
from cdelta.files import read_json
from cdelta.models.hooks import requires_grad
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs
from cdelta.state import StateFile

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


METHODS = ("eap", "eap-ig", "clean-corrupted", "gim", "exact")
RULES = {"midpoint": 0.5, "left": 0.0, "right": 1.0}
"""Where in its interval each of the T steps is evaluated: a_t = (t + offset) / T."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Attribution scores, means over pairs, in the metric's unit; signs as in the module's
    docstring.
    """

    edges: Float[Tensor, "source reader"]
    heads: Float[Tensor, "layer head"]
    """Effect of a head's output, all its edges together."""
    neurons: Float[Tensor, "layer d_mlp"]
    kv: Float[Tensor, "layer kv_group"]
    """All edges into a group's keys and values together."""
    spec: ModelSpec
    method: str
    steps: int
    rule: str
    n_pairs: int
    metric_clean: float
    metric_corrupted: float
    pairs_hash: str = ""
    """`PromptPairs.hash` of the pairs; circuits carry it on."""
    pair_heads: Float[Tensor, "pair layer head"] | None = None
    pair_neurons: Float[Tensor, "pair layer d_mlp"] | None = None
    select: ClassVar[Callable[..., Any]]
    """`cdelta.circuit.select`, bound when that is imported: attribution knows nothing of
    circuits."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the rows of `edges`."""
        return Wiring(self.spec).sources

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the columns of `edges`."""
        return Wiring(self.spec).readers

    @property
    def mlps(self) -> Float[Tensor, "layer"]:
        """Effect of a whole MLP's output."""
        wiring = Wiring(self.spec)
        return torch.stack(
            [self.edges[wiring.mlp(layer)].sum() for layer in range(self.spec.n_layers)]
        )

    @property
    def completeness_error(self) -> float:
        """|Σ_v S(input→v) − (m_corr − m_clean)| / |m_corr − m_clean|: 0 with enough steps."""
        difference = self.metric_corrupted - self.metric_clean
        return abs(self.edges[0].sum().item() - difference) / max(abs(difference), 1e-12)

    def save(self, folder: str | Path) -> None:
        """Write ``scores.safetensors`` and ``scores.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, facts = {}, {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                tensors[name] = value.contiguous()
            elif value is not None:
                facts[name] = value
        facts["spec"] = vars(facts.pop("spec"))
        save_file(tensors, folder / "scores.safetensors")
        (folder / "scores.json").write_text(json.dumps(facts, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> Scores:
        """Read what `save` wrote. Raises `CdeltaError` naming a folder without scores."""
        folder = Path(folder)
        if not (folder / "scores.json").exists():
            raise CdeltaError(f"{folder} holds no scores: run the attribution stage first.")
        facts = read_json(folder / "scores.json")
        spec = facts["spec"]
        spec["shapes"] = {name: tuple(shape) for name, shape in spec["shapes"].items()}
        facts["spec"] = ModelSpec(**spec)
        return cls(**facts | load_file(folder / "scores.safetensors"))


def attribute(
    model,
    pairs: PromptPairs,
    metric: Metric | SequenceMetric,
    method: str = "eap-ig",
    steps: int = 5,
    rule: str = "midpoint",
    micro_batch: int | str = 8,
    per_pair: bool = False,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Scores:
    """Edge, head, neuron and kv-group scores of `metric` on `pairs`; the model is left as it was.

    Args:
        model: a Hugging Face causal LM of a supported family, in eval mode; may be spread over
            devices by accelerate.
        metric: Float[row, vocab] logits at each row's last token -> Float[row]; or a
            `SequenceMetric`.
        method: "eap-ig"; "eap" (gradient at the clean run only); "gim" (the same with the backward
            pass of `attribution.gim`, against self-repair); "clean-corrupted" (mean of the
            gradients at both ends); or "exact" (patch one edge at a time: the slow oracle, one
            forward pass per edge and unit).
        steps, rule: of "eap-ig": number of gradient steps and where each is taken ("midpoint",
            "left", "right").
        micro_batch: pairs in memory at a time, all their steps (at most `cost.STEPS_AT_ONCE`) in
            one pass; "auto" takes as many as `cost.AUTO_SHARE` of the free memory holds. Memory
            grows with it, scores do not depend on it.
        per_pair: also keep every pair's head and neuron scores (for ranking by pairs, bootstrap).
        progress: show a bar with the time left.
        checkpoint: folder for the sums after every micro-batch; the same call on the same model
            with the same metric goes on from there after a kill, to the same bytes.

    Raises `CdeltaError` on unknown words, on a model in training mode, on test-split pairs, on a
    state in `checkpoint` that is damaged or another call's, and before a run that would not fit
    into memory; `UnsupportedArchitecture` on other models.
    """
    refuse_test(pairs, "attribution")
    schedule = gradient_schedule(method, steps, rule)
    if model.training:
        raise CdeltaError(
            "the model is in training mode, where dropout makes scores random: "
            "call model.eval() first."
        )
    spec, device = ModelSpec.from_model(model), input_device(model)
    rows = metric.extend(pairs) if isinstance(metric, SequenceMetric) else pairs
    todo = batches_that_fit(model, spec, rows, len(schedule), micro_batch, device)
    totals = Totals(model, spec, len(pairs), len(rows), per_pair, frozen_norms=method == "gim")
    told = (pairs.hash(), method, steps, rule, len(todo), per_pair)
    state = StateFile(Path(checkpoint) / "sums.safetensors", str(told)) if checkpoint else None
    begun = totals.resume(state) if state else 0
    options = {"total": len(todo), "initial": begun, "unit": "batch"}
    bar = tqdm(desc=method, disable=not progress, **options)
    backward = modified_gradients(model, spec) if method == "gim" else nullcontext()
    with requires_grad(model, on=False), fused_activations(model), backward, bar:
        for done, batch in enumerate(todo[begun:], begun + 1):
            totals.add(model, batch, metric, schedule)
            if state:
                state.write(totals.sums, {"done": done})
            bar.update()
    used_steps = steps if method == "eap-ig" else len(schedule)
    return totals.scores(method, used_steps, rule, pairs.hash())


def batches_that_fit(
    model, spec: ModelSpec, rows: PromptPairs, steps: int, micro_batch: int | str, device
) -> list[Batch]:
    """The run's batches. Raises `CdeltaError`, naming a micro-batch that fits, where they do
    not.
    """
    if micro_batch == "auto":
        size = fitting_micro_batch(model, spec, rows, steps, device)
    elif isinstance(micro_batch, int) and micro_batch > 0:
        size = micro_batch
    else:
        raise CdeltaError(f"micro_batch={micro_batch!r}: give a number of pairs or 'auto'.")
    todo = batches(rows, size, device)
    check_memory(memory_needed(model, spec, todo, steps), device, size)
    return todo


def estimate_cost(
    model,
    pairs: PromptPairs,
    metric,
    method: str = "eap-ig",
    steps: int = 5,
    micro_batch: int | str = 8,
) -> Cost:
    """Seconds and peak memory that `attribute` would take; runs one micro-batch to find out.

    Of "exact" only the memory is predicted (its seconds count the two runs for the differences
    alone). Raises `CdeltaError` as `attribute` does where it would not fit.
    """
    spec, schedule = ModelSpec.from_model(model), gradient_schedule(method, steps, "midpoint")
    rows = metric.extend(pairs) if isinstance(metric, SequenceMetric) else pairs
    steps, device = len(schedule), input_device(model)
    todo = batches_that_fit(model, spec, rows, steps, micro_batch, device)
    largest = max(todo, key=lambda batch: batch.mask.numel())
    tokens = sum(batch.mask.numel() for batch in todo)
    totals = Totals(model, spec, len(rows), len(rows), per_pair=False)
    tried = schedule[:STEPS_AT_ONCE] or [(0.5, 1.0)]
    seconds = batch_seconds(model, totals, largest, metric, tried)
    seconds *= passes(spec, steps) / passes(spec, len(tried))
    return Cost(seconds * tokens / largest.mask.numel(), memory_needed(model, spec, todo, steps))


def batch_seconds(model, totals: Totals, batch: Batch, metric, schedule: Schedule) -> float:
    """Seconds of a micro-batch, after one to warm up."""
    with requires_grad(model, on=False), fused_activations(model):
        for _ in range(2):
            start = time.perf_counter()
            totals.add(model, batch, metric, schedule)
            totals.edges.sum().item()  # waits for a GPU
            seconds = time.perf_counter() - start
    return seconds


def gradient_schedule(method: str, steps: int, rule: str) -> Schedule:
    """(a_t, weight) of every gradient step; empty for "exact". Raises `CdeltaError` on unknown
    words.
    """
    if method not in METHODS:
        raise CdeltaError(
            f"unknown attribution method {method!r}: use one of {', '.join(METHODS)}."
        )
    if rule not in RULES:
        raise CdeltaError(f"unknown rule {rule!r}: use one of {', '.join(RULES)}.")
    if steps < 1:
        raise CdeltaError(f"steps={steps}: eap-ig needs at least one step.")
    if method == "eap-ig":
        return [((t + RULES[rule]) / steps, 1.0 / steps) for t in range(steps)]
    ends = [(1.0, 0.5), (0.0, 0.5)]
    clean = [(1.0, 1.0)]
    return {"eap": clean, "gim": clean, "clean-corrupted": ends, "exact": []}[method]


class Totals:
    """Running sums over micro-batches, on the model's first device; `scores` makes them means."""

    def __init__(
        self,
        model,
        spec: ModelSpec,
        n_pairs: int,
        n_rows: int,
        per_pair: bool,
        frozen_norms: bool = False,
    ):
        wiring, device = Wiring(spec), input_device(model)
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.zeros = partial(torch.zeros, dtype=dtype, device=device)
        self.spec, self.n_pairs, self.per_pair = spec, n_pairs, per_pair
        self.rows_per_pair = n_rows // n_pairs
        self.edges = self.zeros(len(wiring.sources), len(wiring.readers))
        self.heads = self.zeros(n_pairs, spec.n_layers, spec.n_heads)
        self.neurons = self.zeros(n_pairs if per_pair else 1, spec.n_layers, spec.d_mlp)
        self.metrics = self.zeros(2)
        self.gradients = GradientPass(model, spec, frozen_norms)

    def add(self, model, batch: Batch, metric, schedule: Schedule) -> None:
        """One micro-batch: both runs for the differences, then gradients or exact patching."""
        batch = batch.without_prefix(model, getattr(metric, "kept", 1))
        differences = SourceDifferences(model, self.spec, batch, metric)
        for side, values in enumerate((differences.metric_clean, differences.metric_corrupted)):
            self.metrics[side] += values.sum().to(self.metrics.device)
        rows = len(batch.rows)
        heads = self.zeros(rows, *self.heads.shape[1:])
        neurons = self.zeros(rows if self.per_pair else 1, *self.neurons.shape[1:])
        sums = (self.edges, heads, neurons)
        if not schedule:
            patch_all(model, differences, batch, metric, *sums)
        for first in range(0, len(schedule), STEPS_AT_ONCE):
            steps = schedule[first : first + STEPS_AT_ONCE]
            self.gradients.run(differences, batch, metric, steps, *sums)
        owners = torch.tensor(batch.rows, device=heads.device) // self.rows_per_pair
        self.heads.index_add_(0, owners, heads)
        self.neurons.index_add_(0, owners if self.per_pair else owners[:1] * 0, neurons)

    @property
    def sums(self) -> dict[str, Tensor]:
        """What every batch adds to."""
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}

    def resume(self, state: StateFile) -> int:
        """Take over the sums of a run that was killed; the number of its batches."""
        found = state.read()
        if found is None:
            return 0
        for name, value in self.sums.items():
            value.copy_(found[0][name])
        return found[1]["done"]

    def scores(self, method: str, steps: int, rule: str, pairs_hash: str) -> Scores:
        """Means over pairs, on the CPU."""
        edges = self.edges.cpu() * Wiring(self.spec).edges() / self.n_pairs
        heads, neurons = self.heads.cpu(), self.neurons.cpu()
        clean, corrupted = (self.metrics / self.n_pairs).tolist()
        return Scores(
            edges=edges,
            heads=heads.mean(0),
            neurons=neurons.sum(0) / self.n_pairs,
            kv=kv_scores(self.spec, edges),
            spec=self.spec,
            method=method,
            steps=steps,
            rule=rule,
            n_pairs=self.n_pairs,
            metric_clean=clean,
            metric_corrupted=corrupted,
            pairs_hash=pairs_hash,
            pair_heads=heads if self.per_pair else None,
            pair_neurons=neurons if self.per_pair else None,
        )


def kv_scores(
    spec: ModelSpec, edges: Float[Tensor, "source reader"]
) -> Float[Tensor, "layer kv_group"]:
    """Sum of all edges into each group's keys and values."""
    into, wiring = edges.sum(0), Wiring(spec)
    attention = [into[wiring.attention_readers(layer)] for layer in range(spec.n_layers)]
    return torch.stack(attention)[:, spec.n_heads :].unflatten(-1, (2, spec.n_kv)).sum(1)
