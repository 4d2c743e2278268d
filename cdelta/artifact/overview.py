"""What notebook 01 shows of a policy: tables and arrays, no figures. Third-party harmful prompts appear shortened."""

from __future__ import annotations

from typing import Mapping, Sequence

import numpy as np
import pandas as pd

from cdelta.attribution.metrics import (
    Metric,
)
from cdelta.attribution.scores import RULES, Scores, attribute
from cdelta.errors import CdeltaError
from cdelta.evaluation.classifiers import taught_labels, xstest_labels
from cdelta.models.chat import chat_ids
from cdelta.policy.build import Policy
from cdelta.policy.leakage import find_overlaps
from cdelta.policy.pairs import pair_yield
from cdelta.policy.records import SPLITS, SplitRows, normalise
from cdelta.policy.sources import SOURCES

pass
from cdelta.policy.pairs import PairYield, PromptPairs
from cdelta.policy.sources import SourceUnavailable

KEYWORDS: dict[str, tuple[str, ...]] = {
    "crime": ("crim", "illeg", "illicit", "unlawful", "heist", "theft", "steal", "rob", "smuggl", "fraud", "scam", "hack", "launder", "covert",
              "clandestine", "espionage", "sabotage", "conspir", "plot", "attack", "malicious", "murder", "kidnap", "assassin", "bomb", "weapon",
              "break in", "break into", "burgl", "counterfeit", "forge", "extort", "blackmail", "bribe", "hijack", "vandal", "loot", "embezzl",
              "swindl", "plunder", "exploit", "evade", "undetect", "infiltrat", "cyber", "mafia", "gang", "thief", "traffick", "black market"),
    "hate": ("hate", "hateful", "derog", "racis", "racial", "discriminat", "bigot", "slur", "offensive", "insult", "mock", "demean", "prejudic",
             "stereotyp", "xenophob", "sexis", "misogyn", "homophob", "antisemit", "degrad", "scorn", "contempt", "spite", "slander", "hostil",
             "venom", "sneer", "vicious", "inflammatory", "minorit", "inferior", "intoleran", "abus", "harass", "denigrat", "disparag", "belittl",
             "ridicul", "supremac", "toxic", "disrespect"),
    "health": ("health", "medic", "medicin", "patient", "symptom", "diagnos", "treat", "disease", "doctor", "therap", "drug", "dose", "dosage",
               "prescri", "illness", "cure", "surg", "hospital", "clinic", "nutrition", "diet", "pain", "vaccin", "antibiotic", "sedative", "steroid",
               "opioid", "insulin", "remed", "disorder", "condition", "physician", "wellness", "stimulant", "laxative", "morphine", "statin",
               "antidepressant", "tranquilizer", "diuretic", "antihistamine", "penicillin", "supplement", "injur"),
    "legal": ("legal", "law", "court", "lawsuit", "sue", "contract", "attorney", "litigat", "judge", "judicia", "statut", "regulat", "rights", "liab",
              "clause", "copyright", "trademark", "patent", "prosecut", "convict", "verdict", "defend", "plaintiff", "evict", "indict", "subpoena",
              "depose", "arraign", "impeach", "extradit", "disinherit", "divorce", "bankrupt", "arrest", "acquit", "constitution", "compliance",
              "settlement", "jurisdiction", "custody", "will", "testament", "case", "countersu"),
    "sexual": ("sex", "erotic", "intima", "sensual", "lewd", "seduc", "porn", "nude", "naked", "explicit", "adult", "kink", "fetish", "lust", "romantic",
               "provocative", "risque", "raunch", "bawdy", "steamy", "naughty", "racy", "titillat", "salacious", "passion", "arous", "flirt", "desire",
               "suggestive", "taboo", "love", "lingerie", "orgas", "bedroom", "affair"),
}  # fmt: skip
"""Beginnings of words that a prompt of the category can be expected to contain one of; a list of ours, for an audit only."""


def counts_table(records: pd.DataFrame) -> pd.DataFrame:
    """Prompts per source, category and role (rows) and split (columns)."""
    table = records.pivot_table(
        index=["source", "category", "role"],
        columns="split",
        values="id",
        aggfunc="count",
        fill_value=0,
    )
    return table.reindex(columns=[s for s in SPLITS if s in table], fill_value=0).astype(int)


def dropped_table(policy: Policy) -> pd.DataFrame:
    """Per source, category and split: what was read, what was dropped for which reason, and what was kept."""
    counted = policy.report[policy.report["split"] != ""]
    table = counted.pivot_table(
        index=["source", "category", "split"],
        columns="step",
        values="rows",
        aggfunc="sum",
        fill_value=0,
    )
    reasons = [step for step in table if step not in ("read", "kept")]
    return table[["read", *reasons, "kept"]].astype(int)


