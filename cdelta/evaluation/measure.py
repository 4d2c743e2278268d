"""From a model and records to rows: one answer, judged and scored, per prompt; kept in Parquet so that a killed run goes on."""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F

from cdelta.attribution.metrics import Metric, kl_divergence
from cdelta.errors import CdeltaError
from cdelta.evaluation.judges import Judge, Rules
from cdelta.models.chat import chat_ids, left_pad, positions
from cdelta.models.generation import answer, first_logits, generate
from cdelta.policy.records import normalise

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


__all__ = [
    "Condition",
    "RowStore",
    "benign_shift",
    "evaluate",
    "first_logits",
    "generate",
    "judged",
    "next_token_logits",
    "perplexity",
]

CHUNK = 512
"""Prompts between two writes of the row store."""
RECORD_COLUMNS = (
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
)
"""Columns of the records that rows keep; all but the first four may be missing."""
DTYPES = (
    {name: "str" for name in RECORD_COLUMNS}
    | {
        "method": "str",
        "seed": "int64",
        "edit_category": "str",
        "k": "float64",
        "param_fraction": "float64",
        "variant": "str",
        "attack": "str",
    }
    | {
        "protocol": "str",
        "answer": "str",
        "n_tokens": "int64",
        "finished": "bool",
        "log_odds": "float64",
    }
    | {"outcome": "str", "addressed": "boolean", "correct": "boolean"}
)
"""Columns of the rows, in order. ``log_odds`` is NaN without a metric, ``addressed`` and ``correct`` are empty where they have no meaning."""


@dataclass(frozen=True)
class Condition:
    """What a row was measured under. Rows of one condition and one prompt are measured once."""

    method: str = "base"
    """Method key (``cdelta``, ``as``, ``random``, ...)."""
    seed: int = 0
    edit_category: str = ""
    """The category that the method was asked to refuse; empty for the base."""
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


def evaluate(
    model,
    tok,
    records: pd.DataFrame | Iterable[Mapping],
    metric: Metric | None = None,
    *,
    judge: Judge = Rules(),
    store: RowStore | None = None,
    system: str = "",
    max_new_tokens: int = 32,
    batch_size: int = 64,
    drop_finished: bool = True,
    progress: bool = False,
    **condition: object,
) -> pd.DataFrame:
    """One row per record, in the order of the records; columns `DTYPES`.

    Args:
        records: rows with ``id, prompt, category, role`` and, where they have them, `RECORD_COLUMNS`.
        metric: refusal log-odds, read at the last prompt token of the same pass.
        store: rows are saved as they come, and rows of this condition that are already there are not made again.
        system, max_new_tokens, batch_size, drop_finished, progress: as `generation.answer` takes them.
        condition: fields of `Condition`.

    Utility rows with a ``reference`` are ``correct`` when the answer equals it (case and punctuation aside). Where the record says what an
    answer must mention, a complying answer that does not is ``incoherent``, and ``addressed`` is false.
    """
    records = as_frame(records)
    protocol = f"greedy, {max_new_tokens} tokens" + (
        f", system prompt {system!r}" if system else ""
    )
    under = Condition(**condition, protocol=protocol)
    done = store.read(under) if store else empty_rows()
    done = done[done["id"].isin(records["id"])]
    todo = records[~records["id"].isin(done["id"])]
    todo = todo.loc[todo["prompt"].str.len().sort_values(ascending=False, kind="stable").index]
    parts = [done] if len(done) else []
    for start in range(0, len(todo), CHUNK):
        chunk = todo.iloc[start : start + CHUNK]
        found = answer(
            model, tok, list(chunk["prompt"]), metric,
            max_new_tokens=max_new_tokens, batch_size=batch_size, system=system, drop_finished=drop_finished, progress=progress,
        )  # fmt: skip
        parts.append(judged(_with_answers(chunk, found, under), judge))
        if store:
            store.append(parts[-1])
    rows = pd.concat(parts) if parts else empty_rows()
    return rows.set_index("id", drop=False).loc[records["id"]].reset_index(drop=True)


def as_frame(records: pd.DataFrame | Iterable[Mapping]) -> pd.DataFrame:
    """Records with all `RECORD_COLUMNS`. Raises `CdeltaError` on missing columns and on repeated ids."""
    frame = records if isinstance(records, pd.DataFrame) else pd.DataFrame(list(records))
    missing = [column for column in RECORD_COLUMNS[:4] if column not in frame and len(frame)]
    if missing:
        raise CdeltaError(
            f"records lack the columns {', '.join(missing)}: pass rows of policy.records."
        )
    frame = (
        frame.reindex(columns=list(RECORD_COLUMNS))
        .astype(object)
        .fillna("")
        .astype(str)
        .reset_index(drop=True)
    )
    if frame["id"].duplicated().any():
        raise CdeltaError(
            f"{frame['id'].duplicated().sum()} records repeat another's id: drop the duplicates."
        )
    return frame


