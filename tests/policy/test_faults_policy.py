"""Files as people have them: every one is read, or is one sentence with file, row and remedy."""

import io
import json
import random

import pandas as pd
import pytest

from cdelta.errors import CdeltaError
from cdelta.policy.build import Policy, build_policy
from cdelta.policy.records import SPLITS
from cdelta.policy.user_file import read_user_rows

LETTERS = "bcdfghklmnprst"
NOUNS = [f"{a}{vowel}{b}{b}er" for a in LETTERS for vowel, b in ("ag", "ot", "el", "un", "ip")][:60]
FOODS = [f"{a}{vowel}{b}ie" for a in LETTERS for vowel, b in ("ag", "ot", "el", "un", "ip")][:60]


def asks(count: int = 60) -> list[dict[str, str]]:
    """Rows that are nothing like each other."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "bcdfghjklm" for b in ("ana", "elo", "iru", "osk", "unt")]
    return [
        {side: " ".join(rng.choices(words, k=7)) for side in ("prompt", "benign")}
        for _ in range(count)
    ]


def prompts_of(path, content: str | bytes, encoding: str = "utf-8") -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return [row["prompt"] for row in read_user_rows(path, "x")]


def sentence(path, content: str | bytes = b"") -> str:
    """The error of a file, which is one line and names it."""
    with pytest.raises(CdeltaError) as caught:
        prompts_of(path, content)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- spreadsheets


@pytest.mark.parametrize(
    "content",
    [
        "prompt,benign,,\na,b,,\nc,d,,\n",
        ",prompt,benign\n0,a,b\n1,c,d\n",
        "\nprompt,benign\na,b\nc,d\n",
        ",,,\n,,,\nprompt,benign,,\na,b,,\nc,d\n",
        "sep=;\nprompt;benign\na;b\nc;d\n",
        "prompt;benign\na;b\nc;d\n",
        "prompt\tbenign\na\tb\nc\td\n",
        "prompt|benign\na|b\nc|d\n",
        "PROMPT , Benign\na,b\nc,d\n",
        '"Prompt","BENIGN"\r\n"a","b"\r\n"c","d"\r\n',
        "notes,prompt,notes,benign,notes\nx,a,y,b,z\nx,c,y,d,z\n",
        "prompt,benign\na,b,,\nc,d\n",
        "prompt,benign\ra,b\rc,d\r",
    ],
)
def test_fault_20_what_a_spreadsheet_writes_is_read(tmp_path, content):
    assert prompts_of(tmp_path / "my.csv", content) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["my.csv", "my.tsv", "my.txt"])
def test_fault_20_marks_and_encodings(tmp_path, name, encoding):
    found = prompts_of(tmp_path / name, "prompt\tbenign\ncafé ☕\tthé\n", encoding)
    assert found == ["café ☕", "thé"]


def test_fault_20_text_in_another_encoding_names_the_line(tmp_path):
    content = "prompt,benign\na,b\ncafé,d\n"
    assert "line 3: not UTF-8" in sentence(tmp_path / "l.csv", content.encode("latin-1"))
    assert "line 1: not UTF-8" in sentence(tmp_path / "u.csv", content.encode("utf-16-le"))
    assert "save it as UTF-8" in sentence(tmp_path / "b.csv", b"\xff\xfe\x00")


def test_fault_20_quotes_newlines_and_separators_inside_cells(tmp_path):
    cells = ['say "hi"; then, go', "two\nlines", "one\u2028odd\x0bline", "tab\there"]
    frame = pd.DataFrame({"prompt": cells, "benign": list("abcd")})
    for sep in ",;\t":
        text = frame.to_csv(index=False, sep=sep)
        assert prompts_of(tmp_path / "q.csv", text)[::2] == cells


def test_fault_20_a_column_of_ours_that_is_there_twice(tmp_path):
    assert "column prompt is there twice" in sentence(
        tmp_path / "t.csv", "prompt,benign,Prompt\na,b,c\n"
    )


def test_fault_20_workbooks_are_read_or_named(tmp_path, monkeypatch):
    path = tmp_path / "my.xlsx"
    frame = pd.DataFrame({"Prompt": ["a", "c"], "benign": ["b", None], "n": [1, 2]})
    sheets = {"cover": pd.DataFrame({"title": ["x"]}), "data": frame}
    monkeypatch.setattr(pd, "read_excel", lambda *args, **kw: sheets)
    assert prompts_of(path, b"") == ["a", "b", "c", ""]

    def absent(*args, **kw):
        raise ImportError("Missing optional dependency 'openpyxl'")

    monkeypatch.setattr(pd, "read_excel", absent)
    assert "openpyxl" in sentence(path) and "save it as CSV" in sentence(path)
    monkeypatch.undo()
    assert "not a readable" in sentence(path, b"PK\x03\x04 no workbook") or "openpyxl" in sentence(
        path
    )


# ---------------------------------------------------------------------- pandas


@pytest.mark.parametrize("dtype", ["string", "object", "category", "string[pyarrow]"])
def test_fault_21_missing_values_in_parquet_are_empty_cells(tmp_path, dtype):
    frame = pd.DataFrame({"prompt": ["a", None, "c"], "benign": ["b", "d", pd.NA]}, dtype=dtype)
    frame.to_parquet(tmp_path / "m.parquet")
    found = prompts_of(tmp_path / "m.parquet", (tmp_path / "m.parquet").read_bytes())
    assert found == ["a", "b", "", "d", "c", ""]


def test_fault_21_other_parquet_files(tmp_path):
    rows = pd.DataFrame(asks(4))
    rows.set_index("prompt").to_parquet(tmp_path / "i.parquet")
    content = (tmp_path / "i.parquet").read_bytes()
    assert prompts_of(tmp_path / "i.parquet", content)[::2] == rows["prompt"].tolist()
    rows.assign(prompt=range(4)).to_parquet(tmp_path / "n.parquet")
    assert "row 1: prompt is a int" in sentence(
        tmp_path / "n.parquet", (tmp_path / "n.parquet").read_bytes()
    )
    assert "not a readable .parquet file" in sentence(tmp_path / "b.parquet", content[:200])


def test_fault_21_whatever_pandas_writes_gives_the_same_prompts(tmp_path):
    frame = pd.DataFrame(asks(6))
    for orient in ("records", "columns", "split", "index"):
        text = frame.to_json(orient=orient)
        if orient in ("split", "index"):
            assert "no column" in sentence(tmp_path / "o.json", text) or "object" in text
            continue
        assert prompts_of(tmp_path / "o.json", text)[::2] == frame["prompt"].tolist()
    lines = frame.to_json(orient="records", lines=True)
    for name in ("l.json", "l.jsonl", "l.ndjson"):
        assert prompts_of(tmp_path / name, lines)[::2] == frame["prompt"].tolist()
    buffer = io.StringIO()
    frame.to_csv(buffer)  # with the index as an unnamed column
    assert prompts_of(tmp_path / "i.csv", buffer.getvalue())[::2] == frame["prompt"].tolist()


# ---------------------------------------------------------------------- JSON of chat loggers


@pytest.mark.parametrize(
    "value",
    [
        "a",
        {"role": "user", "content": "a"},
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        {"text": "a"},
        ["a"],
    ],
    ids=str,
)
def test_fault_21_nested_content_is_the_users_words(tmp_path, value):
    rows = [{"prompt": value, "benign": "b", "id": 7, "meta": {"x": [1]}}]
    assert prompts_of(tmp_path / "n.jsonl", json.dumps(rows[0])) == ["a", "b"]
    assert prompts_of(tmp_path / "n.json", json.dumps({"rows": rows})) == ["a", "b"]
    assert prompts_of(tmp_path / "n.json", json.dumps(rows, indent=2)) == ["a", "b"]


@pytest.mark.parametrize(
    "value, named",
    [
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "list"),
        (["a", "b"], "list"),
        ({"a": 1}, "dict"),
        (7, "int"),
        (True, "bool"),
    ],
    ids=str,
)
def test_fault_21_values_that_are_no_prompt_name_the_row(tmp_path, value, named):
    content = json.dumps({"prompt": value, "benign": "b"})
    assert f"row 1: prompt is a {named}, not text" in sentence(tmp_path / "v.jsonl", content)


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": NaN, "benign": "b"}',
        '\ufeff{"prompt": null, "benign": "b"}\n\n',
        '{"prompt": "", "benign": "b"}\r\n',
    ],
)
def test_fault_21_missing_values_in_json_lines_are_empty_cells(tmp_path, content):
    assert prompts_of(tmp_path / "n.jsonl", content) == ["", "b"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "", "not valid JSON"),
        ("a.json", "[]", "no rows"),
        ("a.json", "3", "a JSON int, not an object"),
        ("a.json", '[{"prompt": "a"}]', "no column benign"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.jsonl", "[" * 100_000, "not valid JSON"),
        ("a.jsonl", '"text"', "row 1: a JSON str"),
        ("a.jsonl", '{"prompt": "a", "PROMPT": "b", "benign": "c"}', "prompt is there twice"),
        ("a.docx", "", "unknown kind of file"),
        ("a", "", "unknown kind of file"),
    ],
)
def test_fault_21_files_that_cannot_be_read(tmp_path, name, content, message):
    assert message in sentence(tmp_path / name, content)


def test_fault_21_a_folder_is_no_file(tmp_path):
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(CdeltaError, match="no such file"):
        read_user_rows(tmp_path / "d.csv", "x")


# ---------------------------------------------------------------------- templated policies


def templated(path, count: int = 60, **columns) -> str:
    frame = pd.DataFrame(
        {
            "prompt": [f"Tell me how to make a {noun}" for noun in NOUNS[:count]],
            "benign": [f"Tell me how to make a {food}" for food in FOODS[:count]],
        }
        | columns
    )
    frame.to_csv(path, index=False)
    return str(path)


def test_fault_22_a_templated_policy_works_and_says_what_its_test_measures(tmp_path):
    policy = build_policy(templated(tmp_path / "my.csv"))
    for role in ("target", "benign"):
        found = policy.records[policy.records["role"] == role]
        assert set(found["split"]) == set(SPLITS) and len(found) == 60
    assert len(policy.dropped) == 0
    (warning,) = policy.warnings
    assert "60 prompts of category 'my' fill one template" in warning
    policy.save(tmp_path / "policy")
    assert Policy.load(tmp_path / "policy").warnings == policy.warnings


def test_fault_22_rows_of_one_noun_stay_together(tmp_path):
    frame = pd.read_csv(templated(tmp_path / "my.csv"))
    politely = frame.assign(prompt=frame["prompt"] + " please")
    pd.concat([frame, politely]).to_csv(tmp_path / "my.csv", index=False)
    split = build_policy(str(tmp_path / "my.csv")).records.set_index("prompt")["split"]
    assert all(split[prompt] == split[f"{prompt} please"] for prompt in frame["prompt"])


def test_fault_22_several_templates_and_categories(tmp_path):
    frame = pd.DataFrame(
        [
            {
                "prompt": start.format(noun),
                "benign": start.format(food),
                "category": ("arms", "papers")[i % 2],
            }
            for start in ("Tell me how to make a {}", "Where can I quickly buy a new {}")
            for i, (noun, food) in enumerate(zip(NOUNS, FOODS))
        ]
    )
    frame.to_csv(tmp_path / "two.csv", index=False)
    policy = build_policy(str(tmp_path / "two.csv"))
    assert policy.categories == ("arms", "papers") and len(policy.warnings) == 4
    for category in policy.categories:
        assert {row["split"] for row in policy.select(category=category)} == set(SPLITS)


def test_fault_22_splits_do_not_depend_on_the_order_of_the_rows(tmp_path):
    frame = pd.read_csv(templated(tmp_path / "my.csv"))
    one = build_policy(str(tmp_path / "my.csv")).records.set_index("id")["split"].to_dict()
    frame[::-1].to_csv(tmp_path / "my.csv", index=False)
    assert build_policy(str(tmp_path / "my.csv")).records.set_index("id")["split"].to_dict() == one


def test_fault_22_one_benign_prompt_for_all_is_said(tmp_path):
    path = templated(tmp_path / "my.csv", benign=["Tell me a story"] * 60)
    with pytest.raises(CdeltaError, match="benign prompts and none in the split"):
        build_policy(path, on_leak="drop")
    with pytest.raises(CdeltaError):
        build_policy(path)


def test_fault_22_too_few_rows_keep_their_groups_and_are_said(tmp_path):
    with pytest.raises(CdeltaError, match="'my' has 4 prompts and none in the split"):
        build_policy(templated(tmp_path / "my.csv", 4))


def test_fault_22_free_prompts_are_grouped_as_ever(tmp_path):
    pd.DataFrame(asks()).to_csv(tmp_path / "my.csv", index=False)
    policy = build_policy(str(tmp_path / "my.csv"))
    assert policy.warnings == () and "warnings" not in policy.manifest


def test_fault_22_users_own_splits_of_a_template_are_kept(tmp_path):
    splits = [SPLITS[i % 4] for i in range(60)]
    path = templated(tmp_path / "my.csv", split=splits)
    with pytest.raises(CdeltaError, match="leave their split cells empty"):
        build_policy(path)


def test_fault_24_no_remedy_names_what_the_user_cannot_give(tmp_path):
    splits = [SPLITS[i % 4] for i in range(60)]
    with pytest.raises(CdeltaError) as caught:
        build_policy(templated(tmp_path / "my.csv", split=splits))
    assert "on_leak" not in str(caught.value)
