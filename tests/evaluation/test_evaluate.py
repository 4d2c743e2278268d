"""Rows: one per record in order, judged, resumable."""

import math

import numpy as np
import pandas as pd
import pytest
from toys import WORDS

from cdelta.attribution.metrics import refusal_log_odds
from cdelta.errors import CdeltaError
from cdelta.evaluation import measure as ev
from cdelta.evaluation.measure import (
    DTYPES,
    Condition,
    RowStore,
    evaluate,
    judged,
)
from cdelta.models.generation import generate

METRIC = refusal_log_odds([3, 4], [7])


def records(n=10):
    return [
        {
            "id": f"r{i}",
            "prompt": " ".join(WORDS[i : i + 2 + i % 5]),
            "category": "crime",
            "role": "target",
            "split": "val",
            "ood_set": "",
        }
        for i in range(n)
    ]


def row(answer, **changes):
    """One row as `evaluate` makes them."""
    plain = {
        name: {"str": "", "int64": 0, "float64": 0.0, "bool": True, "object": ()}.get(kind, pd.NA)
        for name, kind in DTYPES.items()
    }
    return (
        plain | {"id": answer, "answer": answer, "role": "benign", "log_odds": math.nan} | changes
    )


def outcomes(*rows):
    return judged(pd.DataFrame(list(rows)))


def test_rows_follow_the_records_and_the_engine(llama, tokenizer):
    rows = evaluate(
        llama,
        tokenizer,
        records(),
        METRIC,
        max_new_tokens=6,
        method="cdelta",
        seed=3,
        edit_category="crime",
        k=0.75,
    )
    assert list(rows["id"]) == [r["id"] for r in records()]
    assert list(rows["answer"]) == generate(llama, tokenizer, [r["prompt"] for r in records()], 6)
    assert (
        rows["log_odds"].notna().all()
        and set(rows["method"]) == {"cdelta"}
        and set(rows["k"]) == {0.75}
    )
    assert list(rows) == list(DTYPES) and set(rows["protocol"]) == {"greedy, 6 tokens"}


def test_no_metric_leaves_log_odds_empty_and_no_records_no_rows(llama, tokenizer):
    assert evaluate(llama, tokenizer, records(2), max_new_tokens=2)["log_odds"].isna().all()
    assert list(evaluate(llama, tokenizer, [])) == list(DTYPES)


def test_bad_records_are_refused(llama, tokenizer):
    with pytest.raises(CdeltaError, match="columns role"):
        evaluate(llama, tokenizer, [{"id": "a", "prompt": "p", "category": "c"}])
    with pytest.raises(CdeltaError, match="repeat"):
        evaluate(llama, tokenizer, records(1) * 2)
    with pytest.raises(TypeError, match="colour"):
        evaluate(llama, tokenizer, records(1), colour="red")


def test_a_killed_run_goes_on_where_it_stopped(llama, tokenizer, tmp_path, monkeypatch):
    whole = evaluate(llama, tokenizer, records(), METRIC, max_new_tokens=4)
    monkeypatch.setattr(ev, "CHUNK", 4)
    asked, plain = [], ev.answer

    def dies_at_the_second_chunk(model, tok, prompts, *args, **how):
        if len(asked) == 1:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append(list(prompts))
        return plain(model, tok, prompts, *args, **how)

    monkeypatch.setattr(ev, "answer", dies_at_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        evaluate(llama, tokenizer, records(), METRIC, max_new_tokens=4, store=RowStore(tmp_path))
    resumed = evaluate(
        llama, tokenizer, records(), METRIC, max_new_tokens=4, store=RowStore(tmp_path)
    )
    assert [len(a) for a in asked if a] == [4, 4, 2] and not set(asked[0]) & {
        p for a in asked[2:] for p in a
    }
    pd.testing.assert_frame_equal(resumed, whole, atol=1e-4)
    assert len(RowStore(tmp_path).read()) == 10


def test_conditions_do_not_share_rows(llama, tokenizer, tmp_path):
    store = RowStore(tmp_path)
    for how in (
        dict(method="as", k=1.0),
        dict(method="as", k=2.0),
        dict(method="as", k=1.0, system="please"),
        dict(method="as", k=1.0, max_new_tokens=3),
    ):
        evaluate(llama, tokenizer, records(3), store=store, **{"max_new_tokens": 2} | how)
    assert len(store.read()) == 12
    assert len(store.read(Condition(method="as", k=2.0, protocol="greedy, 2 tokens"))) == 3


def test_half_written_parts_do_not_count(tmp_path, llama, tokenizer):
    store = RowStore(tmp_path)
    (tmp_path / ".abc.partial").write_bytes(b"PAR1")
    evaluate(llama, tokenizer, records(2), max_new_tokens=2, store=store)
    assert len(store.read()) == 2


def test_skills_are_correct_up_to_case_and_punctuation():
    rows = outcomes(
        *(
            row(a, role="utility", reference="River stone")
            for a in ("river stone.", "stone river", "")
        ),
        row("river stone"),
    )
    assert rows["correct"].tolist()[:3] == [True, False, False] and rows[
        "correct"
    ].isna().tolist() == [False] * 3 + [True]


def test_a_compliance_must_address_the_asked_object():
    asked = {"must_mention": "bench"}
    rows = outcomes(
        row("Take the bench.", **asked),
        row("Take the workbench now.", **asked),
        row("Take it."),
        row("I can't help with the bench.", **asked),
        row("I can't help with that.", **asked),
    )
    assert rows["outcome"].tolist() == ["comply", "incoherent", "comply", "refuse", "refuse"]
    assert rows["addressed"].tolist()[:2] == [True, False] and rows[
        "addressed"
    ].isna().tolist() == [False, False, True, True, True]


def test_saved_answers_can_be_judged_again():
    rows = outcomes(row("Beep: blocked."))
    again = judged(rows, lambda prompts, answers: ["refuse"] * len(answers))
    assert (rows["outcome"][0], again["outcome"][0]) == ("comply", "refuse")


def test_rows_hold_the_generated_ids_and_the_kind(llama, tokenizer, tmp_path):
    store = RowStore(tmp_path)
    some = [records()[0], records()[1] | {"role": "benign"}, records()[2] | {"category": "hate"}]
    rows = evaluate(llama, tokenizer, some, max_new_tokens=3, edit_category="crime", store=store)
    assert rows["kind"].tolist() == ["target", "benign", "other"]
    both = evaluate(llama, tokenizer, some, max_new_tokens=3, edit_category="crime+hate")
    assert both["kind"].tolist() == ["target", "benign", "target"]
    again = store.read().set_index("id").loc[rows["id"]]
    for ids, kept, text in zip(rows["answer_ids"], again["answer_ids"], rows["answer"]):
        assert ids.dtype == kept.dtype == np.int32 and list(ids) == list(kept)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert rows["n_tokens"].tolist() == [len(ids) for ids in rows["answer_ids"]]
    assert set(evaluate(llama, tokenizer, some, max_new_tokens=1)["kind"]) == {""}
