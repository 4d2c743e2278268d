"""Does a circuit by itself do what the model does? Runs in which everything outside of it carries another run's values.

f(C) = (m(C) − m_corr) / (m_clean − m_corr), with m(C) the metric when the circuit sees the clean prompt and all else writes what it wrote
for the corrupted one (MIB: Mueller et al. 2504.13151). 1: the circuit is all that the metric needs; 0: it carries nothing of it.
The metric looks at a few tokens. Beside it stands KL(model ‖ circuit) of the whole next-token distribution at the last prompt token.

A circuit of *units* (heads, neurons) keeps what these write, and every later part reads it. A circuit of *edges* decides per source and
reader: each reader gets its own residual stream, Σ over its edges in the circuit of what the sources now write + Σ over all others of
the reference. The embedding is no unit: it is always clean; as a source of edges it is treated like the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

import torch

from cdelta.attribution.metrics import Metric, SequenceMetric, WithKL, after_prompt
from cdelta.attribution.passes import (
    Batch,
    batches,
    compute_dtype,
    in_out,
    input_device,
    norm_scale,
    per_unit,
    run,
    seen_by,
    wide,
    writers,
)
from cdelta.attribution.wiring import Wiring
from cdelta.circuit.circuit import Circuit, node_units
from cdelta.circuit.mask import slices_size, unit_name
from cdelta.circuit.selection import select
from cdelta.errors import CdeltaError
from cdelta.models.hooks import after, before, hooked, loaded  # fmt: skip
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's circuit sizes: shares of all edges, or of the parameters of all units."""
OUTSIDE = ("corrupted", "zero", "mean")
"""What everything outside of a circuit writes: its value for the corrupted prompt, nothing, or its mean over all corrupted prompts' tokens."""
ROWS, SIDE_BY_SIDE = 64, 8
"""Rows in one forward pass; they hold up to so many circuits side by side, each on pairs of similar length."""

Written = Mapping["tuple[str, int]", "Tensor"]
"""("attn" or "mlp", layer) -> input of the projection that writes, Float[row, pos, in]."""


# ---------------------------------------------------------------------- results


