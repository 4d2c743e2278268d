"""Does a circuit by itself do what the model does? Everything outside carries another run's values.

f(C) = (m(C) − m_corr) / (m_clean − m_corr), with m(C) the metric when the circuit sees the clean
prompt and all else writes what it wrote for the corrupted one (MIB: Mueller et al. 2504.13151).
1: the circuit is all that the metric needs; 0: it carries nothing of it. The metric looks at a
few tokens. Beside it stands KL(model ‖ circuit) of the whole next-token distribution at the last
prompt token.

A circuit of *units* (heads, neurons) keeps what these write, and every later part reads it. A
circuit of *edges* decides per source and reader: each reader gets its own residual stream, Σ over
its edges in the circuit of what the sources now write + Σ over all others of what they write for
the corrupted prompt. The embedding is no unit: it is always clean; as a source of edges it is
treated like the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

import torch
from torch import Tensor

from cdelta.attribution.batch import batches, input_device, run, seen_by
from cdelta.attribution.differences import SourceDifferences, patched_changes, read_shifted
from cdelta.attribution.linear import Wiring, writers
from cdelta.attribution.metrics import Metric, SequenceMetric, WithKL, after_prompt
from cdelta.circuit.circuit import Circuit, all_units, unit_name, unit_sizes
from cdelta.circuit.runs import UnitRuns, edge_places, edge_values, kept_channels, kept_edges
from cdelta.circuit.selection import select_edges, select_units
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Float

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's circuit sizes: shares of all edges, or of the parameters of all units."""
OUTSIDE = ("corrupted", "zero", "mean")
"""What everything outside of a circuit of units writes: its value for the corrupted prompt, nothing
at all, or its mean over all corrupted prompts' tokens."""
ROWS = 64
"""Rows in one forward pass."""
SIDE_BY_SIDE = 8
"""Up to so many circuits share a pass, so that its rows can be pairs of similar length."""
Effects = dict[str, "Float[Tensor, 'pair']"]
"""Name of a part -> by how much the metric falls without it, in the metric's unit."""


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
        outside: what the rest writes, see `OUTSIDE`; of circuits of edges always "corrupted". Only
            with that does an empty circuit have f = 0.
        ablate: the other way round: the *circuit* is replaced, the rest runs as it is.
        rows: rows in a forward pass; memory grows with it, results do not depend on it.

    Nothing is fitted here, so pairs of any split may be evaluated. The model is left as it was,
    also on errors.
    """
    if outside not in OUTSIDE:
        raise CdeltaError(f"unknown ablation {outside!r}: use one of {', '.join(OUTSIDE)}.")
    by_edge = {bool(c.edges) for c in circuits if c.nodes}
    if len(by_edge) > 1:
        raise CdeltaError(
            "some of these circuits have edges and some have none: evaluate the two kinds apart."
        )
    spec = ModelSpec.from_model(model)
    extended = metric.extend(pairs) if isinstance(metric, SequenceMetric) else pairs
    rows_per_pair = len(extended) // len(pairs)
    together = max(1, min(SIDE_BY_SIDE, len(circuits)))
    todo = batches(extended, max(1, rows // together), input_device(model))
    total = torch.zeros(len(circuits) + 2, len(pairs), 2, dtype=torch.float64)
    with torch.no_grad():
        if True in by_edge:
            edges = [kept_edges(spec, circuit) ^ ablate for circuit in circuits]
            values_of: Callable = partial(edge_values, model, spec, edges)
        else:
            kept = kept_channels(spec, circuits)
            keep = {kind: channels ^ ablate for kind, channels in kept.items()}
            values_of = UnitRuns(model, keep, outside, todo, rows)
        for batch in todo:
            clean = seen_by(metric, model, batch.clean, batch)
            both = WithKL(metric, after_prompt(clean[0]))
            corrupted = run(model, batch.corrupted, batch, both)
            values = torch.stack([both(*clean), corrupted, *values_of(batch, both)])
            owners = torch.tensor(batch.rows) // rows_per_pair
            total.index_add_(1, owners, values.double().cpu())
    value = total[..., 0]
    kl = total[..., 1] / rows_per_pair  # a pair's rows share the prompt, and so the KL
    return Runs(value[0], value[1], value[2:], kl[1], kl[2:])


# ---------------------------------------------------------------------- circuits of all sizes


def whole_circuit(spec: ModelSpec) -> Circuit:
    """Every head and every neuron."""
    return Circuit(tuple(map(unit_name, all_units(spec))))


def unit_circuits(
    spec: ModelSpec,
    heads: Float[Tensor, "layer head"],
    neurons: Float[Tensor, "layer neuron"],
    fractions: Sequence[float] = FRACTIONS,
) -> list[Circuit]:
    """Circuits of units by falling |score| per parameter, one per fraction of all units' size."""
    share = unit_parameters(spec) / spec.n_params
    return [
        whole_circuit(spec) if f == 1 else select_units(spec, heads, neurons, f * share)
        for f in fractions
    ]


