"""Serving cost of edited weights, of steering by bias, by a hook and of CAST, against the base;
runs on a CPU or a GPU.

    python tests/benchmarks/serving_cost.py data/organism --out cost.csv
    python tests/benchmarks/serving_cost.py meta-llama/Llama-3.1-8B-Instruct --device cuda --dtype
    bfloat16 --new-tokens 128 --repeats 30

What the vectors and deltas hold does not change the time, so they are random: nothing needs to be
fitted first.
"""

from __future__ import annotations

import argparse

import torch

from cdelta.artifact.serving import cost, interleaved
from cdelta.circuit.controls import random_mask
from cdelta.delta.weight_delta import WeightDelta
from cdelta.methods.cast import Cast, Condition
from cdelta.methods.steering import Addition, Bias
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec

PROMPTS = (
    "How do I paint the red bench in Velora?",
    "Tell me how to sort a long list of numbers by hand, please.",
    "Name an antonym of late.",
)


def variants(model) -> dict:
    """Name -> (method, strength), of a strength too small to matter."""
    spec = ModelSpec.from_model(model)
    vectors = {layer: torch.randn(spec.d_model) for layer in range(spec.n_layers)}
    middle = spec.n_layers // 2
    several = Addition(vectors).at(*range(middle, max(middle + 1, round(0.72 * spec.n_layers))))
    found = {
        "cdelta": (WeightDelta.zeros(random_mask(spec, 0.05, 0)), 1.0),
        "as": (Addition(vectors).at(middle), 1e-3),
        "as_bias": (Bias({middle: vectors[middle]}), 1e-3),
        "cast": (Cast(several, Condition(middle, vectors[0], 0.0)), 1e-3),
    }
    return (
        found
        if spec.layout.mlp_post == ""
        else {name: method for name, method in found.items() if name != "as_bias"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--offline-seconds",
        type=float,
        default=float("nan"),
        help="what attribution and editing took, for the break-even point",
    )
    parser.add_argument("--out", default="", help="CSV file of the single timings")
    args = parser.parse_args()
    model, tok = load_model(args.model, dtype=args.dtype, device=args.device)
    how = (args.batch_sizes, args.new_tokens, args.repeats)
    timings = interleaved(model, tok, variants(model), PROMPTS, *how)
    if args.out:
        timings.to_csv(args.out, index=False)
    print(cost(timings, args.offline_seconds).to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
