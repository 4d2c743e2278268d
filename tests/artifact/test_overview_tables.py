"""Tables of pairs and edges for the notebooks."""

import pytest
from toys import toy_pairs
from transformers import AutoTokenizer

from cdelta.artifact.overview import quadrature_errors, seen_pairs, strongest
from cdelta.attribution.scores import attribute
from cdelta.paths import ORGANISM
from cdelta.policy.build import build_policy


def metric(logits):
    return logits[:, 5] - logits[:, 9]


@pytest.fixture(scope="module")
def base():
    records = build_policy("synthetic").records
    blatant = records["prompt"].str.contains(" rob | hateful ") & (records["role"] == "target")
    refuse = blatant | (records["role"] == "other_harm")
    return records.assign(
        outcome=refuse.map({True: "refuse", False: "comply"}),
        answer=refuse.map({True: "I refuse.", False: "Sure."}),
    )


@pytest.mark.long
def test_seen_pairs_shows_one_pair_per_outcome_token_by_token(base):
    tok = AutoTokenizer.from_pretrained(ORGANISM)
    seen = seen_pairs(base.drop(columns=["outcome", "answer"]), base, tok, "crime", most=12)
    assert seen["role"].tolist() == ["target", "benign"] * 2 and seen["outcome"].tolist() == [
        "refuse",
        "comply",
        "comply",
        "comply",
    ]
    for row in seen.itertuples():
        assert (
            len(row.tokens) == len(row.differs) == 13
            and row.tokens[-1] == "…"
            and sum(row.differs) == 1
        )
    assert seen["tokens"][0][seen["differs"][0].index(True)] == " rob"
    assert seen_pairs(
        base.assign(pair_id="").drop(columns=["outcome", "answer"]), base, tok, "crime"
    ).empty


def test_strongest_edges_are_the_largest_by_size(llama):
    scores = attribute(llama, toy_pairs(), metric)
    top = strongest(scores, 5)
    assert (
        top["score"].abs().tolist()
        == scores.edges.abs().flatten().sort(descending=True).values[:5].tolist()
    )
    row = top.iloc[2]
    assert (
        scores.edges[
            scores.sources.index(row["source"]), scores.readers.index(row["reader"])
        ].item()
        == row["score"]
    )


def test_convergence_has_every_method_and_falls_with_the_steps(llama):
    table, fine = quadrature_errors(llama, toy_pairs(), metric, (1, 8))
    assert table["method"].value_counts().to_dict() == {
        "EAP-IG midpoint": 2,
        "EAP-IG left": 2,
        "EAP-IG right": 2,
        "EAP": 1,
        "clean-corrupted": 1,
    }
    assert fine.steps == 16 and table.columns.tolist() == [
        "method",
        "gradients",
        "completeness",
        "edges",
    ]
    mid = table[table["method"] == "EAP-IG midpoint"]["edges"].tolist()
    eap = table.set_index("method").loc["EAP", "edges"]
    assert mid[1] < mid[0] and mid[1] < eap == pytest.approx(
        table[table["method"] == "EAP-IG right"]["edges"].iloc[0]
    )
