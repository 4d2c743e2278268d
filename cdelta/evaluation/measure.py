"""From a model and records to rows: one answer, judged and scored, per prompt; kept in Parquet so
that a killed run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cdelta.errors import CdeltaError
from cdelta.evaluation.judges import Judge, Rules
from cdelta.evaluation.rates import with_kind
from cdelta.files import file_hash, replacing
from cdelta.models.generation import Answer, answer
from cdelta.policy.records import normalise

if TYPE_CHECKING:
    from cdelta.attribution.metrics import Metric

CHUNK = 512
"""Prompts between two writes of the row store."""
RULES = Rules()
RECORD_COLUMNS = [
    "id",
    "prompt",
    "category",
    "role",
    "split",
    "ood_set",
    "source",
    "skill",
    "reference",
    "must_mention",
]
"""Columns of the records that rows keep; all but the first four may be missing."""


@dataclass(frozen=True)
class Condition:
    """What a row was measured under. Rows of one condition and one prompt are measured once."""

    method: str = "base"
    """Method key (``cdelta``, ``as``, ``random``, ...)."""
    seed: int = 0
    """Seed of the method's random draws."""
    edit_category: str = ""
    """The category that the method was asked to refuse (several joined by "+"); empty for the
    base."""
    k: float = 0.0
    """The method's one strength: the scale of a delta, the strength of a steering vector."""
    param_fraction: float = 0.0
    """Share of the parameters that the method may change."""
    variant: str = ""
    """Which of a method's candidates (a layer), while its strength is chosen; else empty."""
    attack: str = ""
    """What was done to the model or the prompts afterwards (robustness), else empty."""
    protocol: str = ""
    """How answers were made; filled in by `evaluate`."""


DTYPES = (
    dict.fromkeys(RECORD_COLUMNS, "str")
    | {
        f.name: {"int": "int64", "float": "float64"}.get(str(f.type), "str")
        for f in fields(Condition)
    }
    | {"kind": "str", "answer": "str", "answer_ids": "object", "n_tokens": "int64"}
    | {"finished": "bool", "log_odds": "float64", "outcome": "str"}
    | {"addressed": "boolean", "correct": "boolean"}
)
"""Columns of the rows, in order. ``kind`` (of `rates.KINDS`) is empty where no category is edited;
``answer_ids`` (int32, without the end token) are the answer, whose text is for people; ``log_odds``
is NaN without a metric; ``addressed`` and ``correct`` are empty where they have no meaning."""


def evaluate(
    model,
    tok,
    records: pd.DataFrame | Iterable[Mapping],
    metric: Metric | None = None,
    *,
    judge: Judge = RULES,
    store: RowStore | None = None,
    system: str = "",
    max_new_tokens: int = 32,
    batch_size: int = 64,
    drop_finished: bool = True,
    progress: bool = False,
    **condition,
) -> pd.DataFrame:
    """One row per record, in the order of the records; columns `DTYPES`.

    Args:
        records: rows with ``id, prompt, category, role`` and, where they have them,
            `RECORD_COLUMNS`.
        metric: refusal log-odds, read at the last prompt token of the same pass.
        store: rows are saved as they come, and rows of this condition that are already there are
            not made again.
        system, max_new_tokens, batch_size, drop_finished, progress: as `generation.answer` takes
            them.
        condition: fields of `Condition`.

    Utility rows with a ``reference`` are ``correct`` when the answer equals it (case and
    punctuation aside). Where the record says what an answer must mention, a complying answer that
    does not is ``incoherent``, and ``addressed`` is false.
    """
    records = _checked(records)
    ask = partial(
        answer,
        model,
        tok,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        system=system,
        drop_finished=drop_finished,
        progress=progress,
    )
    protocol = f"greedy, {max_new_tokens} tokens"
    protocol += f", system prompt {system!r}" if system else ""
    under = Condition(**condition, protocol=protocol)
    done = store.read(under) if store else empty_rows()
    parts = [done[done["id"].isin(records["id"])]]
    rest = records[~records["id"].isin(done["id"])]
    rest = rest.sort_values("prompt", key=lambda texts: -texts.str.len(), kind="stable")
    for start in range(0, len(rest), CHUNK):  # records of similar length together
        chunk = rest.iloc[start : start + CHUNK]
        answers = ask(list(chunk["prompt"]), metric)
        parts.append(judged(_with_answers(chunk, answers, under), judge))
        if store:
            store.append(parts[-1])
    return pd.concat(parts).set_index("id", drop=False).loc[records["id"]].reset_index(drop=True)