def sources_table(policy: Policy) -> pd.DataFrame:
    """One line per source: revision and whether we pinned it, licence, gating, rows kept, what was not selected or why it was skipped."""
    known = {source["source"]: source for source in policy.manifest["sources"]}
    whole = policy.report[policy.report["split"] == ""]
    notes = {
        row.source: f"{row.step}: {row.rows} rows other than {row.detail}"
        for row in whole.itertuples()
        if row.rows
    }
    facts = lambda name: {key: known[name].get(key, False) for key in ("pinned", "gated")}
    kept = [
        row | facts(row["source"]) | {"note": notes.get(row["source"], "")}
        for row in policy.manifest["contents"]
    ]
    skipped = [
        {"source": row.source, "source_revision": SOURCES[row.source].revision, "license": SOURCES[row.source].license, "rows": 0,
         "pinned": True, "gated": SOURCES[row.source].gated, "note": row.detail}
        for row in whole[whole["step"] == "skipped"].itertuples()
    ]  # fmt: skip
    return pd.DataFrame(kept + skipped)


def token_lengths(records: pd.DataFrame, tok) -> pd.DataFrame:
    """Token length of every prompt under the chat template: columns `category, role, split, tokens`."""
    lengths = [len(chat_ids(tok, prompt)) for prompt in records["prompt"]]
    return records[["category", "role", "split"]].assign(tokens=lengths).reset_index(drop=True)


def overlap_matrix(policy: Policy) -> pd.DataFrame:
    """Rows of one source and split (row) that are exact or near-duplicates of a row of another (column).

    Leaking rows that the build dropped count as well: the matrix shows the data as they came.
    """
    columns = ["prompt", "source", "split", "role"]
    leaked = policy.dropped[policy.dropped["reason"].str.startswith("near-duplicate")]
    rows = pd.concat([policy.records[columns], leaked[columns]], ignore_index=True)
    name = (rows["source"] + " " + rows["split"]).to_numpy(dtype=object)
    overlaps = find_overlaps(rows)
    pairs = np.concatenate(
        [overlaps[["left", "right"]].to_numpy(), overlaps[["right", "left"]].to_numpy()]
    )
    hits = pd.DataFrame(
        {"row": pairs[:, 0], "of": name[pairs[:, 0]], "in": name[pairs[:, 1]]}
    ).drop_duplicates()
    names = sorted(
        set(name), key=lambda n: (n.rsplit(" ", 1)[0], SPLITS.index(n.rsplit(" ", 1)[1]))
    )
    counts = (
        hits.groupby(["of", "in"])
        .size()
        .unstack(fill_value=0)
        .reindex(index=names, columns=names, fill_value=0)
        .astype(int)
    )
    return counts.rename_axis(index="rows of", columns="that nearly repeat one of")


def tokenizers(tok, prompts: Sequence[str], vocabulary: int = 1000) -> dict[str, object]:
    """Tokenizers to compare yields under: the model's own, a byte-level BPE trained on `prompts`, and GPT-2's where it is in the local cache."""
    import tokenizers as hf
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    bpe, bytes_first = (
        hf.Tokenizer(hf.models.BPE()),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    bpe.pre_tokenizer = bytes_first
    bpe.train_from_iterator(
        prompts,
        hf.trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=bytes_first.alphabet(), show_progress=False
        ),
    )
    special = {
        name: getattr(tok, name) for name in ("bos_token", "eos_token") if getattr(tok, name, None)
    }
    found = {
        "the model's own": tok,
        f"BPE of {vocabulary} trained here": PreTrainedTokenizerFast(
            tokenizer_object=bpe, **special
        ),
    }
    try:
        found["GPT-2"] = AutoTokenizer.from_pretrained(
            "openai-community/gpt2", local_files_only=True
        )
    except OSError:
        pass  # not downloaded here: two will do
    for other in found.values():
        other.chat_template = tok.chat_template
    return found


def pair_yields(
    policy: Policy,
    tokenizers: Mapping[str, object],
    splits: Sequence[str] = ("discover", "edit", "val"),
) -> pd.DataFrame:
    """Pairs of equal token length per tokenizer, category and split: the columns of `PairYield.as_dict` and `tokenizer`."""
    cells = [
        (c, s, policy.select(split=s, category=c, role=("target", "benign"), ood_set=""))
        for c in policy.categories
        for s in splits
    ]
    return pd.DataFrame(
        {"tokenizer": name} | pair_yield(rows, tok).as_dict() | {"category": c, "split": s}
        for name, tok in tokenizers.items() for c, s, rows in cells
    )  # fmt: skip


