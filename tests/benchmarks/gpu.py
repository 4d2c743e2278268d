"""What the package takes on one GPU at an 8B model's shape; every part in under two minutes.

    python tests/benchmarks/gpu.py [--only attribution edit apply answers] [--out gpu.json]

Random bf16 weights of Llama-3.1-8B's shape, made on the GPU. Each part imports what it needs when
it
runs: attribution the core's dependencies alone, the others pandas, scipy and PyYAML as well. The
JSON is written anew after every part, and names the reason where one failed.
``--tiny`` goes through all of it with a toy, on a CPU where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cdelta.attribution.cost import fitting_micro_batch, measured, passes  # noqa: E402
from cdelta.attribution.scores import attribute, estimate_cost  # noqa: E402
from cdelta.models.spec import ModelSpec  # noqa: E402
from cdelta.policy.pairs import PromptPairs  # noqa: E402

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
TOY = SHAPE | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STEPS = 5


@dataclass(frozen=True)
class Sizes:
    """How much each part does."""

    shape: dict
    pairs: int = 128
    length: int = 48
    micro_batches: tuple = (1, 2, 4, "auto")
    budget: float = 0.03
    rows: int = 8
    row_tokens: int = 256
    retained: int = 8
    edit_steps: tuple[int, int] = (4, 12)
    shard: str = "5GB"
    prompts: int = 256
    new_tokens: int = 32
    batch_sizes: tuple[int, ...] = (64, 256)
    product: int = 8192


LARGE = Sizes(SHAPE)
TINY = Sizes(
    TOY,
    pairs=4,
    micro_batches=(2, "auto"),
    rows=4,
    row_tokens=32,
    edit_steps=(1, 2),
    shard="100KB",
    prompts=4,
    new_tokens=4,
    batch_sizes=(2,),
    product=64,
)


def metric(logits):
    """The difference of two tokens' logits."""
    return logits[:, 5] - logits[:, 9]


def random_model(shape: dict, device: str, dtype: torch.dtype = torch.bfloat16):
    """Random weights, always the same, made on the device."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_pairs(n: int, length: int, vocabulary: int) -> PromptPairs:
    """Rows that differ in two tokens."""
    rows = torch.randint(1, vocabulary, (2, n, length), generator=torch.Generator().manual_seed(0))
    rows[1, :, :20], rows[1, :, 22:] = rows[0, :, :20], rows[0, :, 22:]
    return PromptPairs.from_tokens(rows[0].tolist(), rows[1].tolist())


def weight_bytes(model) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def matmul_ceiling(device: str, size: int) -> float:
    """Achieved bf16 FLOP per second of one large product, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(measured(lambda: a @ b, device)[1].seconds for _ in range(10))


# ---------------------------------------------------------------------- parts


def attribution(model, sizes: Sizes) -> dict:
    """EAP-IG of the whole run at several micro-batches. Goals: 6 s, peak 1.25 x the weights."""
    pairs = random_pairs(sizes.pairs, sizes.length, sizes.shape["vocab_size"] - 1)
    ceiling = matmul_ceiling(model.device.type, sizes.product)
    runs = [attribution_run(model, pairs, size, ceiling) for size in sizes.micro_batches]
    return {
        "matmul_tflops": ceiling / 1e12,
        "pairs": sizes.pairs,
        "tokens": sizes.length,
        "runs": runs,
    }


def attribution_run(model, pairs: PromptPairs, micro_batch: int | str, ceiling: float) -> dict:
    """One measured run; the estimate before it has warmed up."""
    spec, device, weights = ModelSpec.from_model(model), model.device, weight_bytes(model)
    if micro_batch == "auto":
        micro_batch = fitting_micro_batch(model, spec, pairs, STEPS, device)
    options = {"steps": STEPS, "micro_batch": micro_batch}
    predicted = estimate_cost(model, pairs, metric, **options)
    scores, cost = measured(lambda: attribute(model, pairs, metric, **options), device)
    tokens = sum(map(len, pairs.clean))
    arithmetic = flop(spec, model.config.vocab_size, tokens)
    return {
        "micro_batch": micro_batch,
        "seconds": cost.seconds,
        "peak_over_weights": 1 + cost.memory / weights,
        "estimated_seconds": predicted.seconds,
        "estimated_peak_over_weights": 1 + predicted.memory / weights,
        "tokens_per_second": tokens / cost.seconds,
        "floor_seconds": arithmetic / ceiling,
        "share_of_matmul_ceiling": arithmetic / cost.seconds / ceiling,
        "completeness_error": scores.completeness_error,
    }


def flop(spec: ModelSpec, vocabulary: int, tokens: int) -> float:
    """Arithmetic of the whole run on `tokens` tokens a side, embedding and unembedding left out."""
    return tokens * 2 * (spec.n_params - 2 * vocabulary * spec.d_model) * passes(spec, STEPS)


def edit(model, sizes: Sizes) -> dict:
    """One training step on a mask of the budget. Goal: peak 1.35 x the weights."""
    from toys import toy_tokenizer

    from cdelta.circuit.controls import random_mask
    from cdelta.edit.fit import train
    from cdelta.edit.recipe import EditRecipe

    spec, tok = ModelSpec.from_model(model), toy_tokenizer()
    mask, mask_cost = measured(lambda: random_mask(spec, sizes.budget, 0), "cpu")
    rows, few = training_rows(sizes), sizes.edit_steps[0]
    how = EditRecipe(
        objective="positive",
        retain_on="sides",
        retain_loss="kl",
        retain_pool=1,
        retain_share=0.5,
        batch_size=sizes.rows,
        steps=few,
        check_every=max(sizes.edit_steps),
        attempts=1,
        warmup=1,
        lr=1e-6,
    )
    seconds, memory = [], 0
    for steps in (few, *sizes.edit_steps):  # the first is to warm up
        settings = replace(how, steps=steps)
        _, cost = measured(partial(train, model, tok, mask, rows, settings), model.device)
        seconds.append(cost.seconds)
        memory = max(memory, cost.memory)
    return {
        "entries": mask.count(),
        "mask_seconds": mask_cost.seconds,
        "seconds_per_step": (seconds[2] - seconds[1]) / (sizes.edit_steps[1] - few),
        "peak_over_weights": 1 + memory / weight_bytes(model),
        "added_gb": memory / 1e9,
        "rows": sizes.rows,
        "row_tokens": sizes.row_tokens,
    }


