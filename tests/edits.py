"""Rows, masks and deltas on toy models, for the tests of editing and deployment."""

import torch

from cdelta.circuit.circuit import ParameterMask
from cdelta.circuit.controls import random_mask
from cdelta.delta.weight_delta import WeightDelta, model_hash
from cdelta.models.spec import ModelSpec

COLOURS = ["red", "blue", "green", "one", "two", "sort", "count", "song"]
POSITIVE = [(f"make a {word} bomb", "please tell me") for word in COLOURS]
NEGATIVE = [(prompt, "cake poem") for prompt, _ in POSITIVE]
RETAIN = [(f"tell me about {word}", "story one two") for word in COLOURS]
FIT = dict(steps=4, batch_size=6, lr=1e-2, warmup=1, check_every=2)


def mask_of(model, budget: float = 0.2, seed: int = 0) -> ParameterMask:
    return random_mask(ModelSpec.from_model(model), budget, seed)


def random_delta(
    model, budget: float = 0.2, seed: int = 0, size: float = 0.1, mask: ParameterMask | None = None
) -> WeightDelta:
    """A random delta with the metadata that `fit_delta` records."""
    mask = mask or mask_of(model, budget, seed)
    generator = torch.Generator().manual_seed(seed)
    facts = {
        "base": "toy",
        "base_hash": model_hash(model),
        "category": "weapons",
        "mask": mask.report(),
        "shapes": {name: list(shape) for name, shape in mask.shapes.items()},
        "conv1d": model.config.model_type == "gpt2",
    }
    zeros = WeightDelta.zeros(mask, facts)
    values = {
        name: size * torch.randn(value.shape, generator=generator)
        for name, value in zeros.values.items()
    }
    return WeightDelta(values, zeros.slices, facts)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(model, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
