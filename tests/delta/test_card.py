"""The card says what was done to what, how well, under which licence, and its limits."""

import pytest
import toys
from edits import mask_of, random_delta
from huggingface_hub.repocard import metadata_load

from cdelta.delta.apply import read_record, save_edited
from cdelta.delta.base import markdown_table
from cdelta.delta.weight_delta import compose
from cdelta.errors import CdeltaError


def test_card_and_record(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlicense_name: terms\n---\n# Base\n")
    delta = random_delta(toys.toy("llama")).with_metadata(base="some/model", base_revision="abc123")
    table = [{"prompts": "target", "n": 40, "refused": 0.98765, "low": 0.9, "high": 1.0}]
    out = save_edited(base, delta, tmp_path / "out", 0.5, selectivity=table)
    card = (out / "README.md").read_text()
    for text in (
        "weapons",
        f"{delta.count():,} parameters",
        "| target | 40 | 0.988 [0.900, 1.000] |",
        "`some/model`",
        "`abc123`",
        "cdelta verify",
        "cdelta revert",
        "What this does not promise",
        "not robust",
        "Responsible use",
        "0.5·ΔΘ",
    ):
        assert text in card
    front = metadata_load(out / "README.md")
    assert front["license"] == "apache-2.0" and front["license_name"] == "terms"
    assert front["base_model"] == "some/model"
    record = read_record(out)
    assert record["scale"] == 0.5 and record["delta_hash"] == delta.hash()
    assert record["mask_hash"] == mask_of(toys.toy("llama")).hash()
    (out / "cdelta" / "edit.json").write_text("{")
    with pytest.raises(CdeltaError, match="damaged"):
        read_record(out)


def test_card_of_several_categories(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    delta = random_delta(toys.toy("llama"))
    both = compose([delta, delta.with_metadata(category="fraud")])
    card = (save_edited(base, both, tmp_path / "out") / "README.md").read_text()
    assert "edited to refuse weapons+fraud" in card and "Not measured" in card
    assert metadata_load(tmp_path / "out" / "README.md")["library_name"] == "transformers"


def test_tables_show_intervals_beside_their_values():
    rows = [{"a|b": "x", "rate": 0.5, "rate_low": 0.25, "rate_high": 0.75, "n": 3}]
    assert markdown_table(rows).splitlines() == [
        "| a|b | rate | n |",
        "| --- | --- | --- |",
        "| x | 0.500 [0.250, 0.750] | 3 |",
    ]
    assert markdown_table([]) == ""
