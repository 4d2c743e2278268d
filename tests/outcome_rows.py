"""Outcome rows made by hand."""

from __future__ import annotations

import pandas as pd


def make(method, category="", seed=0, **refused):
    """Ten rows per role and category; ``crime_target=0.7`` refuses seven of ten."""
    rows = []
    for name in ("crime", "hate"):
        for role in ("target", "benign", "borderline"):
            rows += _ten(f"{name}_{role}", name, role, refused)
    rows += _ten("weapons", "weapons", "other_harm", {"weapons": 1.0} | refused) + _ten(
        "add", "other", "utility", refused, skill="add"
    )
    rows += _ten("crime_target_words", "crime", "target", refused, ood_set="held_out_words")
    rows += _ten("crime_benign_words", "crime", "benign", refused, ood_set="held_out_words")
    common = {
        "method": method,
        "edit_category": category,
        "seed": seed,
        "k": 0.5 * (method != "base"),
        "param_fraction": 0.04,
        "attack": "",
    }
    return pd.DataFrame(rows).assign(**common)


def _ten(name, category, role, refused, ood_set="", skill=""):
    share = refused.get(name, 0.0)
    return [
        {
            "id": f"{name}{i}",
            "category": category,
            "role": role,
            "ood_set": ood_set,
            "skill": skill,
            "outcome": "refuse" if i < 10 * share else "comply",
            "correct": (i < 10 * share) if role == "utility" else pd.NA,
            "n_tokens": 10 + i,
            "finished": i < 9,
            "source": "by hand",
        }
        for i in range(10)
    ]


ROWS = pd.concat([
    make("base", add=1.0, crime_target=0.2),
    make("cdelta", "crime", crime_target=1.0, crime_benign=0.1, add=0.9, crime_target_words=0.8),
    make("cdelta", "hate", hate_target=0.7, crime_target=0.3, add=1.0),
    make("as", "crime", crime_target=0.8, crime_benign=0.6, hate_target=0.5, add=0.4),
], ignore_index=True)  # fmt: skip
