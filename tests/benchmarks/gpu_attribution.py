"""EAP-IG on an 8B-shaped model on one GPU: time, peak memory, tokens per second, share of the matmul ceiling.

    python tests/benchmarks/gpu_attribution.py [--micro-batch 8 16] [--out gpu_attribution.json]

Random bf16 weights of Llama-3.1-8B's shape, 128 pairs of 48 tokens, 5 steps. Imports only the core's dependencies, so
it runs on a bare machine. Goals: a peak of at most 1.35 x the weights, at most 15 s. ``--dry-run`` goes through all of it
on a CPU with a toy.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cdelta.attribution.cost import measured, passes  # noqa: E402
from cdelta.attribution.scores import attribute, estimate_cost  # noqa: E402
from cdelta.models.spec import ModelSpec  # noqa: E402
from cdelta.policy.pairs import PromptPairs  # noqa: E402

PAIRS, LENGTH, STEPS = 128, 48, 5
GOALS = {"peak_over_weights": 1.35, "seconds": 15.0}
SHAPE = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
TOY = SHAPE | dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def metric(logits):
    return logits[:, 5] - logits[:, 9]


def random_model(shape: dict, device: str):
    """Random bf16 weights, always the same, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**shape), dtype=torch.bfloat16
        )
    return model.eval().requires_grad_(False)


def random_pairs(n: int, vocabulary: int) -> PromptPairs:
    """Rows that differ in two tokens."""
    rows = torch.randint(1, vocabulary, (2, n, LENGTH), generator=torch.Generator().manual_seed(0))
    rows[1, :, :20], rows[1, :, 22:] = rows[0, :, :20], rows[0, :, 22:]
    return PromptPairs.from_tokens(rows[0].tolist(), rows[1].tolist())


def matmul_ceiling(device: str, size: int) -> float:
    """Achieved bf16 FLOP per second of one large product, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(measured(lambda: a @ b, device)[1].seconds for _ in range(10))


def flop(spec: ModelSpec, vocabulary: int, tokens: int) -> float:
    """Arithmetic of the whole run on `tokens` tokens a side; embedding and unembedding (of one position) left out."""
    return tokens * 2 * (spec.n_params - 2 * vocabulary * spec.d_model) * passes(spec, STEPS)


def one_run(model, pairs: PromptPairs, micro_batch: int, ceiling: float) -> dict:
    """One measured run; the estimate before it has warmed up."""
    spec, vocabulary, device = ModelSpec.from_model(model), model.config.vocab_size, model.device
    kw = dict(steps=STEPS, micro_batch=micro_batch)
    predicted = estimate_cost(model, pairs, metric, **kw)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    scores, cost = measured(lambda: attribute(model, pairs, metric, **kw), device)
    tokens = len(pairs) * LENGTH
    found = dict(
        peak_over_weights=round(1 + cost.memory / weights, 4), seconds=round(cost.seconds, 3)
    )
    return dict(
        micro_batch=micro_batch,
        **found,
        goals_met=all(found[name] <= goal for name, goal in GOALS.items()),
        estimated_seconds=round(predicted.seconds, 3),
        estimated_peak_over_weights=round(1 + predicted.memory / weights, 4),
        weights_gb=round(weights / 1e9, 3),
        tokens_per_second=round(tokens / cost.seconds, 1),
        share_of_matmul_ceiling=round(flop(spec, vocabulary, tokens) / cost.seconds / ceiling, 4),
        completeness_error=scores.completeness_error,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8])
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look")
    parser.add_argument("--out", default="gpu_attribution.json")
    parser.add_argument("--dry-run", action="store_true", help="a toy on the CPU")
    args = parser.parse_args(arguments)
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: run this on a machine with one, or try --dry-run.")
    shape, n = (TOY, 4) if args.dry_run else (SHAPE | {"num_hidden_layers": args.layers}, PAIRS)
    model, pairs = random_model(shape, device), random_pairs(n, shape["vocab_size"] - 1)
    ceiling = matmul_ceiling(device, 64 if args.dry_run else 8192)
    facts = dict(
        device=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        torch=torch.__version__,
        started=time.strftime("%F %T"),
    )
    facts |= dict(
        matmul_tflops=round(ceiling / 1e12, 1),
        runs=[one_run(model, pairs, size, ceiling) for size in args.micro_batch],
    )
    Path(args.out).write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
