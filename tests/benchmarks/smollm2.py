"""What SmolLM2-135M-Instruct takes here: a training step, answers, attribution, with rows read
whole and with what they share read once.

    python tests/benchmarks/smollm2.py [--model FOLDER] [--quick] [--rounds 2]

Prompts are the embedded set's. Both ways of reading take turns in every round. ``gflops`` is what
one large fp32 product achieves here on these threads: machines differ by it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent))

import common  # noqa: E402

from cdelta.attribution.scores import attribute  # noqa: E402
from cdelta.circuit.controls import random_mask  # noqa: E402
from cdelta.edit.fit import train  # noqa: E402
from cdelta.edit.recipe import CANONICAL_REFUSAL, EditRecipe  # noqa: E402
from cdelta.edit.rows import TrainingRows  # noqa: E402
from cdelta.models import prefix  # noqa: E402
from cdelta.models.generation import answer  # noqa: E402
from cdelta.models.loading import load_model  # noqa: E402
from cdelta.models.spec import ModelSpec  # noqa: E402
from cdelta.policy import synthetic  # noqa: E402
from cdelta.policy.pairs import PromptPairs, category_pairs  # noqa: E402

FOLDER = common.ROOT / "data" / "cache" / "SmolLM2-135M-Instruct"
RECIPE = EditRecipe(
    objective="positive",
    refusals="canonical",
    retain_loss="kl",
    first_tokens=12,
    first_weight=4.0,
    retain_share=0.7,
    retain_pool=1,
    batch_size=32,
    attempts=1,
    lr=4e-3,
)
WAYS = {"whole rows": 10**6, "shared prefix": prefix.SHORTEST}
"""Fewest shared tokens that are read once."""


def step_seconds(model, tok, prompts: list[str], steps: int) -> dict[str, float]:
    """Seconds of a step of 32 rows of about 50 tokens on .5 % of the parameters."""
    long = [f"{prompt} Tell me in a few plain words, please." for prompt in prompts]
    kept = "Sure, this is easy. Take your time, begin with the first part."
    rows = TrainingRows(
        [(prompt, CANONICAL_REFUSAL) for prompt in long[::2]],
        [],
        [(prompt, kept) for prompt in long[1::2]],
    )
    mask = random_mask(ModelSpec.from_model(model), 0.005, 0)
    how = EditRecipe(**vars(RECIPE) | {"steps": steps, "check_every": steps})
    log = train(model, tok, mask, rows, how).log
    return {"seconds": min(row["seconds"] for row in log[1:])}


def answer_seconds(model, tok, prompts: list[str], tokens: int) -> dict[str, float]:
    """Seconds of greedy answers, and how many tokens they have."""
    begin = time.perf_counter()
    found = answer(model, tok, prompts, max_new_tokens=tokens, batch_size=128)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": sum(each.n_tokens for each in found)}


def attribution_seconds(model, tok, pairs: PromptPairs) -> dict[str, float]:
    """Seconds of EAP-IG with 5 steps."""
    refusal, other = (tok(word, add_special_tokens=False)["input_ids"][0] for word in ("I", "Sure"))
    begin = time.perf_counter()
    attribute(model, pairs, lambda logits: logits[:, refusal] - logits[:, other], micro_batch=16)
    return {"seconds": time.perf_counter() - begin}


def main(arguments: list[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(FOLDER))
    parser.add_argument("--quick", action="store_true", help="small numbers, one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", default=str(common.BENCH / "smollm2.csv"))
    told = parser.parse_args(arguments)
    n_answers, n_tokens, n_steps, n_pairs = (8, 4, 2, 2) if told.quick else (600, 32, 4, 64)
    model, tok = load_model(told.model, "auto")
    records = pd.DataFrame(synthetic.records()).reset_index(names="id")
    prompts = (records["prompt"].tolist() * 2)[:n_answers]
    pairs, _ = category_pairs(records, "crime", tok, n_pairs)
    tasks: dict[str, Callable[[], dict]] = {
        "training step, 32 rows": lambda: step_seconds(model, tok, prompts[:128], n_steps),
        f"{n_answers} answers of {n_tokens} tokens": lambda: answer_seconds(
            model, tok, prompts, n_tokens
        ),
        f"attribution of {len(pairs)} pairs": lambda: attribution_seconds(model, tok, pairs),
    }
    found: dict[tuple[str, str], list[dict]] = {}
    for _ in range(1 if told.quick else told.rounds):
        for task, measure in tasks.items():
            for way, shortest in WAYS.items():
                prefix.SHORTEST = shortest
                found.setdefault((task, way), []).append(measure())
                print(task, way, found[task, way][-1], flush=True)
    rows = [
        {
            "task": task,
            "rows_read": way,
            "rounds": len(measures),
            **common.spread("seconds", [each["seconds"] for each in measures], 2),
            **{key: value for key, value in measures[0].items() if key != "seconds"},
            "gflops": round(common.product_speed() / 1e9),
            **common.where(torch.get_num_threads()),
        }
        for (task, way), measures in found.items()
    ]
    common.write_csv(Path(told.out), rows)


if __name__ == "__main__":
    main()
