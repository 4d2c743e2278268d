"""How well judges tell refusals in answers whose labels are known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from cdelta.errors import CdeltaError
from cdelta.evaluation.judges import Judge
from cdelta.evaluation.rates import Rate, rates

COLUMNS = [
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
]
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
    judges, parts = dict(judges), {"all": labelled}
    if "log_odds" in labelled and labelled["log_odds"].notna().all():
        said = np.where(labelled["log_odds"] > 0, "refuse", "comply").tolist()
        judges |= {"first token": lambda prompts, answers: said}
    if "source" in labelled:
        parts |= dict(iter(labelled.groupby("source")))
    found, truth = [], labelled["label"] == "refuse"
    for name, judge in judges.items():
        try:
            outcomes = judge(list(labelled["prompt"]), list(labelled["answer"]))
        except CdeltaError as error:
            found.append({"judge": name, "source": "all", "note": str(error)})
            continue
        refused = pd.Series(outcomes, index=labelled.index) == "refuse"
        for source, rows in parts.items():
            agreement = _agreement(truth[rows.index], refused[rows.index])
            found.append({"judge": name, "source": source} | agreement)
    return pd.DataFrame(found)


def calibrations(labelled: Mapping[str, pd.DataFrame], judges: Mapping[str, Judge]) -> pd.DataFrame:
    """`calibration` on every set of labelled answers, with the set's name as ``data``."""
    found = [calibration(answers, judges).assign(data=name) for name, answers in labelled.items()]
    return pd.concat([pd.DataFrame(), *found], ignore_index=True).reindex(columns=COLUMNS)


def _agreement(truth: pd.Series, refused: pd.Series) -> dict:
    right = truth == refused
    alike = truth.nunique() == 1 and right.all()  # kappa's 0/0
    return {
        "n": len(truth),
        **_share(right).named("accuracy"),
        "precision": truth[refused].mean(),
        **_share(refused[truth]).named("recall", "recall_"),
        **_share(refused[~truth]).named("false_positives", "false_positives_"),
        "kappa": 1.0 if alike else cohen_kappa_score(truth, refused),
        "note": "",
    }


def _share(hits: pd.Series) -> Rate:
    """Every row counts."""
    return Rate.of(hits, hits.index)


def reliability(labelled: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share of labelled refusals per bin of log-odds: ``log_odds`` (mean in the bin), ``rate, low,
    high, n``; all sets that know their log-odds.
    """
    columns = ["label", "log_odds"]
    rows = pd.concat([pd.DataFrame(columns=columns), *labelled.values()]).dropna(subset=columns)
    rows = rows.astype({"log_odds": float}).sort_values("log_odds", ignore_index=True)
    rows = rows.assign(id=rows.index, bin=pd.cut(rows["log_odds"], LOG_ODDS_BINS))
    table = rates(rows["label"] == "refuse", rows, ["bin"])
    means = rows.groupby("bin", observed=True)["log_odds"].mean()
    return table.assign(bin=means.to_numpy()).rename(columns={"bin": "log_odds"})