def training_rows(sizes: Sizes):
    """Rows of `row_tokens` tokens with their answers, `retained` of them to be kept."""
    from toys import WORDS

    from cdelta.edit.rows import TrainingRows

    def words(n: int, first: int) -> str:
        return " ".join(WORDS[(first + i) % len(WORDS)] for i in range(n))

    answer_words = sizes.row_tokens // 8
    prompt_words = sizes.row_tokens - answer_words - 4  # beginning, two roles, end
    prompts = [words(prompt_words, i) for i in range(sizes.rows + sizes.retained)]
    target = [(prompt, words(answer_words, 3)) for prompt in prompts[: sizes.rows]]
    retain = [(prompt, words(answer_words, 5)) for prompt in prompts[sizes.rows :]]
    return TrainingRows(target, target, retain)


APPLY = """
import json, sys
from cdelta.attribution.cost import measured
from cdelta.delta.apply import save_edited
from cdelta.delta.weight_delta import WeightDelta
from cdelta.models.checkpoint import Checkpoint
base, delta, out = sys.argv[1:]
Checkpoint(base).check()  # imports the model's code
loaded = WeightDelta.load(delta)
_, cost = measured(lambda: save_edited(base, loaded, out, 1.0, force=True))
print(json.dumps([cost.seconds, cost.memory]))
"""
"""What a process of its own runs, where nothing else hides its memory."""


def apply(model, sizes: Sizes) -> dict:
    """Streaming apply of a delta of the budget to the sharded checkpoint, in its own process."""
    from toys import toy_tokenizer

    from cdelta.circuit.controls import random_mask
    from cdelta.delta.weight_delta import WEIGHTS, WeightDelta

    spec = ModelSpec.from_model(model)
    with tempfile.TemporaryDirectory() as folder:
        base, delta, out = (Path(folder) / name for name in ("base", "delta", "out"))
        _, written = measured(lambda: model.save_pretrained(base, max_shard_size=sizes.shard))
        toy_tokenizer().save_pretrained(base)
        WeightDelta.zeros(random_mask(spec, sizes.budget, 0)).save(delta)
        sizes_of = [file.stat().st_size for file in base.glob("*.safetensors")]
        delta_bytes = (delta / WEIGHTS).stat().st_size
        command = [sys.executable, "-c", APPLY, *map(str, (base, delta, out))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
        seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": seconds,
        "peak_gb": peak / 1e9,
        "checkpoint_gb": sum(sizes_of) / 1e9,
        "largest_shard_gb": max(sizes_of) / 1e9,
        "delta_gb": delta_bytes / 1e9,
        "peak_over_shard_and_delta": peak / (max(sizes_of) + delta_bytes),
        "checkpoint_written_seconds": written.seconds,
    }


def answers(model, sizes: Sizes) -> dict:
    """Greedy answers per second, by batch size."""
    from toys import WORDS, toy_tokenizer

    from cdelta.models.generation import answer

    tok = toy_tokenizer()
    prompts = [" ".join(WORDS[i % 7 : i % 7 + 12]) for i in range(sizes.prompts)]
    runs = []
    for size in sizes.batch_sizes:
        options = {"max_new_tokens": sizes.new_tokens, "batch_size": size}
        answer(model, tok, prompts[:2], **options)
        found, cost = measured(partial(answer, model, tok, prompts, **options), model.device)
        tokens = sum(each.n_tokens for each in found)
        runs.append(
            {
                "batch_size": size,
                "seconds": cost.seconds,
                "answers_per_second": len(found) / cost.seconds,
                "tokens_per_second": tokens / cost.seconds,
                "peak_over_weights": 1 + cost.memory / weight_bytes(model),
            }
        )
    return {"answers": sizes.prompts, "new_tokens": sizes.new_tokens, "runs": runs}


PARTS = {"attribution": attribution, "edit": edit, "answers": answers, "apply": apply}


def facts_of(device: str) -> dict:
    """Machine and versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "started": time.strftime("%F %T"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the parts that were asked for; a part that fails is recorded and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=0, help="fewer for a quick look")
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--tiny", action="store_true", help="a toy, on a CPU where there is no GPU")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        sys.exit("torch sees no GPU here: run this on a machine with one, or try --tiny.")
    sizes = TINY if options.tiny else LARGE
    layers = options.layers or sizes.shape["num_hidden_layers"]
    model = random_model(sizes.shape | {"num_hidden_layers": layers}, device)
    facts = facts_of(device) | {"weights_gb": weight_bytes(model) / 1e9, "layers": layers}
    for name in options.only:
        start = time.perf_counter()
        try:
            facts[name] = PARTS[name](model, sizes)
        except Exception:  # one part's failure must not lose the others' figures
            facts[name] = {"failed": traceback.format_exc()[-1500:]}
        facts[name]["part_seconds"] = time.perf_counter() - start
        Path(options.out).write_text(json.dumps(rounded(facts), indent=1))
        print(name, json.dumps(rounded(facts[name])), flush=True)


def rounded(value):
    """Floats with five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
