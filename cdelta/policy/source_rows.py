"""How one row of each source becomes records: (upstream split, index, row) -> records without
provenance.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Mapping

from cdelta.policy.category_maps import to_category
from cdelta.policy.records import OTHER, SHARED
from cdelta.policy.upstream import Row, Tables

Values = Mapping[str, Any]

CAST_COLUMNS = {
    "crime": "crime_planning",
    "hate": "hate_speech",
    "health": "health_consultation",
    "legal": "legal_opinion",
    "sexual": "sexual_content",
}
CAST_SPLITS = (("discover", 250), ("edit", 600), ("val", 700))
"""Our splits of CAST's 700 train rows, by index: the first index that no longer belongs to the
split. Test stays test."""
NEVER_ASKED = (64, 69)
"""Harmful rows of JailbreakBench that no model here is asked: they concern child abuse."""


def _row(name: str, prompt: str, category: str, expected: str, role: str, **more: str) -> Row:
    """A test row of an external source: alone in its group unless `more` says otherwise."""
    return {
        "prompt": prompt,
        "category": category,
        "expected": expected,
        "role": role,
        "source_id": name,
        "group_id": name,
        "split": "test",
    } | more


def _harmful(name: str, prompt: str, category: str) -> Row:
    return _row(name, prompt, category, "refuse", "other_harm" if category == OTHER else "target")


def _harmless(name: str, prompt: str, category: str, role: str, **more: str) -> Row:
    """A prompt of one of our categories, or of all of them."""
    return _row(name, prompt, SHARED if category == OTHER else category, "comply", role, **more)


def _cast(split: str, index: int, row: Values) -> list[Row]:
    """The five category prompts and the base prompt, their common benign counterpart."""
    ours = next((name for name, stop in CAST_SPLITS if index < stop), "val")
    name = f"{split}/{index}"
    shared = {
        "group_id": name,
        "pair_id": f"cast/{name}",
        "split": "test" if split == "test" else ours,
    }
    base = _row(f"{name}/base", row["base"], SHARED, "comply", "benign", **shared)
    return [base] + [
        _row(f"{name}/{column}", row[column], category, "refuse", "target", **shared)
        for category, column in CAST_COLUMNS.items()
    ]


def _xstest(split: str, index: int, row: Values) -> list[Row]:
    name = f"{row['id']}/{row['type']}"
    if row["label"] == "safe":
        return [_harmless(name, row["prompt"], SHARED, "borderline")]
    return [_harmful(name, row["prompt"], OTHER)]


def _or_bench_hard(split: str, index: int, row: Values) -> list[Row]:
    category = to_category("or-bench", row["category"])
    return [_harmless(f"{index}/{row['category']}", row["prompt"], category, "borderline")]


def _sorry_bench(split: str, index: int, row: Values) -> list[Row]:
    if row["prompt_style"] != "base":
        return []
    category = to_category("sorry-bench", str(row["category"]))
    return [_harmful(str(row["question_id"]), row["turns"][0], category)]


def _harmbench(split: str, index: int, row: Values) -> list[Row]:
    context, behaviour = row["ContextString"], row["Behavior"]
    prompt = f"{context}\n\n{behaviour}" if context else behaviour
    return [_harmful(row["BehaviorID"], prompt, to_category("harmbench", row["SemanticCategory"]))]


def _jailbreakbench(split: str, index: int, row: Values) -> list[Row]:
    """Harmful and benign behaviours are aligned row by row, so a row pairs with its namesake of the
    other split.
    """
    if split == "harmful" and index in NEVER_ASKED:
        return []
    category = to_category("jailbreakbench", row["Category"])
    pair = {"group_id": str(index), "pair_id": f"jailbreakbench/{index}"}
    if split == "harmful":
        return [_harmful(f"harmful/{index}", row["Goal"], category) | pair]
    return [_harmless(f"benign/{index}", row["Goal"], category, "benign", **pair)]


def _air_bench(split: str, index: int, row: Values) -> list[Row]:
    category = to_category("air-bench", row["l4-name"])
    if row["l3-name"] != "Advice in Heavily Regulated Industries" or category == OTHER:
        return []
    return [_harmful(f"{row['cate-idx']}/{index}", row["prompt"], category)]


def _mapped(
    prompt: str, category: str, source: str, split: str, index: int, row: Values
) -> list[Row]:
    """A harmful prompt whose source's category stands in a column."""
    return [_harmful(f"{split}/{index}", row[prompt], to_category(source, row[category]))]


def _advbench(split: str, index: int, row: Values) -> list[Row]:
    return [_harmful(str(index), row["prompt"], "crime")]


def _gsm8k(split: str, index: int, row: Values) -> list[Row]:
    answer = row["answer"].rsplit("####", 1)[-1].strip().replace(",", "")
    more = {"reference": answer, "skill": "gsm8k"}
    return [_row(str(index), row["question"], OTHER, "comply", "utility", **more)]


TO_ROWS: Mapping[str, Callable[[str, int, Values], list[Row]]] = {
    "cast": _cast,
    "xstest": _xstest,
    "harmbench": _harmbench,
    "or-bench-hard": _or_bench_hard,
    "or-bench-toxic": partial(_mapped, "prompt", "category", "or-bench"),
    "sorry-bench": _sorry_bench,
    "jailbreakbench": _jailbreakbench,
    "air-bench": _air_bench,
    "catqa": partial(_mapped, "Question", "Category", "catqa"),
    "advbench": _advbench,
    "strongreject": partial(_mapped, "prompt", "category", "strongreject"),
    "gsm8k": _gsm8k,
}


def _catqa_tables(questions: Mapping[str, Mapping[str, list[str]]]) -> Tables:
    """{category: {subcategory: questions}}, as the authors' repository keeps it -> the hub's
    rows."""
    rows = [
        {"Question": question, "Category": category, "Subcategory": subcategory}
        for category, subcategories in questions.items()
        for subcategory, asked in subcategories.items()
        for question in asked
    ]
    return {"en": rows}


UNPACK: Mapping[str, Callable[[Any], Tables]] = {"catqa": _catqa_tables}
