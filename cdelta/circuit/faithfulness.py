"""Does a circuit by itself do what the model does? Everything outside carries another run's values.

f(C) = (m(C) − m_corr) / (m_clean − m_corr), with m(C) the metric when the circuit sees the clean
prompt and all else writes what it wrote for the corrupted one (MIB: Mueller et al. 2504.13151).
1: the circuit is all that the metric needs; 0: it carries nothing of it. The metric looks at a
few tokens. Beside it stands KL(model ‖ circuit) of the whole next-token distribution at the last
prompt token.

A circuit of *units* (heads, neurons) keeps what these write, and every later part reads it. A
circuit of *edges* decides per source and reader: each reader gets its own residual stream, Σ over
its edges in the circuit of what the sources now write + Σ over all others of the reference. The
embedding is no
unit: it is always clean; as a source of edges it is treated like the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

import torch

from cdelta.attribution.batch import Batch, batches, input_device, run, seen_by
from cdelta.attribution.linear import wide
from cdelta.attribution.metrics import Metric, SequenceMetric, WithKL, after_prompt
from cdelta.attribution.wiring import Wiring
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.edge_runs import EdgeRuns
from cdelta.circuit.edges import select_edges
from cdelta.circuit.mask import slices_size, unit_name
from cdelta.circuit.selection import select_units
from cdelta.circuit.unit_runs import UnitRuns, Written
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's circuit sizes: shares of all edges, or of the parameters of all units."""
OUTSIDE = ("corrupted", "zero", "mean")
"""What everything outside of a circuit writes: its value for the corrupted prompt, nothing, or its
mean over all corrupted prompts' tokens."""
ROWS = 64
"""Rows in one forward pass."""
SIDE_BY_SIDE = 8
"""Up to so many circuits share a pass, so that its rows can be pairs of similar length."""


@dataclass(frozen=True, eq=False)
class Runs:
    """The metric of every pair in the clean run, the corrupted run and one run per circuit.

    `kl_circuits` and `kl_corrupted` are KL(clean run ‖ this run) of the next token after the
    prompt, in nats.
    """

    clean: Float[Tensor, "pair"]
    corrupted: Float[Tensor, "pair"]
    circuits: Float[Tensor, "circuit pair"]
    kl_corrupted: Float[Tensor, "pair"]
    kl_circuits: Float[Tensor, "circuit pair"]

    @property
    def restored(self) -> Float[Tensor, "circuit pair"]:
        """m(C) − m_corr: the numerators of f."""
        return self.circuits - self.corrupted

    @property
    def effect(self) -> Float[Tensor, "pair"]:
        """m_clean − m_corr: the denominators of f."""
        return self.clean - self.corrupted

    @property
    def faithfulness(self) -> Float[Tensor, "circuit"]:
        """Of every circuit, f as the ratio of the means over pairs (a pair's effect may be near
        zero).
        """
        return self.restored.mean(-1) / self.effect.mean()

    @property
    def faithfulness_kl(self) -> Float[Tensor, "circuit"]:
        """1 − KL(clean ‖ C) / KL(clean ‖ corrupted) of every circuit, the ratio of means over
        pairs.

        1: the circuit predicts the next token as the model does; 0: it is as far from that as the
        corrupted run; below 0: farther. Nats alone have no scale: how far the corrupted run is
        differs between categories and between models.
        """
        return 1 - self.kl_circuits.mean(-1) / self.kl_corrupted.mean()


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness against size. Areas are MIB's: trapezoids on the linear axis, first to last."""

    fractions: tuple[float, ...]
    runs: Runs

    @property
    def pair_areas(self) -> Float[Tensor, "pair"]:
        """∫ (m(C) − m_corr) of every pair; their sum over that of `runs.effect` is the CPR."""
        return self._area(self.runs.restored.T)

    @property
    def cpr(self) -> float:
        """∫ f: how much of the metric circuits of all sizes restore; higher is better."""
        return self._area(self.runs.faithfulness).item()

    @property
    def cmd(self) -> float:
        """∫ |1 − f|: how far from the model's own behaviour circuits are; lower is better."""
        return self._area((1 - self.runs.faithfulness).abs()).item()

    def _area(self, values: Tensor) -> Tensor:
        return torch.trapezoid(values, torch.tensor(self.fractions, dtype=values.dtype))


# ---------------------------------------------------------------------- runs


