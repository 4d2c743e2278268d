"""TODO artifact.attention."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from cdelta.circuit.circuit import node_order
from cdelta.circuit.mask import parse_unit
from cdelta.errors import CdeltaError
from cdelta.evaluation.stats import bootstrap_mean
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
import sys

# ---------------------------------------------------------------------- what the parts do


def component_table(category: str, effects: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    """Rows ``category, part, effect, value, low, high`` from kind of effect -> part -> Float[pair], with bootstrap intervals over pairs."""
    estimate = lambda values: dict(
        zip(("value", "low", "high"), bootstrap_mean(values.numpy(), draws=1000))
    )
    return pd.DataFrame(
        [
            {"category": category, "part": part, "effect": kind, **estimate(values)}
            for kind, found in effects.items()
            for part, values in found.items()
        ]
    )


KEYS = ("first token", "before the deciding words", "deciding words", "after them", "itself")
"""Where attention from the last prompt token may go. Deciding words: from the first to the last token in which clean and corrupted prompt differ."""


def bridge_of(model, tok):
    """TransformerLens's TransformerBridge around a *copy* of the model (wrapping changes what it wraps).

    Raises `CdeltaError` saying why, if the bridge cannot wrap this model.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge

        name = model.config.name_or_path or model.config.model_type
        return TransformerBridge.boot_transformers(
            name,
            hf_model=copy.deepcopy(model),
            tokenizer=tok,
            dtype=model.dtype,
            device=model.device,
        )
    except Exception as error:  # a wrapper from elsewhere, of models that it may not know: whatever it raises, the reader is told
        raise CdeltaError(
            f"TransformerBridge cannot wrap this model ({type(error).__name__}: {error}): its attention is not shown."
        ) from error


@torch.no_grad()
def attention_patterns(
    bridge, rows: Sequence[Sequence[int]], heads: Sequence[str]
) -> dict[str, list[Float[Tensor, "query key"]]]:
    """Attention of the named heads on every row of token ids."""
    found: dict = {head: [] for head in heads}
    hook = lambda layer: f"blocks.{layer}.attn.hook_pattern"
    units = {head: parse_unit(head) for head in heads}
    for row in rows if heads else ():
        _, cache = bridge.run_with_cache(
            torch.tensor([list(row)], device=bridge.cfg.device),
            names_filter=[hook(layer) for _, layer, _ in units.values()],
        )
        for head, (_, layer, index) in units.items():
            found[head].append(cache[hook(layer)][0, index].float().cpu())
    return found


def strongest_parts(table: pd.DataFrame, most: int = 12) -> pd.DataFrame:
    """The rows of the parts with the largest |value| of any category, in the model's order."""
    size = table["value"].abs().groupby(table["part"]).max().nlargest(most)
    kept = table[table["part"].isin(size.index)]
    return kept.sort_values(
        "part", key=lambda names: names.map(node_order), kind="stable"
    ).reset_index(drop=True)


def attention_table(patterns: Mapping[str, Sequence[Tensor]], pairs: PromptPairs) -> pd.DataFrame:
    """Mean share of attention from the last token per kind of key (`KEYS`): rows ``head, key, value`` in percent."""
    share = lambda pattern, i, key: pattern[-1][key_kinds(pairs, i) == KEYS.index(key)].sum().item()
    return pd.DataFrame(
        [
            {
                "head": head,
                "key": key,
                "value": 100
                * float(np.mean([share(pattern, i, key) for i, pattern in enumerate(found)])),
            }
            for head, found in patterns.items()
            for key in KEYS
        ],
        columns=["head", "key", "value"],
    )


def key_kinds(pairs: PromptPairs, row: int) -> Int[Tensor, "pos"]:
    """Index into `KEYS` of every token of a clean prompt."""
    differs = [i for i, (a, b) in enumerate(zip(pairs.clean[row], pairs.corrupted[row])) if a != b]
    kinds = torch.ones(len(pairs.clean[row]), dtype=torch.long)
    kinds[differs[-1] + 1 :] = 3
    kinds[differs[0] : differs[-1] + 1] = 2
    kinds[0], kinds[-1] = 0, 4
    return kinds


sys.path.pop(0)  # the script's own folder, so that nothing of the package is in reach