def shorten(prompt: str, words: int = 8) -> str:
    """The first words of a prompt."""
    found = prompt.split()
    return " ".join(found[:words]) + (" ..." if len(found) > words else "")


def example_pairs(policy: Policy, count: int = 2, split: str = "discover") -> pd.DataFrame:
    """The first pairs of each category: columns `category, prompt, benign, source`; harmful third-party text is shortened."""
    rows = policy.records[(policy.records["split"] == split) & (policy.records["pair_id"] != "")]
    targets, benign = rows[rows["role"] == "target"], rows[rows["role"] == "benign"]
    benign = benign.drop_duplicates("pair_id")[["pair_id", "prompt"]].rename(
        columns={"prompt": "benign"}
    )
    pairs = targets.merge(benign, on="pair_id").groupby("category").head(count)
    hidden = pairs["source"].isin(list(SOURCES))
    pairs = pairs.assign(
        prompt=[shorten(p) if hide else p for p, hide in zip(pairs["prompt"], hidden)]
    )
    return pairs[["category", "prompt", "benign", "source"]].sort_values(
        "category", kind="stable", ignore_index=True
    )


def keyword_audit(records: pd.DataFrame) -> pd.DataFrame:
    """Share of a category's target prompts that contain no keyword of it: columns `category, rows, without, share`.

    A high share means label noise, or a keyword list that does not fit: read the rows before trusting either.
    """
    targets = records[(records["role"] == "target") & records["category"].isin(KEYWORDS)]
    lacks = [not has_keyword(p, c) for p, c in zip(targets["prompt"], targets["category"])]
    counts = (
        targets.assign(lacks=lacks)
        .groupby("category")["lacks"]
        .agg(rows="size", without="sum")
        .reset_index()
    )
    return counts.assign(share=counts["without"] / counts["rows"])


def has_keyword(prompt: str, category: str) -> bool:
    """Whether a word of the prompt begins with one of the category's keywords."""
    words = f" {normalise(prompt)}"
    return any(f" {key}" in words for key in KEYWORDS[category])


def nearest_neighbour_accuracy(train_rows: SplitRows, test_rows: SplitRows) -> float:
    """How often the nearest training prompt has the test prompt's `expected`: TF-IDF of words and word pairs, cosine.

    What a lookup could do. An out-of-distribution set on which this reaches 1 tests nothing.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import KNeighborsClassifier

    if not len(train_rows) or not len(test_rows):
        raise CdeltaError(
            "the nearest-neighbour baseline needs training and test rows: the selection is empty."
        )
    features = TfidfVectorizer(preprocessor=normalise, token_pattern=r"\S+", ngram_range=(1, 2))
    expected = lambda rows: [row["expected"] for row in rows]
    classifier = KNeighborsClassifier(1, metric="cosine", algorithm="brute")
    classifier.fit(features.fit_transform(train_rows.prompts), expected(train_rows))
    return float(classifier.score(features.transform(test_rows.prompts), expected(test_rows)))


def ood_baseline(policy: Policy) -> pd.DataFrame:
    """The nearest-neighbour baseline, from the edit split, per category and test set: `category, ood_set, rows, accuracy`.

    The set "" holds the in-distribution test rows. Borderline prompts are predicted like all others.
    """
    roles = ("target", "benign", "borderline")
    train = {c: policy.select(split="edit", category=c, role=roles) for c in policy.categories}
    sets = sorted(policy.records.loc[policy.records["split"] == "test", "ood_set"].unique())
    cells = [
        (c, s, policy.select(split="test", category=c, role=role, ood_set=s), role)
        for c in policy.categories
        for s in sets
        for role in roles
    ]
    return pd.DataFrame(
        {"category": c, "ood_set": s, "role": role, "rows": len(rows), "accuracy": nearest_neighbour_accuracy(train[c], rows)}
        for c, s, rows, role in cells if len(rows)
    )  # fmt: skip


def first_prompts(records: pd.DataFrame, found: PairYield) -> tuple[str, str]:
    """The first pair's two prompts, shortened."""
    prompts = records.drop_duplicates("id").set_index("id")["prompt"]
    return tuple(shorten(prompts[id], 9) for id in found.ids[0])