def evaluate(
    model,
    pairs: PromptPairs,
    metric: Metric | SequenceMetric,
    circuits: Sequence[Circuit],
    outside: str = "corrupted",
    ablate: bool = False,
    rows: int = ROWS,
) -> Runs:
    """Run every circuit by itself on `pairs`: all by edges, or none of them.

    Args:
        outside: what the rest writes, see `OUTSIDE`. Only with "corrupted" does an empty circuit
            have f = 0.
        ablate: the other way round: the *circuit* is replaced, the rest runs as it is.
        rows: rows in a forward pass; memory grows with it, results do not depend on it.

    Nothing is fitted here, so pairs of any split may be evaluated. The model is left as it was,
    also on errors.
    """
    if outside not in OUTSIDE:
        raise CdeltaError(f"unknown ablation {outside!r}: use one of {', '.join(OUTSIDE)}.")
    if len({bool(c.edges) for c in circuits if c.nodes}) > 1:
        raise CdeltaError(
            "some of these circuits have edges and some have none: evaluate the two kinds apart."
        )
    extended = metric.extend(pairs) if isinstance(metric, SequenceMetric) else pairs
    rows_per_pair = len(extended) // len(pairs)
    together = max(1, min(SIDE_BY_SIDE, len(circuits)))
    todo = batches(extended, max(1, rows // together), input_device(model))
    kind = EdgeRuns if any(c.edges for c in circuits) else UnitRuns
    runner = kind(model, circuits, ablate, rows)
    total = torch.zeros(len(circuits) + 2, len(pairs), 2, dtype=torch.float64)
    with torch.no_grad():
        reference = references(runner.written, todo, outside)
        for batch in todo:
            values = batch_values(model, runner, batch, reference(batch), metric)
            owners = torch.tensor(batch.rows) // rows_per_pair
            total.index_add_(1, owners, values.double().cpu())
    value = total[..., 0]
    kl = total[..., 1] / rows_per_pair  # a pair's rows share the prompt, and so the KL
    return Runs(value[0], value[1], value[2:], kl[1], kl[2:])


def batch_values(
    model, runner: UnitRuns | EdgeRuns, batch: Batch, reference: Written, metric
) -> Float[Tensor, "run row 2"]:
    """Metric and KL from the clean run: of the clean run, the corrupted run and every circuit."""
    clean = seen_by(metric, model, batch.clean, batch)
    both = WithKL(metric, after_prompt(clean[0]))
    corrupted = run(model, batch.corrupted, batch, both)
    return torch.stack([both(*clean), corrupted, *runner.values(batch, reference, both)])


def references(
    written: Callable[[Tensor, Batch], Written], todo: Sequence[Batch], outside: str
) -> Callable[[Batch], Written]:
    """What everything outside of a circuit writes on a batch.

    Zero and mean are the same for every row and position.
    """
    if outside == "corrupted":
        return lambda batch: written(batch.corrupted, batch)
    total: dict = {}
    for batch in todo:
        for key, value in written(batch.corrupted, batch).items():
            real = batch.mask.to(value.device).view(*batch.mask.shape, *(1,) * (value.dim() - 2))
            total[key] = total.get(key, 0) + (wide(value) * real).sum((0, 1), keepdim=True)
    scale = 0.0 if outside == "zero" else 1 / sum(batch.mask.sum().item() for batch in todo)
    fixed = {key: value * scale for key, value in total.items()}
    return lambda batch: fixed


# ---------------------------------------------------------------------- circuits of all sizes


def all_units(spec: ModelSpec) -> Circuit:
    """Every head and every neuron."""
    units = [
        (kind, layer, i)
        for layer in range(spec.n_layers)
        for kind, n in (("a", spec.n_heads), ("m", spec.d_mlp))
        for i in range(n)
    ]
    return Circuit(tuple(map(unit_name, units)))


def unit_circuits(
    spec: ModelSpec,
    heads: Float[Tensor, "layer head"],
    neurons: Float[Tensor, "layer neuron"],
    fractions: Sequence[float] = FRACTIONS,
) -> list[Circuit]:
    """Circuits of units by falling |score| per parameter, one per fraction of all units' size."""
    share = unit_parameters(spec) / spec.n_params
    return [
        all_units(spec) if f == 1 else select_units(spec, heads, neurons, f * share)
        for f in fractions
    ]


def edge_circuits(scores, spec: ModelSpec, fractions: Sequence[float] = FRACTIONS) -> list[Circuit]:
    """Circuits of edges by falling |score|, one per fraction of all edges; with 1, every edge."""
    wiring = Wiring(spec)
    exists = wiring.edges().nonzero().tolist()
    every = tuple((wiring.sources[u], wiring.readers[v]) for u, v in exists)
    return [
        Circuit((*wiring.sources, "logits"), every)
        if f == 1
        else select_edges(scores, max(1, int(f * len(every))))
        for f in fractions
    ]


def unit_parameters(spec: ModelSpec) -> int:
    """Parameters of all units together."""
    groups = spec.n_kv * slices_size(spec, spec.kv_slices(0, 0))
    heads = spec.n_heads * slices_size(spec, spec.head_slices(0, 0))
    neurons = spec.d_mlp * slices_size(spec, spec.neuron_slices(0, 0))
    return spec.n_layers * (groups + heads + neurons)


def curves(
    model,
    pairs: PromptPairs,
    metric,
    circuits: Mapping[str, Sequence[Circuit]],
    fractions: Sequence[float] = FRACTIONS,
    **options,
) -> dict[str, Curve]:
    """Faithfulness against size for every named series of circuits, one per fraction.

    `options` go to `evaluate`. A circuit at fraction 1 is the whole model, whose run is the clean
    one.
    """
    part = [i for i, fraction in enumerate(fractions) if fraction != 1]
    chosen = [series[i] for series in circuits.values() for i in part]
    runs = evaluate(model, pairs, metric, chosen, **options)
    per_series = (len(circuits), len(part))
    values = runs.circuits.unflatten(0, per_series)
    divergences = runs.kl_circuits.unflatten(0, per_series)
    result = {}
    for name, value, divergence in zip(circuits, values, divergences):
        every = runs.clean.repeat(len(fractions), 1)
        kl = torch.zeros_like(every)
        every[part], kl[part] = value, divergence
        full = Runs(runs.clean, runs.corrupted, every, runs.kl_corrupted, kl)
        result[name] = Curve(tuple(fractions), full)
    return result
