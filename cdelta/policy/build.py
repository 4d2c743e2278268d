"""From a policy's name to frozen records: the one entry point of the command line and of a run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Mapping, Sequence

import pandas as pd

from cdelta.errors import CdeltaError
from cdelta.files import file_hash, read_json, write_json
from cdelta.models.chat import chat_ids
from cdelta.policy.category_maps import VERSION
from cdelta.policy.everyday import SOURCE, everyday_rows
from cdelta.policy.leakage import find_overlaps, leaking_rows
from cdelta.policy.records import SHARED, SPLITS, SplitRows, content_hash, to_records
from cdelta.policy.sources import SOURCES, Loaded, load
from cdelta.policy.upstream import SourceUnavailable
from cdelta.policy.user_file import read_user_rows, template_warnings

DROPPED_COLUMNS = ("source", "source_id", "category", "role", "split", "reason", "match", "prompt")
TABLES = ("records", "dropped", "report")
ON_LEAK = {"cast": "drop"}
"""What a leak across splits does unless told: CAST is known to have some; our own set must have
none; and a user's file stops too, because its near-duplicates share a group, so that a leak comes
from the splits that the user wrote."""


@dataclass(frozen=True)
class Policy:
    """Frozen records of one policy, what was dropped on the way, and the manifest that pins
    them."""

    records: pd.DataFrame
    """One row per prompt, columns `records.COLUMNS`."""
    dropped: pd.DataFrame
    """One row per prompt that was read but not kept, and why: columns `DROPPED_COLUMNS`."""
    report: pd.DataFrame
    """Counts: columns `source, category, split, step, rows, detail`; per source, read = kept +
    everything dropped."""
    manifest: dict[str, Any]
    """Sources with revision and licence, ids per split, sha256 of the records."""

    def select(
        self,
        split: str | None = None,
        category: str | None = None,
        role: str | Sequence[str] | None = None,
        ood_set: str | None = None,
    ) -> SplitRows:
        """The rows that match every given condition, in order; `ood_set=""` means in distribution.

        A category also brings the benign prompts that all categories share (their own category is
        "benign").
        """
        wanted = {
            "split": split and (split,),
            "category": category and (category, SHARED),
            "role": (role,) if isinstance(role, str) else role,
            "ood_set": None if ood_set is None else (ood_set,),
        }
        keep = pd.Series(True, index=self.records.index)
        for column, values in wanted.items():
            if values is not None:
                keep &= self.records[column].isin(values)
        return SplitRows.of(self.records[keep].to_dict("records"))

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories that have target prompts, in alphabetical order."""
        targets = self.records.loc[self.records["role"] == "target", "category"]
        return tuple(sorted(targets.unique()))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the reader of any number on these prompts must know, one sentence each."""
        return tuple(self.manifest.get("warnings", ()))

    def save(self, folder: str | Path) -> None:
        """Write records, drops and report as Parquet, and manifest.json, into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            getattr(self, name).to_parquet(folder / f"{name}.parquet", index=False)
        write_json(folder / "manifest.json", self.manifest)

    @classmethod
    def load(cls, folder: str | Path) -> Policy:
        """Read what `save` wrote. Raises `CdeltaError` if the records are not those that the
        manifest froze.
        """
        folder = Path(folder)
        try:
            manifest = read_json(folder / "manifest.json")
            tables = [pd.read_parquet(folder / f"{name}.parquet") for name in TABLES]
            frozen = content_hash(tables[0]) == manifest["sha256"]
        except FileNotFoundError as error:
            raise CdeltaError(
                f"{folder}: no policy here ({Path(error.filename or '').name} is missing): build "
                "it first."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CdeltaError(f"{folder}: the policy is damaged: build it again.") from error
        if not frozen:
            raise CdeltaError(
                f"{folder}/records.parquet is not what manifest.json froze: build the policy again."
            )
        records, dropped, report = tables
        return cls(records, dropped, report, manifest)


def build_policy(
    policy: str,
    categories: Sequence[str] | None = None,
    extra: Sequence[str] = (),
    on_leak: str | None = None,
    tok=None,
    max_tokens: int = 0,
    everyday: bool = False,
) -> Policy:
    """Read a policy, clean it, split it, check it for leaks, and freeze it.

    Args:
        policy: "synthetic", "cast=PATH" (file or folder; "cast" alone downloads it), or the path of
            the user's own table (`readers.READERS`).
        categories: those that must be there (all, if not given); in a user's file without a
            category column, its name.
        extra: external test sets, "NAME" or "NAME=PATH" with the names of `sources.SOURCES`; they
            get `ood_set` NAME. One that cannot be had is skipped, with the reason in the report.
        on_leak: "stop" raises on prompts that nearly repeat each other across splits, listing them;
            "drop" removes the row on the training side (`leakage.KEEP_ORDER`). The default depends
            on the policy (`ON_LEAK`).
        tok, max_tokens: drop prompts that exceed this many tokens under the chat template (the
            tokenizer's own limit, if 0).
        everyday: add our own everyday prompts (`everyday.everyday_rows`) to the edit split.

    Everything that is not kept is in `Policy.dropped` and counted in `Policy.report`.
    """
    parts, skipped = _parts(policy, categories, extra)
    if everyday:
        origin = {
            "source": SOURCE,
            "pinned": True,
            "gated": False,
            "from": "cdelta.policy.everyday",
        }
        parts.append(Loaded(everyday_rows(categories), origin=origin))
    read = to_records(row for part in parts for row in part.rows)
    kept, dropped = _clean(read, tok, max_tokens)
    rule = on_leak or ON_LEAK.get(policy.partition("=")[0], "stop")
    kept, leaked = _without_leaks(kept, rule, policy)
    dropped = pd.concat([dropped, leaked], ignore_index=True)
    _check_categories(kept, categories, policy)
    report = _report(read, kept, dropped, parts, skipped)
    return Policy(kept, dropped, report, _manifest(policy, kept, parts))


def _parts(
    policy: str, categories: Sequence[str] | None, extra: Sequence[str]
) -> tuple[list[Loaded], dict[str, str]]:
    """The policy's rows and those of the extra test sets, and why some of these were skipped."""
    parts, skipped = [_policy_rows(policy, categories)], {}
    for spec in extra:
        name, _, path = spec.partition("=")
        if name not in SOURCES:
            raise CdeltaError(f"unknown test set {name!r}: use one of {', '.join(SOURCES)}.")
        try:
            loaded = load(name, path)
        except SourceUnavailable as error:
            skipped[name] = str(error)
            continue
        rows = [row | {"ood_set": name, "split": "test"} for row in loaded.rows]
        parts.append(replace(loaded, rows=rows))
    return parts, skipped


def _policy_rows(policy: str, categories: Sequence[str] | None) -> Loaded:
    name, _, path = policy.partition("=")
    if policy == "synthetic":
        module = "cdelta.policy.synthetic"
        origin = {"source": name, "pinned": True, "gated": False, "from": module}
        return Loaded(importlib.import_module(module).records(), origin=origin)
    if name in SOURCES:
        return load(name, path)
    rows = read_user_rows(policy, categories[0] if categories else Path(policy).stem)
    origin = {
        "source": rows[0]["source"],
        "sha256": file_hash(policy),
        "pinned": False,
        "gated": False,
        "from": policy,
    }
    return Loaded(rows, origin=origin)


# ---------------------------------------------------------------------- cleaning


def _clean(read: pd.DataFrame, tok, max_tokens: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows worth keeping, and the others with the reason. Duplicates across splits stay: they
    are leaks.
    """
    first = read.groupby(["id", "split"])[["source_id", "expected", "pair_id"]].transform("first")
    again = read.duplicated(["id", "split"])
    reason = pd.Series("", index=read.index)
    limit = max_tokens or getattr(tok, "model_max_length", 0)
    reason[_too_long(read, tok, limit)] = f"longer than {limit} tokens"
    reason[again] = "duplicate prompt"
    reason[again & (read["expected"] != first["expected"])] = "same prompt with another label"
    reason[read["prompt"].str.strip() == ""] = "empty prompt"
    out = reason != ""
    matches = first["source_id"].where(again, "")
    dropped = _dropped(read[out], reason[out].tolist(), matches[out].tolist())
    return _relinked(read, first, again)[~out].reset_index(drop=True), dropped


def _too_long(read: pd.DataFrame, tok, limit: int) -> pd.Series:
    """Which prompts exceed the limit; one of half as many bytes cannot, and is not tokenized."""

    def exceeds(prompt: str) -> bool:
        return 2 * len(prompt.encode()) > limit and len(chat_ids(tok, prompt)) > limit

    prompts = read["prompt"].tolist()
    return pd.Series([tok is not None and exceeds(each) for each in prompts], index=read.index)


def _relinked(read: pd.DataFrame, first: pd.DataFrame, again: pd.Series) -> pd.DataFrame:
    """Targets whose benign counterpart duplicates an earlier benign prompt take that one as their
    own.
    """
    moved = again & (read["role"] == "benign") & (read["pair_id"] != "")
    link = dict(zip(read["pair_id"][moved].tolist(), first["pair_id"][moved].tolist()))
    return read.assign(pair_id=[link.get(pair, pair) for pair in read["pair_id"].tolist()])


def _dropped(rows: pd.DataFrame, reasons: Sequence[str], matches: Sequence[str]) -> pd.DataFrame:
    named = rows.assign(reason=reasons, match=matches)[list(DROPPED_COLUMNS)]
    return named.reset_index(drop=True).astype(str)


def _without_leaks(
    records: pd.DataFrame, on_leak: str, policy: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    if on_leak not in ("stop", "drop"):
        raise CdeltaError(f"on_leak={on_leak!r} is unknown: use 'stop' or 'drop'.")
    leaks = leaking_rows(records, find_overlaps(records))
    if len(leaks) and on_leak == "stop":
        raise CdeltaError(_leak_message(records, leaks, policy))
    row, kept = leaks["row"].to_numpy(), leaks["kept"].to_numpy()
    reasons = [f"near-duplicate of a {split} row" for split in records["split"].to_numpy()[kept]]
    gone = _dropped(records.iloc[row], reasons, records["source_id"].to_numpy()[kept])
    return records.drop(index=row).reset_index(drop=True), gone


def _leak_message(records: pd.DataFrame, leaks: pd.DataFrame, policy: str) -> str:
    name = (records["source_id"] + " (" + records["split"] + ")").tolist()
    named = [f"{name[a]} ~ {name[b]}" for a, b in leaks.head(5).itertuples(index=False)]
    ours = policy.partition("=")[0] in ("synthetic", *SOURCES)
    remedy = "build with on_leak='drop'" if ours else "leave their split cells empty"
    return (
        f"{policy}: {len(leaks)} rows nearly repeat a row of another split, {'; '.join(named)}: "
        f"put them into one split, remove them, or {remedy}."
    )


def _check_categories(kept: pd.DataFrame, categories: Sequence[str] | None, policy: str) -> None:
    targets = kept[kept["role"] == "target"]
    there = sorted(targets["category"].unique())
    for category in categories or there or [""]:
        if category not in there:
            raise CdeltaError(
                f"{policy}: no prompts of category {category!r} (there are: "
                f"{', '.join(there) or 'none'}): fill the prompt column or name another category."
            )
        own = (kept["role"] == "benign") & kept["category"].isin((category, SHARED))
        benign, prompts = kept[own], targets[targets["category"] == category]
        if len(benign) < len(SPLITS) <= len(prompts):  # then it is these that keep prompts together
            _check_splits(benign, category, "benign prompts", policy)
        _check_splits(prompts, category, "prompts", policy)
        _check_splits(benign, category, "benign prompts", policy)


def _check_splits(rows: pd.DataFrame, category: str, side: str, policy: str) -> None:
    empty = [split for split in SPLITS if split not in set(rows["split"])]
    if empty:
        raise CdeltaError(
            f"{policy}: category {category!r} has {len(rows)} {side} and none in the split "
            f"{', '.join(empty)}: add rows that differ from each other, or assign them in a split "
            "column."
        )


# ---------------------------------------------------------------------- report and manifest


def _report(
    read: pd.DataFrame,
    kept: pd.DataFrame,
    dropped: pd.DataFrame,
    parts: Sequence[Loaded],
    skipped: Mapping[str, str],
) -> pd.DataFrame:
    """Counts per source, category and split of what was read, kept, and dropped for each reason;
    then whole sources.
    """
    reasons = dropped.assign(step="dropped: " + dropped["reason"])
    steps = pd.concat([read.assign(step="read"), kept.assign(step="kept"), reasons])
    by = ["source", "category", "split", "step"]
    counts = steps.groupby(by, as_index=False, sort=False).size().rename(columns={"size": "rows"})
    whole = [(name, "skipped", 0, reason) for name, reason in skipped.items()]
    for part in reversed(parts):
        if part.not_selected:
            name = part.origin["source"]
            whole.insert(0, (name, "not selected", part.not_selected, SOURCES[name].selects))
    rows = [
        {"source": name, "category": "", "split": "", "step": step, "rows": n, "detail": detail}
        for name, step, n, detail in whole
    ]
    return pd.DataFrame(counts.assign(detail="").to_dict("records") + rows)


def _manifest(policy: str, kept: pd.DataFrame, parts: Sequence[Loaded]) -> dict[str, Any]:
    origin = ["source", "source_revision", "license"]
    contents = kept.groupby(origin, as_index=False, sort=False).size()
    warnings = template_warnings(kept.to_dict("records"))
    return {
        "policy": policy,
        "rows": len(kept),
        "sha256": content_hash(kept),
        "category_maps": VERSION,
        "contents": contents.rename(columns={"size": "rows"}).to_dict("records"),
        "sources": [dict(part.origin) for part in parts],
        "ids": {split: kept.loc[kept["split"] == split, "id"].tolist() for split in SPLITS},
    } | ({"warnings": warnings} if warnings else {})
