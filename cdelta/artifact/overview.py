"""What notebooks 00 to 02 show of the model and its prompts: tables, no figures.

Third-party harmful prompts appear shortened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from cdelta.attribution.metrics import Metric, SequenceMetric
from cdelta.attribution.scores import RULES, Scores, attribute
from cdelta.evaluation.classifiers import taught_labels, xstest_labels
from cdelta.evaluation.rates import rates, with_kind
from cdelta.files import read_toml
from cdelta.models.chat import chat_ids
from cdelta.models.spec import ModelSpec
from cdelta.policy.build import Policy
from cdelta.policy.leakage import find_overlaps
from cdelta.policy.pairs import PairYield, PromptPairs, pair_yield
from cdelta.policy.records import SPLITS, normalise
from cdelta.policy.sources import SOURCES
from cdelta.policy.upstream import SourceUnavailable

# ---------------------------------------------------------------------- the subject


def model_facts(name: str, model, tok) -> pd.DataFrame:
    """A model's sizes: ``property, value``."""
    spec = ModelSpec.from_model(model)
    facts = {
        "model": name,
        "family": spec.family,
        "parameters": f"{spec.n_params:,}",
        "layers": spec.n_layers,
        "heads": spec.n_heads,
        "kv groups": spec.n_kv,
        "head width": spec.head_dim,
        "MLP neurons per layer": spec.d_mlp,
        "vocabulary": f"{len(tok):,}",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return pd.DataFrame(facts.items(), columns=["property", "value"]).astype(str)


def as_the_model_sees(tok, prompt: str) -> str:
    """A prompt in the chat template, special tokens included."""
    return tok.decode(chat_ids(tok, prompt))


def sample_answers(rows: pd.DataFrame, words: int = 25) -> pd.DataFrame:
    """The first answer per category and kind of prompt, both shortened: ``category, kind, prompt,
    answer, outcome``.
    """
    shown = rows.groupby(["category", "kind"], sort=False).head(1)
    return pd.DataFrame(
        {
            "category": shown["category"],
            "kind": shown["kind"],
            "prompt": [shorten(prompt, 12) for prompt in shown["prompt"]],
            "answer": [shorten(answer, words) for answer in shown["answer"]],
            "outcome": shown["outcome"],
        }
    ).reset_index(drop=True)


def base_kinds(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the base with their kind; a category's own harm is its target."""
    kinds = with_kind(rows, "")
    return kinds.assign(kind=kinds["kind"].replace("other", "target"))


def base_refusal(rows: pd.DataFrame) -> pd.DataFrame:
    """Refusal by the base, per ``category, kind`` of prompt: ``rate, low, high, n``."""
    policy = base_kinds(rows).query("kind != 'skills'").reset_index(drop=True)
    return rates(policy["outcome"] == "refuse", policy, ["category", "kind"])


# ---------------------------------------------------------------------- the policy


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
    """Per source, category and split: what was read, what was dropped for which reason, and what
    was kept.
    """
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
    """One line per source: revision and whether we pinned it, licence, gating, rows kept, what was
    not selected or why it was skipped.
    """
    known = {source["source"]: source for source in policy.manifest["sources"]}
    whole = policy.report[policy.report["split"] == ""]
    notes = {
        row.source: f"{row.step}: {row.rows} rows other than {row.detail}"
        for row in whole.itertuples()
        if row.rows
    }
    kept = []
    for row in policy.manifest["contents"]:
        name = row["source"]
        facts = {key: known[name].get(key, False) for key in ("pinned", "gated")}
        kept.append(row | facts | {"note": notes.get(name, "")})
    skipped = [
        {
            "source": row.source,
            "source_revision": SOURCES[row.source].revision,
            "license": SOURCES[row.source].license,
            "rows": 0,
            "pinned": True,
            "gated": SOURCES[row.source].gated,
            "note": row.detail,
        }
        for row in whole[whole["step"] == "skipped"].itertuples()
    ]
    return pd.DataFrame(kept + skipped)


def overlap_matrix(policy: Policy) -> pd.DataFrame:
    """Rows of one source and split (row) that are exact or near-duplicates of a row of another
    (column).

    Leaking rows that the build dropped count as well: the matrix shows the data as they came.
    """
    columns = ["prompt", "source", "split", "role", "group_id"]
    leaked = policy.dropped[policy.dropped["reason"].str.startswith("near-duplicate")]
    leaked = leaked.reindex(columns=columns, fill_value="")
    rows = pd.concat([policy.records[columns], leaked], ignore_index=True)
    name = (rows["source"] + " " + rows["split"]).to_numpy(dtype=object)
    found = find_overlaps(rows)
    both = [found[["left", "right"]].to_numpy(), found[["right", "left"]].to_numpy()]
    pairs = np.concatenate(both)
    hits = pd.DataFrame({"row": pairs[:, 0], "of": name[pairs[:, 0]], "in": name[pairs[:, 1]]})
    counts = hits.drop_duplicates().groupby(["of", "in"]).size().unstack(fill_value=0)
    names = sorted(set(name), key=_by_split)
    counts = counts.reindex(index=names, columns=names, fill_value=0).astype(int)
    return counts.rename_axis(index="rows of", columns="that nearly repeat one of")


def _by_split(name: str) -> tuple[str, int]:
    source, split = name.rsplit(" ", 1)
    return source, SPLITS.index(split)


def tokenizers(tok, prompts: Sequence[str], vocabulary: int = 1000) -> dict[str, object]:
    """Tokenizers to compare yields under: the model's own, a byte-level BPE trained on `prompts`,
    and GPT-2's where it is in the local cache.
    """
    from transformers import AutoTokenizer

    found = {"the model's own": tok}
    found[f"BPE of {vocabulary} trained here"] = _trained_bpe(tok, prompts, vocabulary)
    with suppress(OSError):  # not downloaded here: two will do
        known = AutoTokenizer.from_pretrained("openai-community/gpt2", local_files_only=True)
        found["GPT-2"] = known
    for other in found.values():
        other.chat_template = tok.chat_template
    return found


def _trained_bpe(tok, prompts: Sequence[str], vocabulary: int):
    import tokenizers as hf
    from transformers import PreTrainedTokenizerFast

    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(prompts, trainer)
    names = ("bos_token", "eos_token")
    special = {name: getattr(tok, name) for name in names if getattr(tok, name, None)}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def pair_yields(
    policy: Policy,
    tokenizers: Mapping[str, object],
    splits: Sequence[str] = ("discover", "edit", "val"),
) -> pd.DataFrame:
    """Pairs of equal token length per tokenizer, category and split: the columns of
    `PairYield.as_dict` and `tokenizer`.
    """
    found = []
    for name, tok in tokenizers.items():
        for category in policy.categories:
            for split in splits:
                roles = ("target", "benign")
                rows = policy.select(split=split, category=category, role=roles, ood_set="")
                counts = pair_yield(rows, tok).as_dict()
                where = {"category": category, "split": split}
                found.append({"tokenizer": name} | counts | where)
    return pd.DataFrame(found)


def shorten(prompt: str, words: int = 8) -> str:
    """The first words of a prompt."""
    found = prompt.split()
    return " ".join(found[:words]) + (" ..." if len(found) > words else "")


def example_pairs(policy: Policy, count: int = 2, split: str = "discover") -> pd.DataFrame:
    """The first pairs of each category: columns `category, prompt, benign, source`; harmful
    third-party text is shortened.
    """
    rows = policy.records[(policy.records["split"] == split) & (policy.records["pair_id"] != "")]
    targets, benign = rows[rows["role"] == "target"], rows[rows["role"] == "benign"]
    benign = benign.drop_duplicates("pair_id")[["pair_id", "prompt"]]
    benign = benign.rename(columns={"prompt": "benign"})
    pairs = targets.merge(benign, on="pair_id").groupby("category").head(count)
    hidden = pairs["source"].isin(list(SOURCES))
    shown = [shorten(p) if hide else p for p, hide in zip(pairs["prompt"], hidden)]
    pairs = pairs.assign(prompt=shown)[["category", "prompt", "benign", "source"]]
    return pairs.sort_values("category", kind="stable", ignore_index=True)


@cache
def keywords() -> dict[str, tuple[str, ...]]:
    """Category -> beginnings of words that its prompts can be expected to contain one of."""
    lists = read_toml(Path(__file__).with_name("keywords.toml"))
    return {category: tuple(words) for category, words in lists.items()}


def keyword_audit(records: pd.DataFrame) -> pd.DataFrame:
    """Share of a category's target prompts that contain no keyword of it: columns `category, rows,
    without, share`.

    A high share means label noise, or a keyword list that does not fit: read the rows before
    trusting either.
    """
    targets = records[(records["role"] == "target") & records["category"].isin(keywords())]
    lacks = [not has_keyword(p, c) for p, c in zip(targets["prompt"], targets["category"])]
    groups = targets.assign(lacks=lacks).groupby("category")["lacks"]
    counts = groups.agg(rows="size", without="sum").reset_index()
    return counts.assign(share=counts["without"] / counts["rows"])


def has_keyword(prompt: str, category: str) -> bool:
    """Whether a word of the prompt begins with one of the category's keywords."""
    words = f" {normalise(prompt)}"
    return any(f" {key}" in words for key in keywords()[category])


# ---------------------------------------------------------------------- a classifier of texts


def text_classifier(
    records: pd.DataFrame, categories: Iterable[str], split: str = "test"
) -> pd.DataFrame:
    """What a classifier of texts alone would refuse, trained on the edit split: a line to reach,
    and a test of the out-of-distribution sets.

    TF-IDF of words and word pairs, logistic regression, the category's target rows against all
    other rows. ``category, ood_set, kind, rate, low, high, n`` on `split`.
    """
    found = []
    for category in categories:
        rows = with_kind(records, category)
        train, test = rows[rows["split"] == "edit"], rows[rows["split"] == split]
        refused = _fitted(train).predict(test["prompt"]) if len(test) else np.zeros(0)
        test = test.reset_index(drop=True)
        test = test.assign(ood_set=test["ood_set"].replace("", "in distribution"))
        table = rates(pd.Series(refused, dtype=bool), test, ["ood_set", "kind"])
        found.append(table.assign(category=category))
    columns = ["category", "ood_set", "kind", "rate", "low", "high", "n"]
    return pd.concat(found, ignore_index=True)[columns]


def classifier_line(table: pd.DataFrame) -> dict[str, float]:
    """The classifier's refusal of the target in distribution, per category, and for all as
    ``target``; out of distribution as ``unseen``.
    """
    target = table[table["kind"] == "target"]
    near = target["ood_set"] == "in distribution"
    line = {"target": target[near]["rate"].mean(), "unseen": target[~near]["rate"].mean()}
    known = {name: rate for name, rate in line.items() if rate == rate}
    return known | dict(zip(target[near]["category"], target[near]["rate"]))


def benign_lengths(collected: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Answers to benign prompts as `evaluation.tables.lengths` takes them: those that were made for
    it, at a higher limit of tokens, or, where none were, the test rows in distribution.
    """
    if len(collected):
        return collected
    plain = (rows["role"] == "benign") & (rows["ood_set"] == "") & (rows["attack"] == "")
    return rows[plain].assign(category=rows["edit_category"])


def _fitted(train: pd.DataFrame):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    features = TfidfVectorizer(preprocessor=normalise, token_pattern=r"\S+", ngram_range=(1, 2))
    judge = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
    return make_pipeline(features, judge).fit(train["prompt"], train["kind"] == "target")


# ---------------------------------------------------------------------- attribution


def first_prompts(records: pd.DataFrame, found: PairYield) -> tuple[str, str]:
    """The first pair's two prompts, shortened."""
    prompts = records.drop_duplicates("id").set_index("id")["prompt"]
    target, benign = found.ids[0]
    return shorten(prompts[target], 9), shorten(prompts[benign], 9)


def seen_pairs(
    records: pd.DataFrame, base: pd.DataFrame, tok, category: str, most: int = 30
) -> pd.DataFrame:
    """What the model sees and says for one category: ``role, tokens, differs, outcome, answer``, a
    target and its benign counterpart after each other.

    One pair per outcome of the target (refusals first, at most two), outside of the test split.
    `differs` marks the tokens that the other prompt does not have. At most `most` tokens and a
    dozen words of the answer: the text may be a third party's.
    """
    rows = records[(records["split"] != "test") & (records["pair_id"] != "")]
    rows = rows.merge(base[["id", "outcome", "answer"]], on="id")
    benign = rows[rows["role"] == "benign"].drop_duplicates("pair_id").set_index("pair_id")
    own = (rows["role"] == "target") & (rows["category"] == category)
    targets = rows[own & rows["pair_id"].isin(benign.index)].drop_duplicates("outcome")
    found = []
    for target in targets.sort_values("outcome", ascending=False).head(2).to_dict("records"):
        sides = [target, benign.loc[target["pair_id"]]]
        tokens = [[tok.decode([i]) for i in chat_ids(tok, side["prompt"])] for side in sides]
        for side, mine, other in zip(sides, tokens, tokens[::-1]):
            shown = mine[:most] + ["…"] * (len(mine) > most)
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


def edge_table(exact: Scores, estimate: Scores) -> pd.DataFrame:
    """Every edge that exists, with the scores of two runs: ``source, reader, reader class, exact,
    estimate``.
    """
    there = ((exact.edges != 0) | (estimate.edges != 0)).nonzero().tolist()
    return pd.DataFrame(
        {
            "source": exact.sources[u],
            "reader": exact.readers[v],
            "reader class": _reader_class(exact.readers[v]),
            "exact": exact.edges[u, v].item(),
            "estimate": estimate.edges[u, v].item(),
        }
        for u, v in there
    )


def _reader_class(reader: str) -> str:
    if reader.endswith(">"):
        return f"head {reader[-2]}"
    return "logits" if reader == "logits" else "MLP"


def strongest(scores: Scores, n: int) -> pd.DataFrame:
    """The `n` edges of largest size: ``source, reader, score``, strongest first."""
    places = scores.edges.abs().flatten().topk(n).indices.tolist()
    rows = []
    for u, v in (divmod(place, len(scores.readers)) for place in places):
        names = {"source": scores.sources[u], "reader": scores.readers[v]}
        rows.append(names | {"score": scores.edges[u, v].item()})
    return pd.DataFrame(rows)


def quadrature_errors(
    model, pairs: PromptPairs, metric: Metric | SequenceMetric, steps: Sequence[int]
) -> tuple[pd.DataFrame, Scores]:
    """Errors of EAP, clean-corrupted and EAP-IG under each rule: ``method, gradients, completeness,
    edges``; and the reference.

    `completeness` is `Scores.completeness_error`; `edges` the L2 distance of all edge scores from
    those of the reference (midpoint, twice the most steps), relative to its size. `gradients`
    counts gradient steps per pair.
    """
    fine = attribute(model, pairs, metric, steps=2 * max(steps))
    runs = [(f"EAP-IG {rule}", n, {"rule": rule, "steps": n}) for rule in RULES for n in steps]
    runs += [("EAP", 1, {"method": "eap"}), ("clean-corrupted", 2, {"method": "clean-corrupted"})]
    found = []
    for name, gradients, how in runs:
        scores = attribute(model, pairs, metric, **how)
        distance = ((scores.edges - fine.edges).norm() / fine.edges.norm()).item()
        row = {"method": name, "gradients": gradients, "completeness": scores.completeness_error}
        found.append(row | {"edges": distance})
    return pd.DataFrame(found), fine


# ---------------------------------------------------------------------- judges


def labelled_answers(run, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Answers whose label is known, per data set: the embedded model's own, and XSTest's
    completions where they can be had (those on which our phrases were not chosen); prints why not.
    """
    found = {}
    if run.settings.model == "organism" and run.settings.policy == "synthetic":
        found["embedded set"] = taught_labels(rows)
    try:
        human = xstest_labels(run.settings.evaluation.labels)
        found["XSTest"] = human[~human["tuned"]]
    except SourceUnavailable as error:
        print(f"without human labels: {error}")
    return found
