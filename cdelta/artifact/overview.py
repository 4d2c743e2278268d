"""What notebooks 00 to 02 show of the model and its prompts: tables, no figures.

Third-party harmful prompts appear shortened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
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
from cdelta.policy.sources import SOURCES, SourceUnavailable

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


def shorten(prompt: str, words: int = 8) -> str:
    """The first words of a prompt."""
    found = prompt.split()
    return " ".join(found[:words]) + (" ..." if len(found) > words else "")


def sample_answers(rows: pd.DataFrame) -> pd.DataFrame:
    """The first answer per category and kind of prompt, both shortened: ``category, kind, prompt,
    answer, outcome``.
    """
    shown = rows.groupby(["category", "kind"], sort=False).head(1).reset_index(drop=True)
    shown["prompt"] = shown["prompt"].apply(shorten, words=12)
    shown["answer"] = shown["answer"].apply(shorten, words=25)
    return shown[["category", "kind", "prompt", "answer", "outcome"]]


def base_kinds(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the base with their kind; a category's own harm is its target."""
    return with_kind(rows, "").replace({"kind": {"other": "target"}})


def base_refusal(rows: pd.DataFrame) -> pd.DataFrame:
    """Refusal by the base, per ``category, kind`` of prompt: ``rate, low, high, n``."""
    policy = base_kinds(rows).query("kind != 'skills'")
    return rates(policy["outcome"] == "refuse", policy, ["category", "kind"])


# ---------------------------------------------------------------------- the policy


def counts_table(records: pd.DataFrame) -> pd.DataFrame:
    """Prompts per source, category and role (rows) and split (columns)."""
    groups = [records[name] for name in ("source", "category", "role")]
    table = pd.crosstab(groups, records["split"])
    return table[[split for split in SPLITS if split in table]]


def dropped_table(policy: Policy) -> pd.DataFrame:
    """Per source and category: what was read, what was dropped for which reason, what was kept."""
    counted = policy.report.query("split != ''")
    table = counted.pivot_table("rows", ["source", "category"], "step", "sum", fill_value=0)
    reasons = table.columns.drop(["read", "kept"])
    return table[["read", *reasons, "kept"]].astype(int).reset_index()


def sources_table(policy: Policy) -> pd.DataFrame:
    """One line per source: revision and whether we pinned it, licence, gating, rows kept, what was
    not selected or why it was skipped.
    """
    notes, skipped = {}, []
    for row in policy.report.query("split == ''").itertuples():
        notes[row.source] = f"{row.step}: {row.rows} rows other than {row.detail}"
        if row.step == "skipped":
            source, notes[row.source] = SOURCES[row.source], row.detail
            skipped.append((row.source, source.revision, source.license, 0, True, source.gated))
    origins = pd.DataFrame(policy.manifest["sources"])[["source", "pinned", "gated"]]
    read = pd.DataFrame(policy.manifest["contents"]).merge(origins.drop_duplicates("source"))
    table = pd.concat([read, pd.DataFrame(skipped, columns=list(read))], ignore_index=True)
    return table.assign(note=[notes.get(name, "") for name in table["source"]])


def near_repeats(policy: Policy) -> int:
    """How often a prompt is an exact or near-duplicate of one of another source and split.

    Leaking rows that the build dropped count as well: this is about the data as they came.
    """
    leaked = policy.dropped[policy.dropped["reason"].str.startswith("near-duplicate")]
    rows = pd.concat([policy.records, leaked], ignore_index=True).fillna({"group_id": ""})
    found = find_overlaps(rows)[["left", "right"]]
    both = pd.concat([found, found.set_axis(["right", "left"], axis=1)])
    place = rows["source"] + " " + rows["split"]
    return len(both.assign(right=both["right"].map(place)).drop_duplicates()) // 2


