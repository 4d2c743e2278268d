"""Subsets, the interference table by hand, and a category that is taken out again."""

import pandas as pd
import pytest
import toys
from edits import random_delta, same_weights, weights
from outcome_rows import make
from test_baselines import RECORDS

from cdelta.artifact.bench import Bench, merged
from cdelta.artifact.composition import conflict_table, interference, removals, subsets
from cdelta.delta.weight_delta import compose
from cdelta.edit.recipe import EditRecipe
from cdelta.edit.rows import training_rows
from cdelta.evaluation.judges import Rules
from cdelta.evaluation.measure import evaluate
from cdelta.methods.tuning import measure
from cdelta.models.spec import ModelSpec


def test_thirty_one_subsets_of_five():
    found = subsets("abcde")
    assert len(found) == len(set(found)) == 31
    assert found[0] == ("a",) and found[-1] == tuple("abcde")
    assert subsets("abc", (1,)) == [("a",), ("b",), ("c",), ("a", "b", "c")]
    assert subsets("ab", (5,)) == [("a", "b")]


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
    together = merged(records, ("crime", "hate"))
    assert list(together["category"]) == ["crime+hate"] * 4 + ["legal", "other"]
    rows = training_rows(together, "crime+hate", EditRecipe())
    assert [prompt for prompt, _ in rows.positive] == ["a", "c"]
    assert {prompt for prompt, _ in rows.retain} == set("bdef")


def test_interference_by_hand():
    rows = pd.concat(
        [
            make("base", crime_target=0.2, add=1.0),
            make("sum", "crime", crime_target=1.0, hate_target=0.1, hate_benign=0.3, add=0.9),
            make("joint", "crime+hate", crime_target=1.0, hate_target=0.9, weapons=0.8),
        ]
    )
    table = interference(rows[rows["ood_set"] == ""])
    table = table.set_index(["subset", "method", "prompt_category"])
    assert len(table) == 9
    assert set(table.index.get_level_values(0)) == {"base", "crime", "crime+hate"}
    assert list(table.loc[("crime", "sum"), "edited"]) == [True, False, False]
    spill = table.loc["crime", "sum", "hate"]
    names = ["refusal", "change", "benign_refusal", "utility", "n"]
    assert list(spill[names]) == pytest.approx([0.1, 0.1, 0.3, 0.9, 10])
    both = table.loc["crime+hate", "joint"]
    assert both.loc["weapons", "change"] == pytest.approx(-0.2) and both.loc["hate", "edited"]
    conflicts = conflict_table(table.reset_index(), {"crime+hate"})
    assert conflicts["least target"].tolist() == [0.9]
    assert conflicts["largest other change"].tolist() == pytest.approx([0.2])
    assert conflict_table(table.reset_index(), set()).empty


def test_a_category_is_taken_out_again(monkeypatch):
    """Two deltas that change what the toy says; the judge calls any changed answer a refusal."""
    model, tok = toys.toy("llama"), toys.toy_tokenizer()
    deltas = {
        name: random_delta(model, seed=seed, size=0.4).with_metadata(category=name, k=1.5)
        for seed, name in enumerate(("crime", "hate"))
    }
    before, ask = weights(model), {"max_new_tokens": 3}
    plain = evaluate(model, tok, RECORDS, **ask).set_index("prompt")["answer"]

    def changed(self, prompts, answers, *rest):
        said = zip(prompts, answers, strict=True)
        return ["comply" if plain[prompt] == answer else "refuse" for prompt, answer in said]

    monkeypatch.setattr(Rules, "__call__", changed)
    under = {"method": "sum", **ask}
    both = compose(list(deltas.values()))
    rows = [
        evaluate(model, tok, RECORDS, **ask),
        measure(model, tok, both, 1.0, RECORDS, edit_category="crime+hate", **under),
    ]
    alone = measure(model, tok, deltas["hate"], 1.5, RECORDS, edit_category="hate", **under)
    bench = object.__new__(Bench)
    vars(bench).update(model=model, tok=tok, spec=ModelSpec.from_model(model), options=ask)
    table = removals(bench, deltas, RECORDS, pd.concat(rows)).set_index("category")
    assert same_weights(model, before) and table["residual"].max() < 1e-6
    assert (table["refused_base"] == 0).all() and (table["refused_with"] > 0).all()
    for column, category in (("refused_without", "crime"), ("others_refused", "hate")):
        own = alone[(alone["category"] == category) & (alone["role"] == "target")]
        assert table.loc["crime", column] == (own["outcome"] == "refuse").mean()
