"""Duplicates and near-duplicates: a prompt that leaks from one split, or one source, into
another."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer

from cdelta.policy.records import normalise

THRESHOLD = 0.5
"""Jaccard similarity of word 3-grams from which two prompts count as near-duplicates."""
KEEP_ORDER = ("test", "val", "discover", "edit")
"""Of two leaking rows the one whose split comes first stays: the test set remains comparable with
published numbers, and training rows, of which there are most, give way."""
TEMPLATE_MARK = " | differs in: "
"""In a group's name: its prompts fill a template and are grouped by the words in which they
differ."""
_CHUNK = 4096


def template_of(group: str) -> str:
    """The template that a group's prompts fill with words of their own; empty for other groups."""
    name, mark, _ = group.partition(TEMPLATE_MARK)
    return name if mark else ""


def word_trigrams(text: str) -> set[str]:
    """Word 3-grams of the normalised text; a text of one or two words is its own only gram."""
    words = normalise(text).split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def trigram_matrix(texts: Sequence[str]) -> sparse.csr_array:
    """Binary incidence [text, 3-gram] with the rarest 3-grams first."""
    counted = CountVectorizer(analyzer=word_trigrams, dtype=np.int32).fit_transform(texts)
    by_rarity = np.argsort(np.asarray(counted.sum(axis=0)).ravel(), kind="stable")
    matrix = sparse.csr_array(counted[:, by_rarity])
    matrix.sort_indices()
    return matrix


def _prefixes(grams: sparse.csr_array, threshold: float) -> sparse.csr_array:
    """The rarest n - ceil(threshold·n) + 1 grams of each row: two rows at or above the threshold
    share one of them.
    """
    sizes = np.diff(grams.indptr)
    keep = sizes - np.ceil(threshold * sizes - 1e-9).astype(int) + 1
    position = np.arange(grams.nnz) - np.repeat(grams.indptr[:-1], sizes)
    inside = position < np.repeat(keep, sizes)
    indptr = np.concatenate([[0], np.cumsum(np.minimum(keep, sizes))])
    return sparse.csr_array((grams.data[inside], grams.indices[inside], indptr), shape=grams.shape)


def near_duplicates(texts: Sequence[str], threshold: float = THRESHOLD) -> pd.DataFrame:
    """Every pair left < right of texts with word-3-gram Jaccard >= threshold: columns `left, right,
    jaccard`, in the order of the texts.

    Exact, by prefix filtering (Chaudhuri et al., ICDE 2006): only pairs that share a rare 3-gram
    are compared.
    """
    if not len(texts):
        whole = {"left": int, "right": int, "jaccard": float}
        return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in whole.items()})
    grams = trigram_matrix(texts)
    prefixes = _prefixes(grams, threshold)
    by_gram = prefixes.T.tocsr()
    found = [
        _pairs_of_chunk(grams, prefixes, by_gram, start, threshold)
        for start in range(0, len(texts), _CHUNK)
    ]
    return pd.concat(found).sort_values(["left", "right"], ignore_index=True)


def _pairs_of_chunk(
    grams: sparse.csr_array,
    prefixes: sparse.csr_array,
    by_gram: sparse.csr_array,
    start: int,
    threshold: float,
) -> pd.DataFrame:
    """Pairs whose left text lies in the chunk that begins at `start`."""
    candidates = (prefixes[start : start + _CHUNK] @ by_gram).tocoo()
    left, right = candidates.row + start, candidates.col
    sizes = np.diff(grams.indptr)
    small, large = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
    possible = (left < right) & (small >= threshold * large)
    left, right = left[possible], right[possible]
    shared = _shared(grams, left, right)
    jaccard = shared / (sizes[left] + sizes[right] - shared)
    hit = jaccard >= threshold
    return pd.DataFrame({"left": left[hit], "right": right[hit], "jaccard": jaccard[hit]})


def _shared(
    grams: sparse.csr_array, left: np.ndarray, right: np.ndarray, at_once: int = 10**6
) -> np.ndarray:
    """How many 3-grams two rows share, for every pair; a million pairs at once, to bound memory."""
    parts = [
        grams[left[i : i + at_once]].multiply(grams[right[i : i + at_once]]).sum(axis=1)
        for i in range(0, max(1, len(left)), at_once)
    ]
    return np.concatenate([np.asarray(part).ravel() for part in parts])


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
        Prompts
    that fill a form on purpose, of one skill ("What is the opposite of ...?") or of one template of
    the user's file, only count where they match exactly.
    """
    pairs = near_duplicates(records["prompt"].tolist())
    left, right = pairs["left"].to_numpy(), pairs["right"].to_numpy()
    columns = {name: records[name].to_numpy(dtype=object) for name in ("split", "source", "role")}
    columns["text"] = np.array([normalise(p) for p in records["prompt"].tolist()], dtype=object)
    columns["template"] = np.array([template_of(g) for g in records["group_id"]], dtype=object)
    same = {name: column[left] == column[right] for name, column in columns.items()}
    pairs["exact"] = same["text"]
    pairs["across_splits"] = ~same["split"].astype(bool)
    skill = (columns["role"][left] == "utility") | (columns["role"][right] == "utility")
    form = skill | (same["template"] & (columns["template"][left] != ""))
    apart = ~(same["split"] & same["source"]).astype(bool)
    return pairs[apart & (pairs["exact"] | ~form.astype(bool))].reset_index(drop=True)


def leaking_rows(records: pd.DataFrame, overlaps: pd.DataFrame) -> pd.DataFrame:
    """The rows that must go so that no two splits overlap: columns `row, kept` (positions), the row
    and its match.
    """
    rank = records["split"].map(KEEP_ORDER.index).to_numpy()
    leaks = overlaps[overlaps["across_splits"]]
    left, right = leaks["left"].to_numpy(), leaks["right"].to_numpy()
    left_goes = rank[left] > rank[right]
    pairs = pd.DataFrame(
        {"row": np.where(left_goes, left, right), "kept": np.where(left_goes, right, left)}
    )
    pairs = pairs.sort_values(
        ["row", "kept"], key=lambda rows: rows if rows.name == "row" else rank[rows]
    )
    return pairs.drop_duplicates("row").reset_index(drop=True)
