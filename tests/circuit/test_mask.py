"""Masks own exactly the entries that their units own, on every family."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from edits import mask_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cdelta.circuit.circuit import (
    ParameterMask,
    intersect_slices,
    layer_of,
    module_of,
    parse_unit,
    union_slices,
    unit_name,
    unit_sizes,
    unit_slices,
)
from cdelta.circuit.controls import (  # fmt: skip
    dense_mask,
    gradient_scores,
    layer_matched,
    loss_gradients,
    magnitude_scores,
    random_mask,
)
from cdelta.circuit.selection import affordable_units, select_units
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec


@pytest.fixture(scope="module")
def specs() -> dict[str, ModelSpec]:
    return {family: ModelSpec.from_model(toys.toy(family)) for family in toys.FAMILIES}


def scores(spec: ModelSpec, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(width):
        return torch.randn(spec.n_layers, width, generator=generator)

    return draw(spec.n_heads), draw(spec.d_mlp)


def everything(spec: ModelSpec) -> ParameterMask:
    return dense_mask(spec)


def entries(mask: ParameterMask) -> dict[str, torch.Tensor]:
    """Boolean tensors of the masked entries."""
    found = {}
    for name, (dim, index) in mask.slices.items():
        found[name] = torch.zeros(mask.shapes[name], dtype=torch.bool)
        found[name].index_fill_(dim, index, True)
    return found


def test_units_cover_attention_and_mlp_each_entry_once(family):
    model = toys.toy(family)
    spec = ModelSpec.from_model(model)
    shared = (".o_proj.bias", ".down_proj.bias", ".c_proj.bias")
    linear = {
        n: p
        for n, p in model.named_parameters()
        if ("attn." in n or "mlp." in n) and "norm" not in n and not n.endswith(shared)
    }
    hits = {
        name: torch.zeros(parameter.shape, dtype=torch.int) for name, parameter in linear.items()
    }
    layers = range(spec.n_layers)
    units = [spec.head_slices(i, h) for i in layers for h in range(spec.n_heads)]
    units += [spec.kv_slices(i, g) for i in layers for g in range(spec.n_kv)]
    units += [spec.neuron_slices(i, n) for i in layers for n in range(spec.d_mlp)]
    for part in (s for unit in units for s in unit):
        hits[part.name].narrow(part.dim, part.start, part.stop - part.start).add_(1)
    assert all((hit == 1).all() for hit in hits.values())
    assert everything(spec).count() == sum(p.numel() for p in linear.values())


def test_count_is_exact_and_embeddings_and_norms_are_untouched(family, specs):
    mask = random_mask(specs[family], 0.3, 0)
    assert mask.count() == sum(int(hit.sum()) for hit in entries(mask).values())
    assert mask.fraction == mask.count() / specs[family].n_params
    assert not [
        name
        for name in mask.slices
        if "norm" in name or "embed" in name or "wte" in name or "ln_" in name
    ]
    assert sum(mask.sizes_by(layer_of).values()) == mask.count()


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(toys.FAMILIES),
    budget=st.floats(0.001, 1),
    seed=st.integers(0, 99),
)
def test_never_exceeds_the_budget(specs, family, budget, seed):
    spec = specs[family]
    assert select_units(spec, *scores(spec, seed), budget).to_mask(spec).fraction <= budget


def test_the_whole_budget_buys_every_unit(family, specs):
    spec = specs[family]
    circuit = select_units(spec, *scores(spec), 1.0)
    assert circuit.to_mask(spec) == everything(spec)
    assert len(circuit.nodes) == spec.n_layers * (spec.n_heads + spec.d_mlp)


def test_units_are_ranked_by_score_per_parameter_still_to_pay(specs):
    spec = specs["llama"]
    heads = torch.zeros(spec.n_layers, spec.n_heads)
    neurons = torch.zeros(spec.n_layers, spec.d_mlp)
    head = sum(unit_sizes(spec)[:2])
    neuron = unit_sizes(spec)[2]
    heads[1, 2], heads[1, 3] = 2.0 * head, 1.5 * head
    neurons[0, 5], neurons[2, 0] = 3.0 * neuron, -1.9 * neuron
    order = affordable_units(spec, heads, neurons, spec.n_params)
    # a1.h3 is cheaper once a1.h2 has paid for their group
    assert order == [("m", 0, 5), ("a", 1, 2), ("a", 1, 3), ("m", 2, 0)]


def test_smaller_units_use_what_a_large_one_leaves(specs):
    spec = specs["llama"]
    heads = torch.zeros(spec.n_layers, spec.n_heads)
    neurons = torch.zeros(spec.n_layers, spec.d_mlp)
    heads[0, 0], neurons[0, :3] = 1e6, 1.0
    entries = int(3.5 * unit_sizes(spec)[2])
    assert affordable_units(spec, heads, neurons, entries) == [("m", 0, n) for n in range(3)]


def test_group_is_counted_once(specs):
    spec = specs["llama"]
    one, two = (
        ParameterMask.from_units(spec, [("a", 0, h) for h in range(n)]).count() for n in (1, 2)
    )
    assert two - one == unit_sizes(spec)[0]


def test_layer_matched_control_has_as_many_entries_in_every_layer(family, specs):
    mask = random_mask(specs[family], 0.3, 0)
    controls = [layer_matched(mask, specs[family], seed) for seed in range(3)]
    assert all(
        control.sizes_by(part_of) == mask.sizes_by(part_of)
        for control in controls
        for part_of in (layer_of, module_of)
    )
    assert len({control.hash() for control in (mask, *controls)}) == 4


def test_random_masks_are_seeded_and_nearly_use_their_budget(family, specs):
    spec = specs[family]
    assert random_mask(spec, 0.2, 1) == random_mask(spec, 0.2, 1) != random_mask(spec, 0.2, 2)
    neuron = unit_sizes(spec)[2] / spec.n_params
    assert 0.2 - neuron < random_mask(spec, 0.2, 1).fraction <= 0.2


@pytest.mark.long
def test_same_entries_in_another_process():
    tests = Path(__file__).parents[1]
    code = (
        f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n"
        "import toys; from edits import mask_of\n"
        "for family in toys.FAMILIES: print(mask_of(toys.toy(family)).hash())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == [mask_of(toys.toy(family)).hash() for family in toys.FAMILIES]


def test_union_and_intersection_are_those_of_the_entries(family, specs):
    a, b = (random_mask(specs[family], 0.3, seed) for seed in (1, 2))

    def of(mask):
        return {
            (n, i)
            for n, hit in entries(mask).items()
            for i in hit.flatten().nonzero().flatten().tolist()
        }

    union, common = (
        replace(a, slices=combined(a.slices, b.slices), shapes=a.shapes | b.shapes)
        for combined in (union_slices, intersect_slices)
    )
    assert of(union) == of(a | b) == of(a) | of(b) and a | b == b | a and a | a == a
    assert of(common) == of(a) & of(b)


def test_report_says_what_the_mask_holds(specs):
    mask = ParameterMask.from_units(specs["llama"], [("a", 0, 1), ("m", 1, 3), ("m", 1, 2)])
    report = mask.report(specs["llama"])
    assert report["kv_groups"] == 1 and "kv_groups" not in mask.report()
    assert (report["heads"], report["neurons"]) == (1, 2)
    assert mask.units == ("a0.h1", "m1.n2", "m1.n3")
    assert (
        sum(report["module_share"].values())
        == pytest.approx(1)
        == sum(report["layer_share"].values())
    )


def test_magnitude_and_gradient_scores_sum_over_the_unit(family):
    model = toys.toy(family)
    spec = ModelSpec.from_model(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    heads, neurons = magnitude_scores(model, spec)

    def direct(unit):
        return sum(
            weights[s.name].narrow(s.dim, s.start, s.stop - s.start).abs().sum().item()
            for s in unit_slices(spec, unit)
        )

    assert heads[1, 3].item() == pytest.approx(direct(("a", 1, 3)), rel=1e-5)
    assert neurons[2, 5].item() == pytest.approx(direct(("m", 2, 5)), rel=1e-5)
    doubled, _ = gradient_scores(
        model, spec, {name: torch.full_like(w, 2.0) for name, w in weights.items()}
    )
    torch.testing.assert_close(doubled, 2 * heads)


@pytest.mark.parametrize("unit", [("a", 0, 3), ("m", 12, 4567)])
def test_unit_names_round_trip(unit):
    assert parse_unit(unit_name(unit)) == unit


def test_bad_input_is_one_clear_error(specs):
    spec = specs["llama"]
    with pytest.raises(CdeltaError, match="names no unit"):
        parse_unit("q3")
    with pytest.raises(CdeltaError, match="no unit a9.h0"):
        ParameterMask.from_units(spec, [("a", 9, 0)])
    for budget in (0, 1.5, float("nan")):
        with pytest.raises(CdeltaError, match="fraction of the model"):
            random_mask(spec, budget, 0)
    heads, neurons = scores(spec)
    with pytest.raises(CdeltaError, match="another model"):
        select_units(spec, heads[:, :2], neurons, 0.1)
    with pytest.raises(CdeltaError, match="NaN"):
        select_units(spec, heads * float("nan"), neurons, 0.1)
    with pytest.raises(CdeltaError, match="different models"):
        random_mask(spec, 0.1, 0) | random_mask(specs["qwen3"], 0.1, 0)


def test_gradients_of_several_losses_add_up_and_leave_the_model_as_it_was():
    model = toys.toy("llama")
    ids = torch.arange(4, 10)[None]

    def gradients(*tokens):
        return loss_gradients(model, (model(ids).logits[0, -1, token] for token in tokens))

    both, one, other = gradients(3, 5), gradients(3), gradients(5)
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(both[name], one[name] + other[name])
    assert both[name].abs().sum() > 0 and not any(p.requires_grad for p in model.parameters())