def seen_pairs(
    records: pd.DataFrame, base: pd.DataFrame, tok, category: str, most: int = 30
) -> pd.DataFrame:
    """What the model sees and says for one category: ``role, tokens, differs, outcome, answer``, a target and its twin after each other.

    One pair per outcome of the target (refusals first, at most two), outside of the test split. `differs` marks the tokens that the other
    prompt does not have. At most `most` tokens and a dozen words of the answer: the text may be a third party's.
    """
    rows = records[(records["split"] != "test") & (records["pair_id"] != "")].merge(
        base[["id", "outcome", "answer"]], on="id"
    )
    twins = rows[rows["role"] == "benign"].drop_duplicates("pair_id").set_index("pair_id")
    targets = rows[
        (rows["role"] == "target")
        & (rows["category"] == category)
        & rows["pair_id"].isin(twins.index)
    ]
    chosen = (
        targets.drop_duplicates("outcome")
        .sort_values("outcome", ascending=False, ignore_index=True)
        .head(2)
    )
    found = []
    for target in chosen.to_dict("records"):
        sides = [target, twins.loc[target["pair_id"]]]
        tokens = [[tok.decode([i]) for i in chat_ids(tok, side["prompt"])] for side in sides]
        for side, own, other in zip(sides, tokens, tokens[::-1]):
            shown = own[:most] + ["…"] * (len(own) > most)
            found.append(
                {
                    "role": side["role"],
                    "tokens": shown,
                    "differs": [token not in (*other, "…") for token in shown],
                    "outcome": side["outcome"],
                    "answer": shorten(side["answer"], 12),
                }
            )
    return pd.DataFrame(found, columns=["role", "tokens", "differs", "outcome", "answer"])


def labelled_answers(run, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Answers whose label is known, per data set: the embedded model's own, and XSTest's completions where they can be had (those on which our
    phrases were not chosen); prints why not."""
    found = {}
    if run.settings.model == "organism" and run.settings.policy == "synthetic":
        found["embedded set"] = taught_labels(rows)
    try:
        human = xstest_labels(run.settings.evaluation.labels)
        found["XSTest"] = human[~human["tuned"]]
    except SourceUnavailable as error:
        print(f"without human labels: {error}")
    return found


def edge_table(exact: Scores, estimate: Scores) -> pd.DataFrame:
    """Every edge that exists, with the scores of two runs: ``source, reader, reader class, exact, estimate``."""
    rows = [
        (u, v)
        for u in range(len(exact.sources))
        for v in range(len(exact.readers))
        if exact.edges[u, v] != 0 or estimate.edges[u, v] != 0
    ]
    kind = lambda reader: (
        f"head {reader[-2]}" if reader.endswith(">") else "logits" if reader == "logits" else "MLP"
    )
    return pd.DataFrame(
        {"source": exact.sources[u], "reader": exact.readers[v], "reader class": kind(exact.readers[v]), "exact": exact.edges[u, v].item(),
         "estimate": estimate.edges[u, v].item()}
        for u, v in rows
    )  # fmt: skip


def strongest(scores: Scores, n: int) -> pd.DataFrame:
    """The `n` edges of largest size: ``source, reader, score``, strongest first."""
    chosen = scores.edges.abs().flatten().topk(n).indices.tolist()
    places = [divmod(i, len(scores.readers)) for i in chosen]
    return pd.DataFrame(
        [
            {
                "source": scores.sources[u],
                "reader": scores.readers[v],
                "score": scores.edges[u, v].item(),
            }
            for u, v in places
        ]
    )


def convergence(
    model, pairs: PromptPairs, metric: Metric, steps: Sequence[int]
) -> tuple[pd.DataFrame, Scores]:
    """Quadrature errors of EAP, clean-corrupted and EAP-IG under each rule: ``method, gradients, completeness, edges``; and the reference.

    `completeness` is `Scores.completeness_error`; `edges` the L2 distance of all edge scores from those of the reference (midpoint, twice
    the most steps), relative to its size. `gradients` counts gradient steps per pair.
    """
    fine = attribute(model, pairs, metric, steps=2 * max(steps))
    runs = [(f"EAP-IG {rule}", n, dict(rule=rule, steps=n)) for rule in RULES for n in steps]
    runs += [("EAP", 1, dict(method="eap")), ("clean-corrupted", 2, dict(method="clean-corrupted"))]
    found = []
    for name, gradients, how in runs:
        scores = attribute(model, pairs, metric, **how)
        distance = ((scores.edges - fine.edges).norm() / fine.edges.norm()).item()
        found.append(
            {
                "method": name,
                "gradients": gradients,
                "completeness": scores.completeness_error,
                "edges": distance,
            }
        )
    return pd.DataFrame(found), fine
