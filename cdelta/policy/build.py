"""From a policy's name to frozen records: the one entry point of the command line and of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import pandas as pd

from cdelta.errors import CdeltaError, first_line
from cdelta.files import file_hash, read_json, write_json
from cdelta.models.chat import chat_ids
from cdelta.policy import synthetic
from cdelta.policy.leakage import find_overlaps, leaking_rows
from cdelta.policy.records import SHARED, SPLITS, SplitRows, content_hash, to_records
from cdelta.policy.sources import SOURCES, VERSION, Loaded, SourceUnavailable, load
from cdelta.policy.user_file import read_user_rows, template_warnings

DROPPED_COLUMNS = ["source", "source_id", "category", "role", "split", "reason", "match", "prompt"]
TABLES = ("records", "dropped", "report")


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

    def select(self, category: str = "", **wanted: str | Sequence[str]) -> SplitRows:
        """The rows whose columns hold the wanted value, or one of several, in order; `ood_set=""`
        means in distribution.

        A category also brings the benign prompts that all categories share (their own category is
        "benign").
        """
        if category:
            wanted["category"] = (category, SHARED)
        rows = self.records
        for column, values in wanted.items():
            rows = rows[rows[column].isin([values] if isinstance(values, str) else values)]
        return SplitRows.of(rows.to_dict("records"))

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
            records, dropped, report = (
                pd.read_parquet(folder / f"{name}.parquet") for name in TABLES
            )
            frozen = content_hash(records) == manifest["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CdeltaError(
                f"{folder}: no policy here, or a damaged one ({first_line(error)}): build it again."
            ) from error
        if not frozen:
            raise CdeltaError(
                f"{folder}/records.parquet is not what manifest.json froze: build the policy again."
            )
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
            the user's own table (`user_file.READERS`).
        categories: those that must be there (all, if not given); in a user's file without a
            category column, its name.
        extra: external test sets, "NAME" or "NAME=PATH" with the names of `sources.SOURCES`; they
            get `ood_set` NAME. One that cannot be had is skipped, with the reason in the report.
        on_leak: "stop" raises on prompts that nearly repeat each other across splits, listing them;
            "drop" removes the row on the training side (`leakage.KEEP_ORDER`), which CAST, known to
            have some, does unless told. Our own set must have none, and in a user's file, whose
            near-duplicates share a group, a leak comes from the splits that the user wrote.
        tok, max_tokens: drop prompts that exceed this many tokens under the chat template (the
            tokenizer's own limit, if 0).
        everyday: add our own everyday prompts (`synthetic.everyday_rows`) to the edit split.

    Everything that is not kept is in `Policy.dropped` and counted in `Policy.report`.
    """
    parts = [_policy_rows(policy, categories)]
    tests, skipped = _test_sets(extra)
    parts += tests
    if everyday:
        parts.append(_our_own("everyday", synthetic.everyday_rows(categories)))
    read = to_records(row for part in parts for row in part.rows)
    kept, dropped = _clean(read, tok, max_tokens)
    kept, leaked = _without_leaks(kept, on_leak, policy)
    dropped = pd.concat([dropped, leaked], ignore_index=True)
    _check_categories(kept, categories, policy)
    report = _report(read, kept, dropped, parts, skipped)
    return Policy(kept, dropped, report, _manifest(policy, kept, parts))


def _policy_rows(policy: str, categories: Sequence[str] | None) -> Loaded:
    name, _, path = policy.partition("=")
    if policy == "synthetic":
        return _our_own(name, synthetic.records())
    if name in SOURCES:
        return load(name, path)
    rows = read_user_rows(policy, categories[0] if categories else Path(policy).stem)
    origin = {"source": rows[0]["source"], "sha256": file_hash(policy)}
    return Loaded(rows, origin | {"pinned": False, "gated": False, "from": policy})


def _our_own(name: str, rows: list[dict[str, str]]) -> Loaded:
    origin = {"source": name, "pinned": True, "gated": False, "from": synthetic.__name__}
    return Loaded(rows, origin)


def _test_sets(extra: Sequence[str]) -> tuple[list[Loaded], list[tuple[str, str]]]:
    """The extra test sets, and why some of these were skipped."""
    found, skipped = [], []
    for spec in extra:
        name, _, path = spec.partition("=")
        if name not in SOURCES:
            raise CdeltaError(f"unknown test set {name!r}: use one of {', '.join(SOURCES)}.")
        try:
            loaded = load(name, path)
        except SourceUnavailable as error:
            skipped.append((name, str(error)))
            continue
        for row in loaded.rows:
            row |= {"ood_set": name, "split": "test"}
        found.append(loaded)
    return found, skipped


# ---------------------------------------------------------------------- cleaning


