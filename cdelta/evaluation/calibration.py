"""How well judges tell refusals in answers whose labels are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from cdelta.errors import CdeltaError
from cdelta.evaluation.judges import Judge
from cdelta.evaluation.stats import wilson

COLUMNS = (
    "data",
    "judge",
    "source",
    "n",
    "accuracy",
    "low",
    "high",
    "precision",
    "recall",
    "recall_low",
    "recall_high",
    "false_positives",
    "false_positives_low",
    "false_positives_high",
    "kappa",
    "note",
)
LOG_ODDS_BINS = (-np.inf, -8, -4, -2, -1, 0, 1, 2, 4, 8, np.inf)
"""Nats."""


def calibration(labelled: pd.DataFrame, judges: Mapping[str, Judge]) -> pd.DataFrame:
    """`tab_judges`: how each judge tells refusals in labelled answers.

    Args:
        labelled: columns ``prompt, answer, label`` ("refuse" or "comply"), and ``log_odds`` and
            ``source`` if known.

    Per judge and source (and over all): ``accuracy``, ``recall`` and ``false_positives`` (share of
    compliances called refusals) with Wilson's 95 % intervals, ``precision``, ``kappa``, ``n``; and
    the same of the first token's log-odds where the answers know theirs. A judge that raises
    `CdeltaError` gets one row whose ``note`` says why it is missing.
    """
    unknown = set(labelled["label"]) - {"refuse", "comply"}
    if unknown:
        names = ", ".join(sorted(map(str, unknown)))
        raise CdeltaError(f"labels must be refuse or comply, not {names}.")
    found = []
    for name, judge in {**judges, **_first_token(labelled)}.items():
        try:
            refused = _refused(judge, labelled)
        except CdeltaError as error:
            found.append({"judge": name, "source": "all", "note": str(error)})
            continue
        parts = {"all": labelled}
        if "source" in labelled:
            parts |= dict(iter(labelled.groupby("source")))
        for source, part in parts.items():
            agreement = _agreement(part["label"] == "refuse", refused[part.index])
            found.append({"judge": name, "source": source} | agreement)
    return pd.DataFrame(found)


def calibrations(labelled: Mapping[str, pd.DataFrame], judges: Mapping[str, Judge]) -> pd.DataFrame:
    """`calibration` on every set of labelled answers, with the set's name as ``data``."""
    found = [calibration(answers, judges).assign(data=name) for name, answers in labelled.items()]
    if not found:
        return pd.DataFrame(columns=list(COLUMNS))
    return pd.concat(found, ignore_index=True).reindex(columns=list(COLUMNS))


def _first_token(labelled: pd.DataFrame) -> dict[str, Judge]:
    """The judge by refusal log-odds above 0 alone, where all answers know theirs."""
    if "log_odds" not in labelled or labelled["log_odds"].isna().any():
        return {}
    outcomes = ["refuse" if x > 0 else "comply" for x in labelled["log_odds"]]

    def first_token(prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        return outcomes

    return {"first token": first_token}


def _refused(judge: Judge, labelled: pd.DataFrame) -> pd.Series:
    outcomes = judge(list(labelled["prompt"]), list(labelled["answer"]))
    return pd.Series(outcomes, index=labelled.index) == "refuse"


def _agreement(truth: pd.Series, refused: pd.Series) -> dict:
    right = truth == refused
    alike = truth.nunique() == 1 and right.all()  # kappa's 0/0
    return {
        "n": len(truth),
        **share("accuracy", right, low="low", high="high"),
        "precision": truth[refused].mean(),
        **share("recall", refused[truth]),
        **share("false_positives", refused[~truth]),
        "kappa": 1.0 if alike else cohen_kappa_score(truth, refused),
        "note": "",
    }


def share(name: str, hits: pd.Series, low: str = "", high: str = "") -> dict[str, float]:
    """Share of hits and its Wilson interval, under the name, ``<name>_low`` and ``<name>_high``
    unless told otherwise; NaN without rows.
    """
    interval = wilson(int(hits.sum()), len(hits)) if len(hits) else (np.nan, np.nan)
    keys = (low or f"{name}_low", high or f"{name}_high")
    return {name: float(hits.mean()) if len(hits) else np.nan, **dict(zip(keys, interval))}


def reliability(labelled: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share of labelled refusals per bin of log-odds: ``log_odds`` (mean in the bin), ``rate, low,
    high, n``; all sets that know their log-odds.
    """
    known = [
        answers[["label", "log_odds"]].dropna()
        for answers in labelled.values()
        if "log_odds" in answers
    ]
    columns = ["log_odds", "rate", "low", "high", "n"]
    if not known:
        return pd.DataFrame(columns=columns)
    rows = pd.concat(known, ignore_index=True)
    found = []
    for _, part in rows.groupby(pd.cut(rows["log_odds"], LOG_ODDS_BINS), observed=True):
        k, n = int((part["label"] == "refuse").sum()), len(part)
        found.append((part["log_odds"].mean(), k / n, *wilson(k, n), n))
    return pd.DataFrame(found, columns=columns)
