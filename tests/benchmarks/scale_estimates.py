"""What an edit would take at 1B, 8B and 70B parameters: memory and arithmetic as `cdelta check` and
`cdelta.attribution.cost` predict them from the models' shapes alone. Nothing of it is measured.

    python tests/benchmarks/scale_estimates.py [--out figures/bench/scale_estimates.csv]

Settings are those of the preset `PRESET` in bf16 on a GPU, prompts the embedded set's of one
category, at `PROMPT_TOKENS` tokens. ``training_gb`` is values, gradients and optimiser state of
the trained entries; ``attribution_gb`` what attribution adds to the weights with the preset's
micro-batch, or with one pair at a time; ``apply_gb`` a file of 5 GB and the delta. Arithmetic is in
PFLOP (2 a weight and token), and the hours are those of a device that sustains 200 TFLOP per second
throughout, which is assumed; answers, made token by token, reach less of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parent))

import common  # noqa: E402
import gpu  # noqa: E402
import scaling  # noqa: E402

from cdelta.artifact.presets import load_preset  # noqa: E402
from cdelta.attribution.batch import batches  # noqa: E402
from cdelta.attribution.cost import memory_needed  # noqa: E402
from cdelta.edit.check import ENTRY_BYTES, forward_tokens, trained_entries  # noqa: E402
from cdelta.models.checkpoint import meta_model  # noqa: E402
from cdelta.models.spec import ModelSpec  # noqa: E402
from cdelta.policy.build import build_policy  # noqa: E402

PRESET, CATEGORY, PROMPT_TOKENS = "llama-3.1-8b", "crime", 48
FILE_GB, RATE = 5.0, 2e14
SMALLER = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LARGER = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
SHAPES = {
    "SmolLM2-135M": scaling.SMOLLM2,
    "Llama-3.2-1B": gpu.SHAPE | SMALLER | {"tie_word_embeddings": True},
    "Llama-3.1-8B": gpu.SHAPE,
    "Llama-3.3-70B": gpu.SHAPE | LARGER | {"num_attention_heads": 64},
}


def attribution_memory(model, spec: ModelSpec, micro_batch: int, steps: int) -> int:
    """Bytes that attribution adds to a model, which may be one without numbers."""
    pairs = gpu.random_pairs(micro_batch, PROMPT_TOKENS, model.config.vocab_size - 1)
    todo = batches(pairs, micro_batch, torch.device("cpu"))
    return memory_needed(model, spec, todo, steps)


def estimates(name: str) -> dict[str, object]:
    """One model's row."""
    recipe = load_preset(PRESET).recipe
    how, new_tokens = recipe.attribution, recipe.answers.max_new_tokens
    model = meta_model(LlamaConfig(**SHAPES[name], dtype="bfloat16"))
    spec = ModelSpec.from_model(model)
    records = build_policy("synthetic", [CATEGORY], everyday=recipe.edit.everyday).records
    tokens = forward_tokens(spec, records, recipe, PROMPT_TOKENS + new_tokens)
    work = [2 * spec.n_params * n for n in tokens]
    entries, weights = trained_entries(spec, recipe), 2 * spec.n_params / 1e9
    return {
        "model": name,
        "parameters": spec.n_params,
        "weights_gb": weights,
        "trained_entries": entries,
        "training_gb": ENTRY_BYTES * entries / 1e9,
        "attribution_gb": attribution_memory(model, spec, how.micro_batch, how.ig_steps) / 1e9,
        "attribution_1_pair_gb": attribution_memory(model, spec, 1, how.ig_steps) / 1e9,
        "apply_gb": min(weights, FILE_GB) + 4 * entries / 1e9,
        "attribution_pflop": work[0] / 1e15,
        "training_pflop": work[1] / 1e15,
        "answers_pflop": work[2] / 1e15,
        "hours_at_200_tflops": sum(work) / RATE / 3600,
    }


def rounded(facts: dict[str, object]) -> dict[str, object]:
    """Three significant digits of what is no count."""
    return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in facts.items()}


def main(arguments: list[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(common.BENCH / "scale_estimates.csv"))
    options = parser.parse_args(arguments)
    common.write_csv(Path(options.out), [rounded(estimates(name)) for name in SHAPES])


if __name__ == "__main__":
    main()
