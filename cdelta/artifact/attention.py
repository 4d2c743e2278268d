"""What the parts of circuits do: their effects on the metric, and what the heads attend to."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from cdelta.circuit.circuit import Circuit, node_order, parse_unit
from cdelta.circuit.faithfulness import direct_effects, leave_one_out, parts, total_effects
from cdelta.circuit.selection import UnitScores
from cdelta.errors import CdeltaError
from cdelta.evaluation.stats import bootstrap_mean
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    Patterns = dict[str, list[Float[Tensor, "query key"]]]

KEYS = ("first token", "before the deciding words", "deciding words", "after them", "itself")
"""Where attention from the last prompt token may go. Deciding words: from the first to the last
token in which clean and corrupted prompt differ."""

DECIMALS = 4
"""Effects in nats are rounded to so many before they are resampled."""


def component_table(
    model, pairs: PromptPairs, metric, circuit: Circuit, rows: int = 64
) -> pd.DataFrame:
    """Effect of every head and every layer's neurons of a circuit: ``part, effect, value, low,
    high`` (nats), with bootstrap intervals over pairs.

    ``total``: the model's metric falls by this much when the part alone writes its corrupted
    output. ``direct``: the same when only the unembedding reads that output. ``left out``: the
    circuit's own run loses this much without the part.
    """
    pieces = parts(circuit)
    effects = {
        "total": total_effects(model, pairs, metric, pieces, rows=rows),
        "direct": direct_effects(model, pairs, metric, pieces, rows=rows),
        "left out": leave_one_out(model, pairs, metric, circuit, pieces, rows=rows),
    }
    found = []
    for kind, values in effects.items():
        for part, fall in values.items():
            # equal values are drawn together: float noise must not decide which are equal
            mean = bootstrap_mean(fall.numpy().round(DECIMALS), draws=1000)
            found.append({"part": part, "effect": kind, **mean._asdict()})
    return pd.DataFrame(found, columns=["part", "effect", "value", "low", "high"])


def strongest_parts(table: pd.DataFrame, most: int = 12) -> pd.DataFrame:
    """The rows of the parts with the largest |value| of any category, in the model's order."""
    size = table["value"].abs().groupby(table["part"]).max().nlargest(most)
    kept = table[table["part"].isin(size.index)]
    order = kept["part"].map({part: node_order(part) for part in size.index})
    return kept.loc[order.sort_values(kind="stable").index].reset_index(drop=True)


def top_heads(
    circuit: Circuit, scores: Float[Tensor, "layer head"], units: UnitScores, most: int = 3
) -> pd.DataFrame:
    """The strongest heads by the ranking of the masks: ``unit, score, share, in circuit``.

    ``score``: mean effect over pairs (nats); ``share``: what the ranking orders by.
    """
    places = units.heads.abs().flatten().topk(min(most, units.heads.numel())).indices.tolist()
    rows = []
    for place in places:
        layer, head = divmod(place, units.heads.shape[1])
        name = f"a{layer}.h{head}"
        score, share = scores[layer, head].item(), units.heads[layer, head].item()
        rows.append(
            {"unit": name, "score": score, "rank by": share, "in circuit": name in circuit.nodes}
        )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- attention


def attention_of(
    model,
    tok,
    circuits: Mapping[str, Circuit],
    units: Mapping[str, UnitScores],
    pairs: Mapping[str, PromptPairs],
    most: int = 4,
) -> pd.DataFrame:
    """Attention from the last prompt token of every circuit's strongest heads: rows ``category,
    head, key, value`` (percent). Empty, after saying why, where the model cannot be wrapped.
    """
    found = [pd.DataFrame(columns=["category", "head", "key", "value"])]
    try:
        bridge = bridge_of(model, tok)
    except CdeltaError as error:
        print(error)
        return found[0]
    for category, circuit in circuits.items():
        heads = [name for name in circuit.nodes if name.startswith("a")]
        strength = {
            name: units[category].heads[parse_unit(name)[1:]].abs().item() for name in heads
        }
        strongest = sorted(heads, key=strength.get, reverse=True)[:most]
        patterns = attention_patterns(bridge, pairs[category].clean, strongest)
        found.append(attention_table(patterns, pairs[category]).assign(category=category))
    filled = [table for table in found if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else found[0]


def bridge_of(model, tok):
    """TransformerLens's TransformerBridge around a *copy* of the model (wrapping changes what it
    wraps).

    Raises `CdeltaError` saying why, if the bridge cannot wrap this model.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(
            model.config.name_or_path or model.config.model_type,
            hf_model=copy.deepcopy(model),
            tokenizer=tok,
            dtype=model.dtype,
            device=model.device,
        )
    except Exception as error:  # of models that it may not know: whatever it raises
        raise CdeltaError(
            f"TransformerBridge cannot wrap this model ({type(error).__name__}: {error}): "
            "its attention is not shown."
        ) from error


@torch.no_grad()
def attention_patterns(bridge, rows: Sequence[Sequence[int]], heads: Sequence[str]) -> Patterns:
    """Attention of the named heads on every row of token ids."""
    units = {head: parse_unit(head)[1:] for head in heads}
    hooks = sorted({f"blocks.{layer}.attn.hook_pattern" for layer, _ in units.values()})
    found: Patterns = {head: [] for head in heads}
    for row in rows if heads else ():
        ids = torch.tensor([list(row)], device=bridge.cfg.device)
        _, cache = bridge.run_with_cache(ids, names_filter=hooks)
        for head, (layer, index) in units.items():
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, index]
            found[head].append(pattern.float().cpu())
    return found


def attention_table(patterns: Patterns, pairs: PromptPairs) -> pd.DataFrame:
    """Mean share of attention from the last token per kind of key (`KEYS`): rows ``head, key,
    value`` in percent.
    """
    kinds = [key_kinds(pairs, row) for row in range(len(pairs))]
    rows = []
    for head, found in patterns.items():
        for index, key in enumerate(KEYS):
            shares = [own[-1][kind == index].sum().item() for own, kind in zip(found, kinds)]
            rows.append({"head": head, "key": key, "value": 100 * float(np.mean(shares))})
    return pd.DataFrame(rows, columns=["head", "key", "value"])


def key_kinds(pairs: PromptPairs, row: int) -> Int[Tensor, "pos"]:
    """Index into `KEYS` of every token of a clean prompt."""
    sides = zip(pairs.clean[row], pairs.corrupted[row])
    differs = [i for i, (a, b) in enumerate(sides) if a != b]
    kinds = torch.ones(len(pairs.clean[row]), dtype=torch.long)
    kinds[differs[-1] + 1 :] = 3
    kinds[differs[0] : differs[-1] + 1] = 2
    kinds[0], kinds[-1] = 0, 4
    return kinds
