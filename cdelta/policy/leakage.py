"""Duplicates and near-duplicates: a prompt that leaks from one split, or one source, into
another."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from cdelta.policy.records import normalise

THRESHOLD = 0.5
"""Jaccard similarity of word 3-grams from which two prompts count as near-duplicates."""
KEEP_ORDER = ("test", "val", "discover", "edit")
"""Of two leaking rows the one whose split comes first stays: the test set remains comparable with
published numbers, and training rows, of which there are most, give way."""
TEMPLATE_MARK = " | differs in: "
"""In a group's name: its prompts fill a template and are grouped by the words in which they
differ."""
_CHUNK = 256


def template_of(group: str) -> str:
    """The template that a group's prompts fill with words of their own; empty for other groups."""
    name, mark, _ = group.partition(TEMPLATE_MARK)
    return name if mark else ""


def word_trigrams(text: str) -> set[str]:
    """Word 3-grams of the normalised text; a text of one or two words is its own only gram."""
    words = normalise(text).split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def near_duplicates(texts: Sequence[str], threshold: float = THRESHOLD) -> pd.DataFrame:
    """Every pair left < right of texts with word-3-gram Jaccard >= threshold: columns `left, right,
    jaccard`, in the order of the texts.

    Exact, by prefix filtering (Chaudhuri et al., ICDE 2006): of n grams, two texts at or above the
    threshold share one of each's rarest n - ceil(threshold·n) + 1. Only texts that do are compared,
    those of a few hundred left texts at once, to bound memory.
    """
    if not texts:
        return pd.DataFrame(columns=["left", "right", "jaccard"], dtype=int)
    exploded = pd.Series([word_trigrams(text) for text in texts]).explode()
    text, gram = exploded.index.to_numpy(), exploded.factorize()[0]
    sizes = np.bincount(text)
    grams = sparse.csr_array((np.ones(len(text), np.int32), (text, gram)))
    rarest_first = np.lexsort((gram, np.bincount(gram)[gram], text))
    place = np.arange(len(text)) - grams.indptr[text]
    kept = rarest_first[place <= (sizes - np.ceil(threshold * sizes - 1e-9))[text]]
    entries = (np.ones(len(kept), np.int32), (text[kept], gram[kept]))
    prefixes = sparse.csr_array(entries, shape=grams.shape)
    by_gram, found = prefixes.T.tocsr(), []
    for start in range(0, len(texts), _CHUNK):
        candidates = (prefixes[start : start + _CHUNK] @ by_gram).tocoo()
        later = candidates.row + start < candidates.col
        left, right = candidates.row[later] + start, candidates.col[later]
        shared = grams[left].multiply(grams[right]).sum(axis=1)
        jaccard = shared / (sizes[left] + sizes[right] - shared)
        pairs = pd.DataFrame({"left": left, "right": right, "jaccard": jaccard})
        found.append(pairs[jaccard >= threshold])
    return pd.concat(found).sort_values(["left", "right"], ignore_index=True)


def near_duplicate_groups(texts: Sequence[str], owners: Sequence[int], count: int) -> np.ndarray:
    """A group number for each of `count` owners; owners of near-duplicate texts, directly or
    through others, share it.

    `owners[i]` is the owner of `texts[i]`: a row of a file owns its prompt and its benign prompt.
    """
    pairs, owner = near_duplicates(texts), np.asarray(owners, dtype=int)
    links = (owner[pairs["left"]], owner[pairs["right"]])
    graph = sparse.coo_array((np.ones(len(pairs)), links), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def find_overlaps(records: pd.DataFrame) -> pd.DataFrame:
    """Pairs of records, of different splits or sources, that are exact or near-duplicates.

    Columns: `left, right` (positions in `records`), `jaccard`, `exact`, and `across_splits`.
    Prompts that fill a form on purpose, of one skill ("What is the opposite of ...?") or of one
    template of the user's file, only count where they match exactly.
    """
    facts = records[["split", "source", "role"]].assign(
        text=records["prompt"].map(normalise), template=records["group_id"].map(template_of)
    )
    pairs = near_duplicates(records["prompt"].tolist())
    left, right = (facts.iloc[pairs[side]].reset_index(drop=True) for side in ("left", "right"))
    same, skills = left == right, (left["role"] == "utility") | (right["role"] == "utility")
    pairs = pairs.assign(exact=same["text"], across_splits=~same["split"])
    form = skills | (same["template"] & (left["template"] != ""))
    apart = ~(same["split"] & same["source"])
    return pairs[apart & (pairs["exact"] | ~form)].reset_index(drop=True)


def leaking_rows(records: pd.DataFrame, overlaps: pd.DataFrame) -> pd.DataFrame:
    """The rows that must go so that no two splits overlap: columns `row, kept` (positions), the row
    and its match.
    """
    rank = records["split"].map(KEEP_ORDER.index).to_numpy()
    pairs = overlaps.loc[overlaps["across_splits"], ["left", "right"]].to_numpy(dtype=int)
    kept, gone = np.take_along_axis(pairs, np.argsort(rank[pairs], axis=1), axis=1).T
    leaks = pd.DataFrame({"row": gone, "kept": kept, "rank": rank[kept]})
    leaks = leaks.sort_values(["row", "rank"]).drop_duplicates("row")
    return leaks[["row", "kept"]].reset_index(drop=True)
