"""What a circuit's parts do: minimality, ablation of single components, direct effects on the
logits.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Mapping

import torch

from cdelta.attribution.batch import batches, input_device
from cdelta.attribution.differences import SourceDifferences
from cdelta.attribution.exact import patched_changes, read_shifted
from cdelta.attribution.linear import writers
from cdelta.attribution.metrics import Metric
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.faithfulness import ROWS, evaluate
from cdelta.circuit.unit_runs import kept_channels
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Effects = dict[str, "Float[Tensor, 'pair']"]
"""Name of a part -> by how much the metric falls without it, in the metric's unit."""


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
        shift = written_by(differences, keep, len(components))
        clean = differences.metric_clean
        change = patched_changes(model, batch, metric, clean, shift, hooks)
        changes[:, list(batch.rows)] = change.double().cpu()
    return dict(zip(components, -changes))


def written_by(
    differences: SourceDifferences, keep: Mapping, n: int
) -> Float[Tensor, "component n d"]:
    """What each of `n` components (channels in `keep`) writes, corrupted minus clean."""
    dense = differences.dense
    shift = torch.zeros(n, *dense.shape[1:], dtype=differences.dtype, device=dense.device)
    for layer, block in enumerate(differences.blocks):
        for kind, writer in writers(differences.spec, block).items():
            chosen = keep[kind, layer].to(shift.device, shift.dtype)
            used = chosen.any(-1)
            channels = chosen[used][:, None] * differences.inputs[kind, layer]
            shift[used] += channels @ writer.weight(shift.dtype)
    return shift