def judged(rows: pd.DataFrame, judge: Judge = Rules()) -> pd.DataFrame:
    """The rows with outcome, addressed and correct from `judge`; saved answers can so be judged again by another."""
    log_odds = [None if math.isnan(x) else x for x in rows["log_odds"]]
    outcomes = pd.Series(
        judge(list(rows["prompt"]), list(rows["answer"]), log_odds), index=rows.index
    )
    answers, complied = rows["answer"].map(normalise), outcomes == "comply"
    asked = complied & (rows["must_mention"] != "")
    mentioned = pd.Series(
        [f" {normalise(m)} " in f" {a} " for m, a in zip(rows["must_mention"], answers)],
        index=rows.index,
        dtype=bool,
    )
    tested = (rows["role"] == "utility") & (rows["reference"] != "")
    return rows.assign(
        outcome=outcomes.mask(asked & ~mentioned, "incoherent"),
        addressed=mentioned.astype("boolean").where(asked),
        correct=(answers == rows["reference"].map(normalise)).astype("boolean").where(tested),
    ).astype(DTYPES)[list(DTYPES)]


def _with_answers(records: pd.DataFrame, found: Sequence, under: Condition) -> pd.DataFrame:
    return records.assign(
        **asdict(under),
        answer=[r.text for r in found],
        n_tokens=[r.n_tokens for r in found],
        finished=[r.finished for r in found],
        log_odds=[math.nan if r.log_odds is None else r.log_odds for r in found],
    )


def empty_rows() -> pd.DataFrame:
    """No rows, all columns."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in DTYPES.items()})


class RowStore:
    """Rows in a folder of Parquet parts; every part is complete or absent. The folder belongs to one model and one set of records."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def append(self, rows: pd.DataFrame) -> None:
        """Add rows as one more part."""
        name = uuid.uuid4().hex
        hidden = self.folder / f".{name}.partial"
        rows.to_parquet(hidden, index=False)
        os.replace(hidden, self.folder / f"{len(self.parts()):05d}-{name[:8]}.parquet")

    def read(self, condition: Condition | None = None) -> pd.DataFrame:
        """All rows, or those of one condition, in the order in which they came; a row written twice counts once."""
        parts = [pd.read_parquet(part, filters=_filters(condition)) for part in self.parts()]
        parts = [part for part in parts if len(part)]
        if not parts:
            return empty_rows()
        keys = ["id", *(f.name for f in fields(Condition))]
        return pd.concat(parts).drop_duplicates(keys).astype(DTYPES).reset_index(drop=True)

    def parts(self) -> list[Path]:
        """The part files, oldest first."""
        return sorted(self.folder.glob("*.parquet"))


def _filters(condition: Condition | None) -> list[tuple] | None:
    return [(name, "==", value) for name, value in asdict(condition).items()] if condition else None


# ---------------------------------------------------------------------- distance from the base on benign text


@torch.no_grad()
def next_token_logits(
    model,
    tok,
    prompts: Sequence[str],
    answers: Sequence[str],
    system: str = "",
    batch_size: int = 32,
) -> list[Float[Tensor, "token vocab"]]:
    """fp32 logits that predict each token of the given answers, per prompt, on the CPU: teacher-forced, padding excluded."""
    heads = [chat_ids(tok, prompt, system) for prompt in prompts]
    tails = [tok(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    found: list = [None] * len(heads)
    order = sorted(range(len(heads)), key=lambda i: -len(heads[i]) - len(tails[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = left_pad([heads[i] + tails[i] for i in rows], 0, model.device)
        longest = max(len(tails[i]) for i in rows)
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            logits_to_keep=longest + 1,
            use_cache=False,
        )
        for i, logits in zip(rows, out.logits.float().cpu()):
            found[i] = logits[len(logits) - 1 - len(tails[i]) : -1].clone()
    return found


def perplexity(
    logits: Sequence[Float[Tensor, "token vocab"]], tok, answers: Sequence[str]
) -> list[float]:
    """Exp of the mean negative log-likelihood of each answer's tokens."""
    tails = [
        tok(answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        for answer in answers
    ]
    return [F.cross_entropy(l, t).exp().item() for l, t in zip(logits, tails, strict=True)]


def benign_shift(
    model,
    tok,
    prompts: Sequence[str],
    answers: Sequence[str],
    base: Sequence[Float[Tensor, "token vocab"]],
    system: str = "",
) -> pd.DataFrame:
    """How far the model as it stands is from the base on benign answers: one row per prompt, ``kl`` (nats per token) and both perplexities.

    Args:
        base: `next_token_logits` of the base model on the same prompts and answers.
    """
    now = next_token_logits(model, tok, prompts, answers, system)
    kl = [kl_divergence(a, b).mean().item() for a, b in zip(now, base, strict=True)]
    return pd.DataFrame({
        "prompt": prompts, "kl": kl, "perplexity": perplexity(now, tok, answers), "perplexity_base": perplexity(base, tok, answers),
    })  # fmt: skip