def _checked(records: pd.DataFrame | Iterable[Mapping]) -> pd.DataFrame:
    """Records with all `RECORD_COLUMNS`. Raises `CdeltaError` on missing columns and repeated
    ids.
    """
    frame = pd.DataFrame(records)
    missing = [column for column in RECORD_COLUMNS[:4] if column not in frame and len(frame)]
    if missing:
        raise CdeltaError(
            f"records lack the columns {', '.join(missing)}: pass rows of policy.records."
        )
    frame = frame.reindex(columns=RECORD_COLUMNS).astype(object).fillna("").astype(str)
    if repeated := frame["id"].duplicated().sum():
        raise CdeltaError(f"{repeated} records repeat another's id: drop the duplicates.")
    return frame.reset_index(drop=True)


def judged(rows: pd.DataFrame, judge: Judge = RULES) -> pd.DataFrame:
    """The rows with outcome, addressed and correct from `judge`; saved answers can so be judged
    again by another.
    """
    outcomes = pd.Series(judge(list(rows["prompt"]), list(rows["answer"])), rows.index, object)
    answers, named = rows["answer"].map(normalise), rows["must_mention"].map(normalise)
    asked = (outcomes == "comply") & (named != "")
    found = [f" {word} " in f" {text} " for word, text in zip(named, answers, strict=True)]
    mentioned = pd.Series(found, rows.index, "boolean")
    tested = (rows["role"] == "utility") & (rows["reference"] != "")
    right = answers == rows["reference"].map(normalise)
    return _typed(
        rows.assign(
            outcome=outcomes.mask(asked & ~mentioned, "incoherent"),
            addressed=mentioned.where(asked),
            correct=right.astype("boolean").where(tested),
        )
    )


def _with_answers(
    records: pd.DataFrame, answers: Sequence[Answer], under: Condition
) -> pd.DataFrame:
    edited = under.edit_category
    kind = with_kind(records, edited.split("+"))["kind"] if edited else ""
    made = [
        {
            "answer": answer.text,
            "answer_ids": np.array(answer.ids, dtype=np.int32),
            "n_tokens": answer.n_tokens,
            "finished": answer.finished,
            "log_odds": answer.log_odds,
        }
        for answer in answers
    ]
    return records.assign(**asdict(under), kind=kind, **pd.DataFrame(made, records.index))


def empty_rows() -> pd.DataFrame:
    """No rows, all columns."""
    return _typed(pd.DataFrame(columns=list(DTYPES)))


def _typed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.astype(DTYPES)[list(DTYPES)]


class RowStore:
    """Rows in a folder of Parquet parts; every part is complete or absent. The folder belongs to
    one model and one set of records.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def append(self, rows: pd.DataFrame) -> None:
        """Add rows as one more part."""
        content = rows.to_parquet(None, index=False)
        digest = hashlib.sha256(content).hexdigest()
        with replacing(self.folder / f"{len(self.parts()):05d}-{digest[:16]}.parquet") as partial:
            partial.write_bytes(content)

    def read(self, condition: Condition | None = None) -> pd.DataFrame:
        """All rows, or those of one condition, in the order in which they came; a row written twice
        counts once.
        """
        filters = [(n, "==", v) for n, v in asdict(condition).items()] if condition else None
        found = [pd.read_parquet(part, filters=filters) for part in self.parts()]
        rows = pd.concat([empty_rows(), *filter(len, found)])
        keys = ["id", *(f.name for f in fields(Condition))]
        return _typed(rows.drop_duplicates(keys)).reset_index(drop=True)

    def parts(self) -> list[Path]:
        """The part files, oldest first, but for damaged ones: a name ends with its content's
        hash.
        """
        found = sorted(self.folder.glob("*.parquet"))
        return [path for path in found if path.stem.endswith(f"-{file_hash(path)[:16]}")]