def edge_circuits(scores, spec: ModelSpec, fractions: Sequence[float]) -> list[Circuit]:
    """Circuits of edges by falling |score|, one per fraction of all edges; with 1, every edge."""
    every = tuple(edge_places(spec))
    return [
        Circuit((*Wiring(spec).sources, "logits"), every)
        if f == 1
        else select_edges(scores, max(1, int(f * len(every))))
        for f in fractions
    ]


def unit_parameters(spec: ModelSpec) -> int:
    """Parameters of all units together."""
    head, group, neuron = unit_sizes(spec)
    return spec.n_layers * (spec.n_heads * head + spec.n_kv * group + spec.d_mlp * neuron)


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
    result = {}
    for name, own in zip(circuits, torch.arange(len(chosen)).split(len(part))):
        every = runs.clean.repeat(len(fractions), 1)
        kl = torch.zeros_like(every)
        every[part], kl[part] = runs.circuits[own], runs.kl_circuits[own]
        result[name] = Curve(tuple(fractions), replace(runs, circuits=every, kl_circuits=kl))
    return result


# ---------------------------------------------------------------------- what the parts do


def parts(circuit: Circuit) -> dict[str, Circuit]:
    """A circuit of units in pieces: every head, and the neurons of every layer together."""
    pieces: dict[str, list[str]] = {}
    for node in circuit.nodes:
        pieces.setdefault(node if node.startswith("a") else node.split(".")[0], []).append(node)
    return {name: Circuit(tuple(nodes)) for name, nodes in pieces.items()}


def leave_one_out(
    model, pairs: PromptPairs, metric, circuit: Circuit, removed: Mapping[str, Circuit], **options
) -> Effects:
    """Minimality: by how much the metric of the circuit's own run falls without each of
    `removed`.
    """
    tried = [circuit, *(circuit - part for part in removed.values())]
    runs = evaluate(model, pairs, metric, tried, **options)
    return dict(zip(removed, runs.circuits[0] - runs.circuits[1:]))


def total_effects(
    model, pairs: PromptPairs, metric, components: Mapping[str, Circuit], **options
) -> Effects:
    """Ablation: by how much the model's metric falls when a component alone is replaced."""
    if not components:
        return {}
    runs = evaluate(model, pairs, metric, list(components.values()), ablate=True, **options)
    return dict(zip(components, runs.clean - runs.circuits))


def direct_effects(
    model, pairs: PromptPairs, metric: Metric, components: Mapping[str, Circuit], rows: int = ROWS
) -> Effects:
    """Direct logit attribution: only the unembedding reads a component's corrupted output.

    The final norm sees the change. What later layers make of the component is left out, so that
    this minus `total_effects` is what they add.
    """
    if not components:
        return {}
    spec = ModelSpec.from_model(model)
    keep = kept_channels(spec, list(components.values()))
    hooks = partial(read_shifted, spec.final_norm(model))
    changes = torch.zeros(len(components), len(pairs), dtype=torch.float64)
    for batch in batches(pairs, rows, input_device(model)):
        differences = SourceDifferences(model, spec, batch, metric)
        clean, shift = differences.metric_clean, written_by(differences, keep)
        change = patched_changes(model, batch, metric, clean, shift, hooks)
        changes[:, list(batch.rows)] = change.double().cpu()
    return dict(zip(components, -changes))


def written_by(
    differences: SourceDifferences, keep: Mapping[str, Tensor]
) -> Float[Tensor, "component n d"]:
    """What each of some components (`kept_channels`) writes, corrupted minus clean."""
    shift = torch.zeros_like(differences.dense[:1]).repeat(len(keep["mlp"]), 1, 1)
    for layer, block in enumerate(differences.blocks):
        for kind, writer in writers(differences.spec, block).items():
            chosen = keep[kind][:, layer].to(shift)
            used = chosen.any(-1)
            channels = chosen[used][:, None] * differences.inputs[kind, layer]
            shift[used] += channels @ writer.weight(shift.dtype)
    return shift
