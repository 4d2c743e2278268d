"""All subsets, one scale for a sum that breaks the caps, the interference table by hand, and a category that is taken out again."""

import pandas as pd
import pytest
import toys
from edits import mask_of, random_delta, same_weights, weights
from test_baselines import RECORDS, rows_of
from test_results import make

from cdelta.artifact.composition import (
    common_scale,
    interference,
    merged,
    removals,
    subsets,
    union_mask,
)
from cdelta.delta.weight_delta import compose as composed
from cdelta.edit.rows import training_rows
from cdelta.edit.scale import Caps
from cdelta.evaluation.judges import Rules
from cdelta.evaluation.measure import evaluate
from cdelta.methods.tuning import measure


def test_thirty_one_subsets_of_five():
    found = subsets("abcde")
    assert (
        len(found) == len(set(found)) == 31 and found[0] == ("a",) and found[-1] == tuple("abcde")
    )
    assert subsets("abc", (1,)) == [("a",), ("b",), ("c",), ("a", "b", "c")] and subsets(
        "ab", (5,)
    ) == [("a", "b")]


def test_a_sum_within_the_caps_keeps_its_scale_and_another_shrinks(monkeypatch):
    tried = []

    def fake(model, tok, method, strength, records, /, **how):
        tried.append(strength)
        return rows_of(
            crime_target=1.0,
            hate_target=0.25 + strength / 2,
            crime_benign=0.0 if strength < 0.85 or method == "mild" else 0.5,
        )

    monkeypatch.setattr("cdelta.methods.tuning.measure", fake)
    ask = lambda delta: common_scale(
        None, None, delta, ("crime", "hate"), [], rows_of(), Caps(benign=0.1), (0.9, 0.8, 0.5)
    )
    assert ask("mild").strength == 1.0 and tried == [1.0]
    chosen = ask("wild")
    assert (chosen.strength, chosen.within_caps) == (0.8, True) and tried == [1.0, 1.0, 0.9, 0.8]
    assert chosen.curve["target"].item() == 0.75  # the least refused of the two, in quarters


def test_merging_makes_one_category_of_several():
    records = pd.DataFrame(
        {
            "split": "edit",
            "role": ["target", "benign", "target", "benign", "target", "utility"],
            "prompt": list("abcdef"),
            "category": ["crime", "crime", "hate", "hate", "legal", "other"],
            "answer": "Sure.",
            "outcome": "comply",
            "reference": "",
        }
    )
    merged = merged(records, ("crime", "hate"))
    assert list(merged["category"]) == ["crime+hate"] * 4 + ["legal", "other"]
    positive, negative, retain = training_rows(merged, "crime+hate")
    assert [p for p, _ in positive] == ["a", "c"] and {p for p, _ in retain} == set("bdef")


def test_the_union_of_masks_owns_what_any_owns():
    masks = [mask_of(toys.toy("llama"), seed=seed) for seed in range(3)]
    union = union_mask(masks)
    assert all((union & mask) == mask for mask in masks) and union.count() < sum(
        mask.count() for mask in masks
    )


def test_interference_by_hand():
    rows = pd.concat([make("base", crime_target=0.2, add=1.0), make("sum", "crime", crime_target=1.0, hate_target=0.1, hate_benign=0.3, add=0.9),
                      make("joint", "crime+hate", crime_target=1.0, hate_target=0.9, weapons=0.8)])  # fmt: skip
    table = interference(rows[rows["ood_set"] == ""]).set_index(
        ["subset", "method", "prompt_category"]
    )
    assert len(table) == 9 and set(table.index.get_level_values(0)) == {
        "base",
        "crime",
        "crime+hate",
    }
    assert list(table.loc[("crime", "sum"), "edited"]) == [True, False, False]
    spill = table.loc["crime", "sum", "hate"]
    assert (
        spill["refusal"],
        spill["change"],
        spill["benign_refusal"],
        spill["utility"],
        spill["n"],
    ) == pytest.approx((0.1, 0.1, 0.3, 0.9, 10))
    assert (
        table.loc["crime+hate", "joint", "weapons"]["change"] == pytest.approx(-0.2)
        and table.loc["crime+hate", "joint", "hate"]["edited"]
    )


def test_a_category_is_taken_out_again(monkeypatch):
    """Two deltas that each make the toy say the refusal to nothing but what their own weights change; the judge calls any changed answer a refusal."""
    model, tok = toys.toy("llama"), toys.toy_tokenizer()
    deltas = {
        name: random_delta(model, seed=seed, size=0.4).with_metadata(category=name, k=1.5)
        for seed, name in enumerate(("crime", "hate"))
    }
    before, ask = weights(model), {"max_new_tokens": 3}
    plain = {
        row["prompt"]: row["answer"]
        for row in evaluate(model, tok, RECORDS, **ask).to_dict("records")
    }
    monkeypatch.setattr(
        Rules,
        "__call__",
        lambda self, prompts, answers: [
            "comply" if plain[p] == a else "refuse" for p, a in zip(prompts, answers)
        ],
    )
    both = composed(list(deltas.values()))
    rows = pd.concat(
        [
            evaluate(model, tok, RECORDS, **ask),
            measure(
                model, tok, both, 1.0, RECORDS, method="sum", edit_category="crime+hate", **ask
            ),
        ]
    )
    alone = measure(
        model, tok, deltas["hate"], 1.5, RECORDS, method="sum", edit_category="hate", **ask
    )
    table = removals(model, tok, deltas, RECORDS, rows, **ask).set_index("category")
    assert (
        same_weights(model, before)
        and table["residual"].max() < 1e-6
        and (table["refused_base"] == 0).all()
        and (table["refused_with"] > 0).all()
    )
    crime = (alone["category"] == "crime") & (alone["role"] == "target")
    assert table.loc["crime", "refused_without"] == (alone.loc[crime, "outcome"] == "refuse").mean()
    hate = (alone["category"] == "hate") & (alone["role"] == "target")
    assert table.loc["crime", "others_refused"] == (alone.loc[hate, "outcome"] == "refuse").mean()