def _clean(read: pd.DataFrame, tok, max_tokens: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows worth keeping, and the others with the reason. Duplicates across splits stay: they
    are leaks.

    Targets whose benign counterpart duplicates an earlier benign prompt take that one as their own.
    """
    columns = ["source_id", "expected", "pair_id"]
    first = read.groupby(["id", "split"])[columns].transform("first")
    again = read.duplicated(["id", "split"])
    reason = pd.Series("", index=read.index)
    limit = max_tokens or getattr(tok, "model_max_length", 0)
    for row, prompt in read["prompt"].items() if tok is not None else ():
        # one of half as many bytes is within the limit, and not tokenized
        if 2 * len(prompt.encode()) > limit and len(chat_ids(tok, prompt)) > limit:
            reason[row] = f"longer than {limit} tokens"
    reason[again] = "duplicate prompt"
    reason[again & (read["expected"] != first["expected"])] = "same prompt with another label"
    reason[read["prompt"].str.strip() == ""] = "empty prompt"
    out = reason != ""
    dropped = read.assign(reason=reason, match=first["source_id"].where(again, ""))[out]
    moved = again & (read["role"] == "benign") & (read["pair_id"] != "")
    link = dict(zip(read["pair_id"][moved], first["pair_id"][moved]))
    kept = read.assign(pair_id=read["pair_id"].map(lambda pair: link.get(pair, pair)))[~out]
    return kept.reset_index(drop=True), dropped[DROPPED_COLUMNS]


def _without_leaks(
    records: pd.DataFrame, on_leak: str | None, policy: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    name = policy.partition("=")[0]
    on_leak = on_leak or ("drop" if name == "cast" else "stop")
    if on_leak not in ("stop", "drop"):
        raise CdeltaError(f"on_leak={on_leak!r} is unknown: use 'stop' or 'drop'.")
    leaks = leaking_rows(records, find_overlaps(records))
    gone = records.iloc[leaks["row"]]
    match = records.iloc[leaks["kept"]].set_axis(gone.index)
    if len(gone) and on_leak == "stop":
        first, second = (each["source_id"] + " (" + each["split"] + ")" for each in (gone, match))
        ours = name in ("synthetic", *SOURCES)
        remedy = "build with on_leak='drop'" if ours else "leave their split cells empty"
        raise CdeltaError(
            f"{policy}: {len(gone)} rows nearly repeat a row of another split, "
            f"{'; '.join((first + ' ~ ' + second).head(5))}: put them into one split, remove them, "
            f"or {remedy}."
        )
    reason = "near-duplicate of a " + match["split"] + " row"
    dropped = gone.assign(reason=reason, match=match["source_id"])[DROPPED_COLUMNS]
    return records.drop(index=gone.index).reset_index(drop=True), dropped


def _check_categories(kept: pd.DataFrame, categories: Sequence[str] | None, policy: str) -> None:
    """Every category has prompts and benign prompts in every split."""
    there = sorted(kept["category"][kept["role"] == "target"].unique())
    for category in categories or there or [""]:
        if category not in there:
            raise CdeltaError(
                f"{policy}: no prompts of category {category!r} (there are: "
                f"{', '.join(there) or 'none'}): fill the prompt column or name another category."
            )
        own = kept[kept["category"].isin((category, SHARED))]
        roles = {"target": "prompts", "benign": "benign prompts"}
        sides = [(own[own["role"] == role], words) for role, words in roles.items()]
        for rows, words in sorted(sides, key=lambda side: len(side[0])):
            empty = [split for split in SPLITS if split not in set(rows["split"])]
            if empty:
                raise CdeltaError(
                    f"{policy}: category {category!r} has {len(rows)} {words} and none in the "
                    f"split {', '.join(empty)}: add rows that differ from each other, or assign "
                    "them in a split column."
                )


# ---------------------------------------------------------------------- report and manifest


def _report(
    read: pd.DataFrame,
    kept: pd.DataFrame,
    dropped: pd.DataFrame,
    parts: Sequence[Loaded],
    skipped: Sequence[tuple[str, str]],
) -> pd.DataFrame:
    """Counts per source, category and split of what was read, kept, and dropped for each reason;
    then whole sources.
    """
    reasons = dropped.assign(step="dropped: " + dropped["reason"])
    steps = pd.concat([read.assign(step="read"), kept.assign(step="kept"), reasons])
    by = ["source", "category", "split", "step"]
    counts = steps.groupby(by, as_index=False, sort=False).size().rename(columns={"size": "rows"})
    rows, blank = counts.assign(detail="").to_dict("records"), dict.fromkeys(by, "")
    for part in parts:
        if part.not_selected:
            name = part.origin["source"]
            facts = {"rows": part.not_selected, "detail": SOURCES[name].selects}
            rows.append(blank | {"source": name, "step": "not selected"} | facts)
    for name, why in skipped:
        rows.append(blank | {"source": name, "step": "skipped", "rows": 0, "detail": why})
    return pd.DataFrame(rows)


def _manifest(policy: str, kept: pd.DataFrame, parts: Sequence[Loaded]) -> dict[str, Any]:
    origin = ["source", "source_revision", "license"]
    contents = kept.groupby(origin, as_index=False, sort=False).size()
    warnings = template_warnings(kept)
    return {
        "policy": policy,
        "rows": len(kept),
        "sha256": content_hash(kept),
        "category_maps": VERSION,
        "contents": contents.rename(columns={"size": "rows"}).to_dict("records"),
        "sources": [part.origin for part in parts],
        "ids": {split: kept.loc[kept["split"] == split, "id"].tolist() for split in SPLITS},
    } | ({"warnings": warnings} if warnings else {})
