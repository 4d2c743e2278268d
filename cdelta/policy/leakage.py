"""Duplicates and near-duplicates: a prompt that leaks from one split, or one source, into another."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from cdelta.policy.records import normalise

THRESHOLD = 0.5
"""Jaccard similarity of word 3-grams from which two prompts count as near-duplicates."""
KEEP_ORDER = ("test", "val", "discover", "edit")
"""Of two leaking rows the one whose split comes first stays: the test set remains comparable with published numbers,
and training rows, of which there are most, give way."""
_CHUNK = 4096


def word_trigrams(text: str) -> set[str]:
    """Word 3-grams of the normalised text; a text of one or two words is its own only gram."""
    words = normalise(text).split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def trigram_matrix(texts: list[str]) -> sparse.csr_array:
    """Binary incidence [text, 3-gram] with the rarest 3-grams first."""
    vocabulary: dict[str, int] = {}
    rows = [
        [vocabulary.setdefault(gram, len(vocabulary)) for gram in word_trigrams(text)]
        for text in texts
    ]
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    columns = np.fromiter(
        (gram for row in rows for gram in row), dtype=np.int64, count=lengths.sum()
    )
    counts = np.bincount(columns, minlength=len(vocabulary))
    rank = np.empty_like(counts)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    matrix = sparse.csr_array(
        (np.ones(len(columns), np.int32), rank[columns], indptr),
        shape=(len(texts), len(vocabulary)),
    )
    matrix.sort_indices()
    return matrix


def _prefixes(grams: sparse.csr_array, threshold: float) -> sparse.csr_array:
    """The rarest n - ceil(threshold·n) + 1 grams of each row: two rows at or above the threshold share one of them."""
    sizes = np.diff(grams.indptr)
    keep = sizes - np.ceil(threshold * sizes - 1e-9).astype(int) + 1
    position = np.arange(grams.nnz) - np.repeat(grams.indptr[:-1], sizes)
    inside = position < np.repeat(keep, sizes)
    indptr = np.concatenate([[0], np.cumsum(np.minimum(keep, sizes))])
    return sparse.csr_array((grams.data[inside], grams.indices[inside], indptr), shape=grams.shape)


def near_duplicates(texts: list[str], threshold: float = THRESHOLD) -> pd.DataFrame:
    """Every pair left < right of texts with word-3-gram Jaccard >= threshold: columns `left, right, jaccard`.

    Exact, by prefix filtering (Chaudhuri et al., ICDE 2006): only pairs that share a rare 3-gram are compared.
    """
    if not texts:
        return pd.DataFrame({"left": [], "right": [], "jaccard": []}).astype(
            {"left": int, "right": int}
        )
    grams = trigram_matrix(texts)
    prefixes = _prefixes(grams, threshold)
    by_gram = prefixes.T.tocsr()
    found = [
        _pairs_of_chunk(grams, prefixes, by_gram, start, threshold)
        for start in range(0, len(texts), _CHUNK)
    ]
    return pd.concat(found, ignore_index=True)


def _pairs_of_chunk(grams, prefixes, by_gram, start: int, threshold: float) -> pd.DataFrame:
    """Pairs whose left text lies in the chunk that begins at `start`."""
    candidates = (prefixes[start : start + _CHUNK] @ by_gram).tocoo()
    left, right = candidates.row + start, candidates.col
    sizes = np.diff(grams.indptr)
    small, large = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
    possible = (left < right) & (small >= threshold * large)
    left, right = left[possible], right[possible]
    shared = np.concatenate(
        [
            _shared(grams, left[i : i + 10**6], right[i : i + 10**6])
            for i in range(0, max(1, len(left)), 10**6)
        ]
    )
    jaccard = shared / (sizes[left] + sizes[right] - shared)
    hit = jaccard >= threshold
    return pd.DataFrame({"left": left[hit], "right": right[hit], "jaccard": jaccard[hit]})


def _shared(grams: sparse.csr_array, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.asarray(grams[left].multiply(grams[right]).sum(axis=1)).ravel()


def near_duplicate_groups(texts: list[str], owners: list[int], count: int) -> np.ndarray:
    """A group number for each of `count` owners; owners of near-duplicate texts, directly or through others, share it.

    `owners[i]` is the owner of `texts[i]`: a row of a file owns its prompt and its benign prompt.
    """
    pairs, owner = near_duplicates(texts), np.asarray(owners, dtype=int)
    links = (owner[pairs["left"]], owner[pairs["right"]])
    return connected_components(
        sparse.coo_array((np.ones(len(pairs)), links), shape=(count, count)), directed=False
    )[1]


def find_overlaps(records: pd.DataFrame) -> pd.DataFrame:
    """Pairs of records, of different splits or sources, that are exact or near-duplicates of each other.

    Columns: `left, right` (positions in `records`), `jaccard`, `exact`, and `across_splits`. Utility prompts fill a
    question form on purpose ("What is the opposite of ...?"), so among them only exact matches count.
    """
    pairs = near_duplicates(records["prompt"].tolist())
    text = np.array([normalise(p) for p in records["prompt"].tolist()], dtype=object)
    column = {name: records[name].to_numpy(dtype=object) for name in ("split", "source", "role")}
    left, right = pairs["left"].to_numpy(), pairs["right"].to_numpy()
    differs = {name: column[name][left] != column[name][right] for name in ("split", "source")}
    pairs["exact"] = text[left] == text[right]
    pairs["across_splits"] = differs["split"]
    skill = (column["role"][left] == "utility") | (column["role"][right] == "utility")
    return pairs[(differs["split"] | differs["source"]) & (pairs["exact"] | ~skill)].reset_index(
        drop=True
    )


def leaking_rows(records: pd.DataFrame, overlaps: pd.DataFrame) -> pd.DataFrame:
    """The rows that must go so that no two splits overlap: columns `row, kept` (positions), the row and its match."""
    rank = records["split"].map(KEEP_ORDER.index).to_numpy()
    leaks = overlaps[overlaps["across_splits"]]
    left, right = leaks["left"].to_numpy(), leaks["right"].to_numpy()
    left_goes = rank[left] > rank[right]
    pairs = pd.DataFrame(
        {"row": np.where(left_goes, left, right), "kept": np.where(left_goes, right, left)}
    )
    return pairs.drop_duplicates("row").sort_values("row", ignore_index=True)
