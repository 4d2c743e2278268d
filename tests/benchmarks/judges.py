"""How well judges tell refusals in human-labelled answers.

    python tests/benchmarks/judges.py [--xstest FOLDER] [--model FOLDER --cast FOLDER]
                                      [--classifiers wildguard llama_guard harmbench]

Writes figures/bench/judges.csv: judge, set, half, n, accuracy, recall and false positives with
Wilson's 95 % intervals. Sets whose folder is not given are left out.

XSTest (450 completions of each model whose file is there, two annotators and a final label; partial
refusals count as refusals): the prompts with even numbers are the development half, those with odd
numbers are held out. SmolLM2 (labels in tests/fixtures/judge_labels_smollm2.csv, by hash, without
any text): greedy answers of SmolLM2-135M-Instruct to prompts of CAST, halved by the prompt's hash.
They are generated again, and an answer that is not the labelled one, letter for letter, is left out
and counted. 300 of the prompts were drawn at random within categories, 222 are more of those whose
answer begins with the token "I" or the like, where this model's refusals are. They were labelled
once, by the author of the rules, before any verdict of the rules on them was seen.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cdelta.evaluation.calibration import calibration
from cdelta.evaluation.classifiers import RULE_JUDGES, classifier, xstest_labels
from cdelta.evaluation.rates import Rate

ROOT = Path(__file__).resolve().parents[2]
LABELS = ROOT / "tests/fixtures/judge_labels_smollm2.csv"
HALVES = {True: "development", False: "held out"}
COLUMNS = (
    *("set", "half", "judge", "source", "n", "accuracy", "low", "high"),
    *("recall", "recall_low", "recall_high"),
    *("false_positives", "false_positives_low", "false_positives_high", "note"),
)
PUBLISHED = {
    "set": "XSTest",
    "half": "all",
    "judge": "XSTest's own string match",
    "source": "all",
    "n": 2250,
    "accuracy": 0.884,
    "note": "as published",
}


def sha(text: str) -> str:
    """Hash of a prompt or an answer, as the label file has it."""
    return hashlib.sha1(text.encode()).hexdigest()[:16]


def cast_prompts(folder: Path) -> dict[str, str]:
    """Hash -> prompt, of every prompt in CAST's condition_multiple.json."""
    table = json.loads((folder / "condition_multiple.json").read_text(encoding="utf-8"))
    rows = [row for split in ("train", "test") for row in table[split]]
    return {sha(prompt): prompt for row in rows for prompt in row.values()}


def smollm2_labels(model: Path, cast: Path) -> pd.DataFrame:
    """The labelled answers that the model gives again: ``prompt, answer, label, half``; an
    incoherent answer counts as none of a refusal.
    """
    from cdelta.models.generation import generate
    from cdelta.models.loading import load_model

    labels = pd.read_csv(LABELS, dtype=str)
    prompts = cast_prompts(cast)
    network, tok = load_model(model, dtype="float32", device="cpu")
    parts = []
    for limit, part in labels.groupby("limit"):
        asked = [prompts[key] for key in part["prompt"]]
        answers = generate(network, tok, asked, int(limit), batch_size=25, progress=True)
        part = part.assign(prompt=asked, hash=part["answer"], answer=answers)
        parts.append(part[part["hash"] == part["answer"].map(sha)])
    rows = pd.concat(parts)
    print(f"{len(rows)} of {len(labels)} answers are the labelled ones")
    return rows.assign(label=rows["label"].where(rows["label"] == "refuse", "comply"))


def measured(name: str, rows: pd.DataFrame, judges: Sequence[str]) -> list[dict]:
    """Every judge on both halves of a set."""
    tried = RULE_JUDGES | {key: classifier(key) for key in judges}
    found = []
    for half, part in rows.groupby("half"):
        table = calibration(part.reset_index(drop=True), tried).assign(set=name, half=half)
        found += table.to_dict("records")
        if "agreed" in part:
            found.append(
                {"set": name, "half": half, "judge": "the other annotator", "source": "all"}
                | Rate.of(part["agreed"], part.index).row("accuracy")
            )
    return found


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--xstest", type=Path, help="folder of XSTest's model_completions")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--cast", type=Path, help="folder with CAST's condition_multiple.json")
    parser.add_argument("--classifiers", nargs="*", default=[], help="classifier models to try")
    parser.add_argument("--out", type=Path, default=ROOT / "figures/bench/judges.csv")
    asked = parser.parse_args(arguments)
    rows: list[dict] = []
    if asked.xstest:
        human = xstest_labels(asked.xstest)
        human["half"] = human["tuned"].map(HALVES)
        rows += [PUBLISHED, *measured("XSTest", human, asked.classifiers)]
        whole = human[~human["partial"]]
        rows += measured("XSTest without partial refusals", whole, asked.classifiers)
    if asked.model and asked.cast:
        rows += measured("SmolLM2", smollm2_labels(asked.model, asked.cast), asked.classifiers)
    table = pd.DataFrame(rows).reindex(columns=list(COLUMNS)).round(3)
    print(table.to_string(index=False))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(asked.out, index=False, quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
    return rows


if __name__ == "__main__":
    main()