def tokenizers(tok, prompts: Sequence[str], vocabulary: int = 1000) -> dict[str, object]:
    """Tokenizers to compare yields under: the model's own, and a byte-level BPE trained on
    `prompts`.
    """
    import tokenizers as hf
    from transformers import PreTrainedTokenizerFast

    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(prompts, hf.trainers.BpeTrainer(vocab_size=vocabulary, **options))
    special = {"bos_token": tok.bos_token, "eos_token": tok.eos_token}
    trained = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    trained.chat_template = tok.chat_template
    return {"the model's own": tok, f"BPE of {vocabulary} trained here": trained}


def pair_yields(policy: Policy, tokenizers: Mapping[str, object]) -> pd.DataFrame:
    """Pairs of equal token length in the discover split, per tokenizer and category: the columns of
    `PairYield.as_dict` and `tokenizer`.
    """
    found = []
    for (name, tok), category in product(tokenizers.items(), policy.categories):
        where = {"category": category, "split": "discover"}
        rows = policy.select(**where, role=("target", "benign"), ood_set="")
        found.append({"tokenizer": name} | pair_yield(rows, tok).as_dict() | where)
    return pd.DataFrame(found)


def example_pairs(policy: Policy, count: int = 2) -> pd.DataFrame:
    """The first pairs of each category in the discover split: ``category, prompt, benign, source``;
    harmful third-party text is shortened.
    """
    rows = policy.records.query("split == 'discover' and pair_id != ''")
    benign = _counterparts(rows)["prompt"].rename("benign")
    pairs = rows.query("role == 'target'").join(benign, "pair_id", "inner")
    pairs = pairs.groupby("category").head(count)
    foreign, prompts = pairs["source"].isin(list(SOURCES)), pairs["prompt"]
    pairs["prompt"] = prompts.mask(foreign, prompts.map(shorten))
    columns = ["category", "prompt", "benign", "source"]
    return pairs[columns].sort_values("category", kind="stable", ignore_index=True)


def _counterparts(rows: pd.DataFrame) -> pd.DataFrame:
    """The benign prompt of every pair, by its ``pair_id``."""
    return rows.query("role == 'benign'").drop_duplicates("pair_id").set_index("pair_id")


def keyword_audit(records: pd.DataFrame) -> pd.DataFrame:
    """Share of a category's target prompts that contain no keyword of it (``keywords.toml``):
    columns `category, rows, without, share`.

    A high share means label noise, or a keyword list that does not fit: read the rows before
    trusting either.
    """
    found = []
    for category, words in read_toml(Path(__file__).with_name("keywords.toml")).items():
        own = records.query("role == 'target' and category == @category")
        prompts = own["prompt"].map(normalise)
        without = (~prompts.str.contains(rf"(?:^| )(?:{'|'.join(words)})")).sum()
        found.append({"category": category, "rows": len(prompts), "without": without})
    table = pd.DataFrame(found).query("rows > 0")
    return table.assign(share=table["without"] / table["rows"])


# ---------------------------------------------------------------------- a classifier of texts


def text_classifier(
    records: pd.DataFrame, categories: Iterable[str], split: str = "test"
) -> pd.DataFrame:
    """What a classifier of texts alone would refuse, trained on the edit split: a line to reach,
    and a test of the out-of-distribution sets.

    TF-IDF of words and word pairs, logistic regression, the category's target rows against all
    other rows. ``category, ood_set, kind, rate, low, high, n`` on `split`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = {"preprocessor": normalise, "token_pattern": r"\S+", "ngram_range": (1, 2)}
    found = []
    for category in categories:
        rows = with_kind(records, category).assign(category=category)
        rows["ood_set"] = rows["ood_set"].replace("", "in distribution")
        train = rows.query("split == 'edit'")
        test = rows.query("split == @split").reset_index(drop=True)
        judge = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
        judge = make_pipeline(TfidfVectorizer(**words), judge)
        judge.fit(train["prompt"], train["kind"] == "target")
        refused = judge.predict(test["prompt"]) if len(test) else []
        by = ["category", "ood_set", "kind"]
        found.append(rates(pd.Series(refused, dtype=bool), test, by))
    return pd.concat(found, ignore_index=True)


def classifier_line(table: pd.DataFrame) -> dict[str, float]:
    """The classifier's refusal of the target in distribution, per category, and for all as
    ``target``; out of distribution as ``unseen``.
    """
    target = table.query("kind == 'target'")
    near = target["ood_set"] == "in distribution"
    line = target.groupby(near.map({True: "target", False: "unseen"}))["rate"].mean()
    return line.to_dict() | dict(zip(target["category"][near], target["rate"][near]))


def benign_lengths(collected: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Answers to benign prompts as `evaluation.tables.lengths` takes them: those that were made for
    it, at a higher limit of tokens, or, where none were, the test rows in distribution.
    """
    if len(collected):
        return collected
    plain = rows.query("role == 'benign' and ood_set == '' and attack == ''")
    return plain.assign(category=plain["edit_category"])