@dataclass(frozen=True, eq=False)
class Runs:
    """The metric of every pair, in its unit, in the clean run, the corrupted run and one run per circuit, and how far these are from the clean run.

    `kl_circuits` and `kl_corrupted` are KL(clean run ‖ this run) of the next token after the prompt, in nats.
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
        """f of every circuit, as the ratio of the means over pairs (single pairs' effects may be near zero)."""
        return self.restored.mean(-1) / self.effect.mean()

    @property
    def faithfulness_kl(self) -> Float[Tensor, "circuit"]:
        """1 − KL(clean ‖ C) / KL(clean ‖ corrupted) of every circuit, as the ratio of the means over pairs.

        1: the circuit predicts the next token as the model does; 0: it is as far from that as the corrupted run; below 0: farther.
        Nats alone have no scale: how far the corrupted run is differs between categories and between models.
        """
        return 1 - self.kl_circuits.mean(-1) / self.kl_corrupted.mean()


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness against size. Areas are MIB's: trapezoids on the linear axis from the first fraction to the last."""

    fractions: tuple[float, ...]
    runs: Runs

    @property
    def pair_areas(self) -> Float[Tensor, "pair"]:
        """∫ (m(C) − m_corr) of every pair; their sum over that of `runs.effect` is the CPR."""
        return self._area(self.runs.restored.T)

    @property
    def cpr(self) -> float:
        """∫ f: how much of the metric circuits of all sizes restore; higher is better, and it may exceed 1 as f may."""
        return self._area(self.runs.faithfulness).item()

    @property
    def cmd(self) -> float:
        """∫ |1 − f|: how far from the model's own behaviour circuits of all sizes are; lower is better."""
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
        outside: what the rest writes, see `OUTSIDE`. Only with "corrupted" does an empty circuit have f = 0.
        ablate: the other way round: the *circuit* is replaced, the rest runs as it is (completeness).
        rows: rows in a forward pass; memory grows with it, results do not depend on it.

    Nothing is fitted here, so pairs of any split may be evaluated. The model is left as it was, also on errors.
    """
    if outside not in OUTSIDE:
        raise CdeltaError(f"unknown ablation {outside!r}: use one of {', '.join(OUTSIDE)}.")
    if len({bool(c.edges) for c in circuits if c.nodes}) > 1:
        raise CdeltaError(
            "some of these circuits have edges and some have none: evaluate the two kinds apart."
        )
    extended = metric.extend(pairs) if isinstance(metric, SequenceMetric) else pairs
    todo = batches(
        extended, max(1, rows // max(1, min(SIDE_BY_SIDE, len(circuits)))), input_device(model)
    )
    kind = EdgeRuns if any(c.edges for c in circuits) else UnitRuns
    runner = kind(model, circuits, ablate, rows)
    total = torch.zeros(len(circuits) + 2, len(pairs), 2, dtype=torch.float64)
    with torch.no_grad():
        reference = references(runner.written, todo, outside)
        for batch in todo:
            clean = seen_by(metric, model, batch.clean, batch)
            both = WithKL(metric, after_prompt(clean[0]))
            values = torch.stack(
                [
                    both(*clean),
                    run(model, batch.corrupted, batch, both),
                    *runner.values(batch, reference(batch), both),
                ]
            )
            total.index_add_(
                1, torch.tensor(batch.rows) * len(pairs) // len(extended), values.double().cpu()
            )
    value, kl = (
        total[..., 0],
        total[..., 1] * len(pairs) / len(extended),
    )  # a pair's rows share the prompt, and so the KL
    return Runs(value[0], value[1], value[2:], kl[1], kl[2:])


def unmeasured(logits: Float[Tensor, "row vocab"]) -> None:
    """The metric of runs that are made for what they write."""


def references(
    written: Callable[[Tensor, Batch], Written], todo: Sequence[Batch], outside: str
) -> Callable[[Batch], Written]:
    """What everything outside of a circuit writes on a batch; zero and mean are the same for every row and position."""
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


class UnitRuns:
    """Runs of circuits of heads and neurons, many in one forward pass, each in rows of its own.

    Hooks at the input of every writing projection keep the circuit's channels and replace all others. A post-norm behind the projection
    (Gemma) normalises the mixture.
    """

    def __init__(self, model, circuits: Sequence[Circuit], ablate: bool, rows: int):
        self.model, self.spec, self.rows = model, ModelSpec.from_model(model), rows
        self.keep = {key: keep ^ ablate for key, keep in kept_channels(self.spec, circuits).items()}
        self.n = len(circuits)
        self.projections = {}
        for layer, block in enumerate(self.spec.blocks(model)):
            self.projections |= {("attn", layer): block.o, ("mlp", layer): block.down}

    def written(self, ids: Int[Tensor, "row pos"], batch: Batch) -> Written:
        """Input of every writing projection."""
        kept: dict = {}
        with hooked(
            *(
                before(module, partial(kept.__setitem__, key))
                for key, module in self.projections.items()
            )
        ):
            run(self.model, ids, batch, unmeasured)
        return kept

    def values(self, batch: Batch, reference: Written, metric) -> Float[Tensor, "circuit row *"]:
        """The metric of every circuit and row."""
        at_once = max(1, self.rows // len(batch.rows))
        return torch.cat(
            [
                self._run(batch, slice(i, min(i + at_once, self.n)), reference, metric)
                for i in range(0, self.n, at_once)
            ]
        )

    def _run(
        self, batch: Batch, chosen: slice, reference: Written, metric
    ) -> Float[Tensor, "circuit row *"]:
        times = chosen.stop - chosen.start
        repeated = batch.repeat(times)

        def replace(key, x):
            keep = self.keep[key][chosen, None, None].to(x.device)
            return torch.where(
                keep, x.unflatten(0, (times, -1)), reference[key].to(x.device, x.dtype)
            ).flatten(0, 1)

        with hooked(
            *(before(module, partial(replace, key)) for key, module in self.projections.items())
        ):
            return run(self.model, repeated.clean, repeated, metric).unflatten(0, (times, -1))


class EdgeRuns:
    """Runs of circuits of edges: one forward pass per circuit, in which every reader reads a sum of its own."""

    def __init__(self, model, circuits: Sequence[Circuit], ablate: bool, rows: int):
        self.model, self.spec = model, ModelSpec.from_model(model)
        self.keep = [kept_edges(self.spec, circuit) ^ ablate for circuit in circuits]

    def written(self, ids: Int[Tensor, "row pos"], batch: Batch) -> Written:
        """What every source writes: a run with all edges and nothing to refer to."""
        everything = torch.ones_like(Wiring(self.spec).edges())
        nothing = torch.zeros(
            1,
            1,
            len(everything),
            self.spec.d_model,
            dtype=compute_dtype(self.model),
            device=ids.device,
        )
        edge_pass = EdgePass(self.model, self.spec, everything, nothing.movedim(2, 0))
        edge_pass.run(ids, batch, unmeasured)
        return {("source", 0): edge_pass.now.movedim(0, 2)}

    def values(self, batch: Batch, reference: Written, metric) -> Float[Tensor, "circuit row *"]:
        """The metric of every circuit and row."""
        sources = reference["source", 0].movedim(2, 0)
        return torch.stack(
            [
                EdgePass(self.model, self.spec, keep, sources).run(batch.clean, batch, metric)
                for keep in self.keep
            ]
        )


class EdgePass:
    """One forward pass in which reader v reads  base_v + Σ_u keep[u, v] (now_u − reference_u).

    `now` holds what each source that has run wrote minus its reference; base_v is the sum of all references before v and of the output
    biases that belong to no source. Nothing reads the model's own residual stream. Post-norms: each run's own scale, as in attribution.
    """

    def __init__(
        self,
        model,
        spec: ModelSpec,
        keep: Bool[Tensor, "source reader"],
        reference: Float[Tensor, "source row pos d"],
    ):
        self.model, self.spec, self.wiring, self.blocks = (
            model,
            spec,
            Wiring(spec),
            spec.blocks(model),
        )
        self.reference, self.dtype = reference, reference.dtype
        self.keep = keep.to(reference.device, reference.dtype)
        self.now: Tensor | None = None
        self.done = 0
        self.base: Tensor | float = 0.0
        self.seen: dict[str, Tensor] = {}

    def run(self, ids: Int[Tensor, "row pos"], batch: Batch, metric) -> Float[Tensor, "row"]:
        """The metric per row."""
        logits = lambda x: self._read(self.wiring.logits())[0].to(x.device, x.dtype)
        hooks = [
            before(self.blocks[0].module, self._input),
            before(self.spec.final_norm(self.model), logits),
        ]
        for layer in range(len(self.blocks)):
            hooks += self._layer_hooks(layer)
        with hooked(*hooks):
            return run(self.model, ids, batch, metric)

    def _layer_hooks(self, layer: int) -> list:
        block = self.blocks[layer]
        attn, mlp = writers(self.spec, block)
        keep = lambda name, x: self.seen.__setitem__(name, x)
        post = [] if attn.post is None else [before(attn.post, partial(keep, "post"))]
        read_mlp = lambda x: self._read(self.wiring.mlp_reader(layer))[0].to(x.device, x.dtype)
        return [
            *(after(module, partial(self._project, layer, i)) for i, module in enumerate(block.qkv)),
            before(attn.projection, partial(keep, "z")), *post, after(attn.out, lambda _: self._heads(attn)),
            before(block.mlp_norm, read_mlp), after(mlp.out, lambda x: self._write(x[None])),
        ]  # fmt: skip

    def _read(self, readers: slice) -> Float[Tensor, "reader row pos d"]:
        """The residual stream of these readers."""
        now = self.now[: self.done]
        return self.base + (self.keep[: self.done, readers].T @ now.flatten(1)).unflatten(
            1, now.shape[1:]
        )

    def _write(
        self, outputs: Float[Tensor, "source row pos d"], bias: Tensor | float = 0.0
    ) -> None:
        """The next sources have run."""
        outputs = outputs.to(self.reference.device, self.dtype)
        if self.now is None:
            self.now = outputs.new_empty(len(self.reference), *outputs.shape[1:])
        new = slice(self.done, self.done + len(outputs))
        self.base = self.base + self.reference[new].sum(0) + bias
        torch.sub(outputs, self.reference[new], out=self.now[new])
        self.done = new.stop

    def _input(self, x: Float[Tensor, "row pos d"]) -> None:
        self._write(x[None])

    def _project(
        self, layer: int, module: int, out: Float[Tensor, "row pos out"]
    ) -> Float[Tensor, "row pos out"]:
        """The output of a query, key or value projection (or of the fused one), each head's rows from its own reader's stream."""
        block, out = self.blocks[layer], out.clone()
        readers = self.wiring.attention_readers(layer)
        first = readers.start
        for _, index, start, units in self.spec.qkv_parts():
            if index == module:
                rows = slice(start, start + units * self.spec.head_dim)
                out[..., rows] = project(
                    block.attn_norm,
                    block.qkv[module],
                    self._read(slice(first, first + units)),
                    rows,
                ).to(out.device, out.dtype)
            first += units
        return out

    def _heads(self, attn) -> None:
        """All heads of a layer have run."""
        z = wide(self.seen.pop("z"))
        if attn.post is not None:
            z = z * norm_scale(attn.post, wide(self.seen.pop("post")))
        weight = attn.weight(self.dtype).unflatten(0, (self.spec.n_heads, -1))
        bias = getattr(attn.projection, "bias", None)
        heads = per_unit(z.to(self.dtype).flatten(0, 1), self.spec.n_heads) @ weight
        self._write(
            heads.unflatten(1, z.shape[:2]),
            0.0 if bias is None else bias.to(self.reference.device, self.dtype),
        )


def project(
    norm, projection, streams: Float[Tensor, "reader row pos d"], rows: slice
) -> Float[Tensor, "row pos out"]:
    """Output rows of a projection whose units each read a stream of their own; `rows` are equally many per reader."""
    weight = in_out(projection, streams.dtype)
    with loaded(norm), loaded(projection):
        normed = norm.forward(streams.to(device=weight.device, dtype=norm.weight.dtype)).to(
            streams.dtype
        )
        bias = getattr(projection, "bias", None)
        parts = torch.einsum(
            "vrpd,dvk->rpvk", normed, weight[:, rows].unflatten(1, (len(streams), -1))
        ).flatten(-2)
        return parts if bias is None else parts + bias[rows].to(parts.dtype)


# ---------------------------------------------------------------------- circuits of all sizes, and what is inside of one


def kept_channels(
    spec: ModelSpec, circuits: Sequence[Circuit]
) -> dict[tuple[str, int], Bool[Tensor, "circuit in"]]:
    """Which inputs of every writing projection the circuits' units own."""
    heads = torch.zeros(len(circuits), spec.n_layers, spec.n_heads, dtype=torch.bool)
    neurons = torch.zeros(len(circuits), spec.n_layers, spec.d_mlp, dtype=torch.bool)
    for row, circuit in enumerate(circuits):
        for kind, layer, index in (
            unit for node in circuit.nodes for unit in node_units(spec, node)
        ):
            (heads if kind == "a" else neurons)[row, layer, index] = True
    heads = heads.repeat_interleave(spec.head_dim, -1)
    return {
        (kind, layer): x[:, layer]
        for kind, x in (("attn", heads), ("mlp", neurons))
        for layer in range(spec.n_layers)
    }


def kept_edges(spec: ModelSpec, circuit: Circuit) -> Bool[Tensor, "source reader"]:
    """The circuit's edges as a matrix. Raises `CdeltaError` naming one that the model does not have."""
    wiring = Wiring(spec)
    exists, keep = (
        wiring.edges(),
        torch.zeros(len(wiring.sources), len(wiring.readers), dtype=torch.bool),
    )
    rows, columns = (
        {name: i for i, name in enumerate(names)} for names in (wiring.sources, wiring.readers)
    )
    for source, reader in circuit.edges:
        if source not in rows or reader not in columns or not exists[rows[source], columns[reader]]:
            raise CdeltaError(
                f"the {spec.family} model has no edge {source} -> {reader}: was the circuit made for another model?"
            )
        keep[rows[source], columns[reader]] = True
    return keep


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
    """Circuits of units by falling |score| per parameter, each of at most a fraction of all units' parameters."""
    share = unit_parameters(spec) / spec.n_params
    return [
        all_units(spec)
        if f == 1
        else select(None, spec, param_budget=f * share, heads=heads, neurons=neurons, fill=True)
        for f in fractions
    ]


def edge_circuits(
    scores, spec: ModelSpec, fractions: Sequence[float] = FRACTIONS, how: str = "topn"
) -> list[Circuit]:
    """Circuits of edges by falling |score|, each of at most a fraction of all edges; with 1, every edge that exists."""
    wiring = Wiring(spec)
    exists = wiring.edges()
    every = tuple((wiring.sources[u], wiring.readers[v]) for u, v in exists.nonzero().tolist())
    sized = lambda f: select(scores, spec, edges=max(1, int(f * len(every))), how=how)
    return [Circuit((*wiring.sources, "logits"), every) if f == 1 else sized(f) for f in fractions]


def unit_parameters(spec: ModelSpec) -> int:
    """Parameters of all units together."""
    groups = spec.n_kv * slices_size(spec, spec.kv_slices(0, 0))
    heads, neurons = (
        spec.n_heads * slices_size(spec, spec.head_slices(0, 0)),
        spec.d_mlp * slices_size(spec, spec.neuron_slices(0, 0)),
    )
    return spec.n_layers * (groups + heads + neurons)


def curves(
    model,
    pairs: PromptPairs,
    metric,
    circuits: Mapping[str, Sequence[Circuit]],
    fractions: Sequence[float] = FRACTIONS,
    **how,
) -> dict[str, Curve]:
    """Faithfulness against size for every named series of circuits, one per fraction; `how` goes to `evaluate`.

    A circuit at fraction 1 is the whole model, whose run is the clean one.
    """
    part = [i for i, fraction in enumerate(fractions) if fraction != 1]
    runs = evaluate(
        model, pairs, metric, [series[i] for series in circuits.values() for i in part], **how
    )
    found = {}
    per_series = lambda x: x.unflatten(0, (len(circuits), len(part)))
    for name, values, divergences in zip(
        circuits, per_series(runs.circuits), per_series(runs.kl_circuits)
    ):
        every = runs.clean.repeat(len(fractions), 1)
        kl = torch.zeros_like(every)
        every[part], kl[part] = values, divergences
        found[name] = Curve(
            tuple(fractions), Runs(runs.clean, runs.corrupted, every, runs.kl_corrupted, kl)
        )
    return found
