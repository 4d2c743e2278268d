"""How time and memory grow, on one thread of a CPU: attribution, training steps, streaming apply.

    python tests/benchmarks/scaling.py [--quick] [--rounds 3] [--out figures/bench/scaling.csv]

Every round measures every point once, in turn, so that a machine's changing load meets all alike;
the table has medians and extremes over the rounds. ``floor_seconds`` is the arithmetic over what
one large product of matrices achieves on this machine (for apply: nothing but copying is done,
and none is given).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import common  # noqa: E402
import gpu  # noqa: E402

from cdelta.attribution.cost import measured  # noqa: E402
from cdelta.attribution.scores import attribute  # noqa: E402
from cdelta.models.spec import ModelSpec  # noqa: E402

SMALL = gpu.TOY | {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "vocab_size": 4096,
}
MIDDLE = SMALL | {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12}
SMOLLM2 = SMALL | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""The last has the sizes of SmolLM2-135M."""
MEASURES = ("seconds", "added_mb")


@dataclass(frozen=True)
class Point:
    """One measurement: a curve's name, where on its axis, and what returns the measures."""

    curve: str
    x: float
    measure: Callable[[], dict]


@cache
def model_of(size: str):
    """The fp32 model of a size, made once."""
    shape = {"small": SMALL, "middle": MIDDLE, "135M": SMOLLM2}[size]
    return gpu.random_model(shape, "cpu", torch.float32)


ceiling = cache(common.product_speed)


def millions(size: str) -> float:
    """Parameters of a model, in millions."""
    return round(ModelSpec.from_model(model_of(size)).n_params / 1e6, 2)


def attribution(size: str, pairs: int, tokens: int) -> dict:
    """EAP-IG with the default steps, two pairs in memory."""
    model = model_of(size)
    rows = gpu.random_pairs(pairs, tokens, model.config.vocab_size - 1)
    options = {"steps": gpu.STEPS, "micro_batch": 2}
    _, cost = measured(lambda: attribute(model, rows, gpu.metric, **options))
    arithmetic = gpu.flop(ModelSpec.from_model(model), model.config.vocab_size, pairs * tokens)
    return {
        "seconds": cost.seconds,
        "added_mb": cost.memory / 1e6,
        "floor_seconds": arithmetic / ceiling(),
    }


def step(size: str, budget: float = 0.03, retained: int = 8) -> dict:
    """One training step of 8 rows of 64 tokens on a mask of `budget`."""
    model = model_of(size)
    sizes = replace(gpu.LARGE, budget=budget, row_tokens=64, retained=retained, edit_steps=(1, 3))
    facts = gpu.edit(model, sizes)
    spec = ModelSpec.from_model(model)
    tokens = sizes.rows * sizes.row_tokens
    weights = spec.n_params - model.config.vocab_size * spec.d_model
    forward_and_backward = 2 * tokens * weights * (2 + 1 / 2)  # of retained rows, the base's too
    return {
        "seconds": max(facts["seconds_per_step"], 0.0),
        "added_mb": facts["added_gb"] * 1e3,
        "floor_seconds": forward_and_backward / ceiling(),
    }


def apply(size: str) -> dict:
    """Streaming apply to a checkpoint in shards of 50 MB."""
    facts = gpu.apply(model_of(size), replace(gpu.LARGE, shard="50MB"))
    return {"seconds": facts["seconds"], "added_mb": facts["peak_gb"] * 1e3}


def points(quick: bool) -> list[Point]:
    """Every point of every curve; with `quick`, two of each on the smallest model."""
    pairs, tokens = ((2, 4), (8, 16)) if quick else ((4, 8, 16, 32), (12, 24, 48, 96))
    budgets, retained = (
        ((0.01, 0.05), (8, 16)) if quick else ((0.003, 0.01, 0.03, 0.1), (8, 64, 256))
    )
    sizes = ("small",) if quick else ("small", "middle", "135M")
    found = [Point("attribution, pairs", n, partial(attribution, "small", n, 24)) for n in pairs]
    found += [Point("attribution, tokens", n, partial(attribution, "small", 4, n)) for n in tokens]
    found += [Point("step, mask", b, partial(step, "small", b)) for b in budgets]
    found += [Point("step, retained rows", n, partial(step, "small", 0.03, n)) for n in retained]
    for size in sizes:
        at = millions(size)
        found.append(Point("attribution, model (M)", at, partial(attribution, size, 4, 24)))
        found.append(Point("step, model (M)", at, partial(step, size)))
        found.append(Point("apply, model (M)", at, partial(apply, size)))
    return found


def table(todo: list[Point], rounds: int) -> list[dict]:
    """Medians and extremes over the rounds, every other round backwards."""
    results: list[list[dict]] = [[] for _ in todo]
    for number in range(rounds):
        order = range(len(todo)) if number % 2 == 0 else reversed(range(len(todo)))
        for place in order:
            results[place].append(todo[place].measure())
            print(todo[place].curve, todo[place].x, results[place][-1], flush=True)
    rows = []
    for point, found in zip(todo, results):
        row = {"curve": point.curve, "x": point.x, "rounds": rounds}
        for name in MEASURES:
            row |= common.spread(name, [each[name] for each in found])
        floors = [each["floor_seconds"] for each in found if "floor_seconds" in each]
        row["floor_seconds"] = round(min(floors), 5) if floors else ""
        rows.append(row | common.where(torch.get_num_threads()))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(common.BENCH / "scaling.csv"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rounds = 1 if options.quick else options.rounds
    common.write_csv(Path(options.out), table(points(options.quick), rounds))


if __name__ == "__main__":
    main()
