"""Any file works as a policy or is one sentence that names it."""

import json
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from fuzz import Outcomes, examples, json_values
from hypothesis import given
from hypothesis import strategies as st

from cdelta.policy.user_file import READERS, read_user_rows

pytestmark = pytest.mark.long

NAMES = st.sampled_from(
    ["prompt", "benign", "Prompt", " benign ", "category", "split", "", "notes", "\ufeffprompt"]
)
CELLS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=10),
    st.sampled_from(
        ["", "edit", "test", '"', 'a "b" c', "a,b;c", "NaN", "=1+1", "\x00", "two\nlines"]
    ),
)
SEPARATORS = st.sampled_from([",", ";", "\t", "|", " "])
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252"])
ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n"])
HEADERS = st.just(["prompt", "benign"]) | st.lists(NAMES, max_size=5)


def work_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="cdelta-fuzz-"))


def test_fault_20_any_delimited_text_works_or_is_one_sentence(capsys):
    folder, outcomes = work_folder(), Outcomes()

    @examples(400)
    @given(HEADERS, st.lists(st.lists(CELLS, max_size=5), max_size=4), SEPARATORS, ENCODINGS, ENDS)
    def attempt(header, rows, separator, encoding, end):
        text = end.join(separator.join(row) for row in [header, *rows])
        path = folder / "fuzz.csv"
        path.write_bytes(text.encode(encoding, errors="replace"))
        outcomes.attempt(lambda: read_user_rows(path, "x"))

    attempt()
    outcomes.show("delimited text", capsys)


def test_fault_21_any_json_works_or_is_one_sentence(capsys):
    folder, outcomes = work_folder(), Outcomes()
    rows = st.dictionaries(st.sampled_from(["prompt", "benign", "x"]), json_values | CELLS)
    named = st.fixed_dictionaries({"prompt": json_values | CELLS, "benign": CELLS})
    tables = st.lists(rows | named | json_values, max_size=3)
    values = st.one_of(tables, named, json_values, tables.map(lambda table: {"rows": table}))

    @examples(300)
    @given(values, st.sampled_from(["json", "jsonl"]), st.integers(0, 40), st.booleans())
    def attempt(value, kind, cut, whole):
        lines = value if isinstance(value, list) and kind == "jsonl" else [value]
        text = "\n".join(map(json.dumps, lines))
        path = folder / f"fuzz.{kind}"
        path.write_text(text if whole else text[:-cut])
        outcomes.attempt(lambda: read_user_rows(path, "x"))

    attempt()
    outcomes.show("JSON", capsys)


def test_fault_21_any_frame_and_any_bytes_work_or_are_one_sentence(capsys):
    folder, outcomes = work_folder(), Outcomes()
    missing = st.sampled_from([None, "a", "b"])

    @examples(100)
    @given(st.lists(st.tuples(missing, missing), max_size=4), st.sampled_from(["string", "object"]))
    def frame(rows, dtype):
        path = folder / "fuzz.parquet"
        pd.DataFrame(rows, columns=["prompt", "benign"], dtype=dtype).to_parquet(path)
        outcomes.attempt(lambda: read_user_rows(path, "x"))

    @examples(200)
    @given(st.binary(max_size=60), st.sampled_from(sorted(READERS)))
    def anything(content, suffix):
        path = folder / f"fuzz{suffix}"
        path.write_bytes(content)
        outcomes.attempt(lambda: read_user_rows(path, "x"))

    frame()
    anything()
    outcomes.show("frames and bytes", capsys)
