"""Everyday prompts stand in the edit split, share no prompt with each other, and cover every
category.
"""

from cdelta.policy.records import SHARED, to_records
from cdelta.policy.synthetic import everyday_rows

CATEGORIES = ("crime", "hate", "health", "legal", "sexual")


def test_everyday_rows_are_records_of_the_edit_split():
    records = to_records(everyday_rows())
    assert set(records["split"]) == {"edit"} and not records["id"].duplicated().any()
    assert set(records.loc[records["role"] == "borderline", "category"]) == set(CATEGORIES)
    assert (records.loc[records["role"] == "benign", "category"] == SHARED).all()


def test_borderline_ones_of_other_categories_can_be_left_out():
    rows = everyday_rows(["crime"])
    assert {row["category"] for row in rows} == {"crime", SHARED}