# ---------------------------------------------------------------------- attribution


def first_prompts(records: pd.DataFrame, found: PairYield) -> list[str]:
    """The first pair's two prompts, shortened."""
    prompts = dict(zip(records["id"], records["prompt"]))
    return [shorten(prompts[id], 9) for id in found.ids[0]]


def seen_pairs(
    records: pd.DataFrame, base: pd.DataFrame, tok, category: str, most: int = 30
) -> pd.DataFrame:
    """What the model sees and says for one category: ``role, tokens, differs, outcome, answer``, a
    target and its benign counterpart after each other.

    One pair per outcome of the target (refusals first, at most two), outside of the test split.
    `differs` marks the tokens that the other prompt does not have. At most `most` tokens and a
    dozen words of the answer: the text may be a third party's.
    """
    rows = records.query("split != 'test' and pair_id != ''")
    rows = rows.merge(base[["id", "outcome", "answer"]], on="id")
    benign = _counterparts(rows)
    own = "role == 'target' and category == @category and pair_id in @benign.index"
    targets, found = rows.query(own).drop_duplicates("outcome"), []
    for target in targets.sort_values("outcome", ascending=False).head(2).to_dict("records"):
        sides = [target, benign.loc[target["pair_id"]]]
        tokens = [[tok.decode([i]) for i in chat_ids(tok, side["prompt"])] for side in sides]
        for side, mine, other in zip(sides, tokens, tokens[::-1]):
            shown = mine[:most] + ["…"] * (len(mine) > most)
            differs = [token not in (*other, "…") for token in shown]
            answer = shorten(side["answer"], 12)
            found.append((side["role"], shown, differs, side["outcome"], answer))
    return pd.DataFrame(found, columns=["role", "tokens", "differs", "outcome", "answer"])


def edge_table(exact: Scores, estimate: Scores) -> pd.DataFrame:
    """Every edge that exists, with the scores of two runs: ``source, reader, reader class, exact,
    estimate``.
    """
    u, v = ((exact.edges != 0) | (estimate.edges != 0)).nonzero(as_tuple=True)
    readers = pd.Series(np.array(exact.readers)[v])
    kinds = "head " + readers.str.extract("<(.)>$", expand=False)
    return pd.DataFrame(
        {
            "source": np.array(exact.sources)[u],
            "reader": readers,
            "reader class": kinds.fillna(readers.where(readers == "logits", "MLP")),
            "exact": exact.edges[u, v].double(),
            "estimate": estimate.edges[u, v].double(),
        }
    )


def strongest(scores: Scores, n: int) -> pd.DataFrame:
    """The `n` edges of largest size: ``source, reader, score``, strongest first."""
    table = edge_table(scores, scores).rename(columns={"exact": "score"})
    table = table.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)
    return table[["source", "reader", "score"]].head(n)


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
        found.append((name, gradients, scores.completeness_error, distance))
    return pd.DataFrame(found, columns=["method", "gradients", "completeness", "edges"]), fine


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
