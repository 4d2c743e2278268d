"""TODO circuit.effects."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Mapping

import torch

from cdelta.attribution.exact import patched_changes, read_shifted
from cdelta.attribution.metrics import Metric
from cdelta.attribution.passes import (
    SourceDifferences,
    batches,
    input_device,
    writers,
)
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.faithfulness import ROWS, evaluate, kept_channels
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from torch import Tensor


def parts(circuit: Circuit) -> dict[str, Circuit]:
    """A circuit of units in pieces that can be read: every head, and the neurons of every layer together."""
    found: dict[str, list[str]] = {}
    for node in circuit.nodes:
        found.setdefault(node if node.startswith("a") else node.split(".")[0], []).append(node)
    return {name: Circuit(tuple(nodes)) for name, nodes in found.items()}


def leave_one_out(
    model, pairs: PromptPairs, metric, circuit: Circuit, removed: Mapping[str, Circuit], **how
) -> dict[str, Tensor]:
    """Minimality: by how much the metric of the circuit's own run falls without each of `removed`, Float[pair], in the metric's unit."""
    runs = evaluate(
        model, pairs, metric, [circuit, *(circuit - part for part in removed.values())], **how
    )
    return dict(zip(removed, runs.circuits[0] - runs.circuits[1:]))


def total_effects(
    model, pairs: PromptPairs, metric, components: Mapping[str, Circuit], **how
) -> dict[str, Tensor]:
    """Ablation: by how much the model's metric falls when a component alone is replaced, Float[pair], in the metric's unit."""
    if not components:
        return {}
    runs = evaluate(model, pairs, metric, list(components.values()), ablate=True, **how)
    return dict(zip(components, runs.clean - runs.circuits))


def direct_effects(
    model, pairs: PromptPairs, metric: Metric, components: Mapping[str, Circuit], rows: int = ROWS
) -> dict[str, Tensor]:
    """Direct logit attribution: by how much the metric falls when only the unembedding reads a component's corrupted output.

    Float[pair], in the metric's unit. The final norm sees the change. What later layers make of the component is left out, so that this
    minus `total_effects` is what they add.
    """
    if not components:
        return {}
    spec, keep = (
        ModelSpec.from_model(model),
        kept_channels(ModelSpec.from_model(model), list(components.values())),
    )
    changes = torch.zeros(len(components), len(pairs), dtype=torch.float64)
    for batch in batches(pairs, rows, input_device(model)):
        differences = SourceDifferences(model, spec, batch, metric)
        shift = torch.zeros(
            len(components),
            *differences.dense.shape[1:],
            dtype=differences.dtype,
            device=differences.dense.device,
        )
        for layer, block in enumerate(differences.blocks):
            for kind, writer in zip(("attn", "mlp"), writers(spec, block)):
                chosen = keep[kind, layer].to(shift.device, shift.dtype)
                used = chosen.any(-1)
                shift[used] += (
                    chosen[used][:, None] * differences.inputs[kind, layer]
                ) @ writer.weight(shift.dtype)
        change = patched_changes(
            model,
            batch,
            metric,
            differences.metric_clean,
            shift,
            partial(read_shifted, spec.final_norm(model)),
        )
        changes[:, list(batch.rows)] = change.double().cpu()
    return dict(zip(components, -changes))
