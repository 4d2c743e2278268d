import csv
import json
import random
import string
import time

import pandas as pd
import pytest
from helpers import trained_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdelta.errors import CdeltaError
from cdelta.policy.build import build_policy
from cdelta.policy.user_file import read_user_rows

WORDS = [f"{a}{b}" for a in "bcdfghjklm" for b in ("ana", "elo", "iru", "osk", "unt")]


def asks(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompt and benign prompt, no two of them alike."""
    rng = random.Random(seed)

    def ask():
        return " ".join(rng.choices(WORDS, k=7))

    return [(ask(), ask()) for _ in range(count)]


def write_csv(path, rows, header=("prompt", "benign"), encoding="utf-8", newline="\n"):
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, lineterminator=newline)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def counts(policy) -> dict[str, int]:
    return policy.report.groupby("step")["rows"].sum().to_dict()


def adds_up(policy) -> bool:
    found = counts(policy)
    return (
        found["read"]
        == found["kept"] + len(policy.dropped)
        == found["kept"] + sum(n for step, n in found.items() if step.startswith("dropped"))
    )


@pytest.mark.parametrize(
    "encoding, newline", [("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-8", "\r\n")]
)
def test_bom_and_line_ends_do_not_matter(tmp_path, encoding, newline):
    policy = build_policy(
        str(write_csv(tmp_path / "my.csv", asks(60), encoding=encoding, newline=newline)), ["fraud"]
    )
    assert counts(policy) == {"read": 120, "kept": 120} and policy.categories == ("fraud",)
    assert policy.records["prompt"].str.fullmatch(r"[a-z ]+").all()


def test_every_kind_of_file_gives_the_same_prompts(tmp_path):
    frame = pd.DataFrame(asks(60), columns=["prompt", "benign"])
    write_csv(tmp_path / "a.csv", frame.values)
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    found = [
        [row["prompt"] for row in read_user_rows(tmp_path / f"a.{kind}", "x")]
        for kind in ("csv", "tsv", "parquet", "jsonl")
    ]
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 120


def test_quotes_newlines_emoji_and_right_to_left_text_survive(tmp_path):
    odd = [
        'say "hello", then\r\nleave',
        "كيف أسرق سيارة حمراء الليلة",
        "how do i 🔫 the 🎈 today friend",
        "line one\nline two",
    ]
    rows = asks(60) + [
        (text, f"benign {i} {' '.join(random.Random(i).sample(WORDS, 5))}")
        for i, text in enumerate(odd)
    ]
    policy = build_policy(str(write_csv(tmp_path / "my.csv", rows)))
    assert set(odd) <= set(policy.records["prompt"]) and adds_up(policy)


def test_empty_and_duplicate_rows_are_counted(tmp_path):
    rows = asks(60)
    rows += [rows[0], ("", ""), (rows[1][0].upper() + "!", rows[2][1]), ("   ", rows[3][1])]
    policy = build_policy(str(write_csv(tmp_path / "my.csv", rows)), on_leak="drop")
    assert policy.dropped["reason"].value_counts().to_dict() == {
        "duplicate prompt": 5,
        "empty prompt": 3,
    }
    assert adds_up(policy) and set(
        policy.dropped.loc[policy.dropped["reason"] == "duplicate prompt", "match"]
    ) == {"row 2", "row 2 benign", "row 3", "row 4 benign", "row 5 benign"}


def test_unequal_counts_keep_what_is_there(tmp_path):
    rows = asks(80)
    rows = rows[:60] + [(prompt, "") for prompt, _ in rows[60:]]
    policy = build_policy(str(write_csv(tmp_path / "my.csv", rows)))
    assert policy.records["role"].value_counts().to_dict() == {
        "target": 80,
        "benign": 60,
    } and adds_up(policy)


def test_a_target_keeps_its_counterpart_when_that_repeats(tmp_path):
    rows = asks(60)
    rows[1] = (rows[1][0], rows[0][1])
    policy = build_policy(str(write_csv(tmp_path / "my.csv", rows)))
    pair = policy.records.set_index("prompt")["pair_id"]
    assert pair[rows[1][0]] == pair[rows[0][1]] == pair[rows[0][0]] and len(policy.dropped) == 1


def test_one_text_on_both_sides_is_a_contradiction(tmp_path):
    rows = asks(60)
    rows[5] = (rows[5][0], rows[5][0])
    policy = build_policy(str(write_csv(tmp_path / "my.csv", rows)))
    assert policy.dropped["reason"].tolist() == ["same prompt with another label"]


def test_near_duplicates_share_a_split_and_nothing_is_dropped(tmp_path):
    rows = asks(100)
    rows += [(prompt + " please", benign) for prompt, benign in asks(100)]
    policy = build_policy(str(write_csv(tmp_path / "my.csv", rows)))
    assert policy.dropped["reason"].unique().tolist() == ["duplicate prompt"]
    splits = policy.records.set_index("prompt")["split"]
    assert all(splits[prompt] == splits[prompt + " please"] for prompt, _ in asks(100))


def test_splits_do_not_depend_on_the_order_of_the_rows(tmp_path):
    rows = asks(80)
    one, two = (
        build_policy(str(write_csv(tmp_path / "my.csv", some))) for some in (rows, rows[::-1])
    )
    assert (
        one.records.set_index("id")["split"].to_dict()
        == two.records.set_index("id")["split"].to_dict()
    )


def test_the_users_own_splits_and_categories_are_kept_and_leaks_between_them_stop(tmp_path):
    rows = [
        (*pair, cat, split)
        for cat, seed in (("fraud", 1), ("spam", 2))
        for pair, split in zip(asks(40, seed), ["discover", "edit", "val", "test"] * 10)
    ]
    header = ("Prompt", " benign ", "Category", "split")
    policy = build_policy(str(write_csv(tmp_path / "my.csv", rows, header)), ["spam"])
    assert policy.categories == ("fraud", "spam") and set(
        policy.records["split"].value_counts()
    ) == {40}
    leak = rows + [
        (rows[0][0] + " now", "another thing altogether " + " ".join(WORDS[:4]), "fraud", "test")
    ]
    path = write_csv(tmp_path / "leak.csv", leak, header)
    with pytest.raises(
        CdeltaError,
        match="leak.csv: 1 rows nearly repeat a row of another split, "
        "row 2 .discover. ~ row 82 .test.",
    ):
        build_policy(str(path))
    policy = build_policy(str(path), on_leak="drop")
    assert policy.dropped[["source_id", "match", "reason"]].values.tolist() == [
        ["row 2", "row 82", "near-duplicate of a test row"]
    ] and adds_up(policy)


def test_over_long_prompts_are_dropped_and_counted(tmp_path):
    rows = asks(60)
    rows[3] = (" ".join(string.ascii_lowercase) * 40, rows[3][1])
    tok = trained_tokenizer(WORDS)
    policy = build_policy(str(write_csv(tmp_path / "my.csv", rows)), tok=tok, max_tokens=200)
    assert policy.dropped[["source_id", "reason"]].values.tolist() == [
        ["row 5", "longer than 200 tokens"]
    ] and adds_up(policy)


def fails(path, message, **more):
    with pytest.raises(CdeltaError, match=message) as caught:
        build_policy(str(path), **more)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_each_broken_file_gives_one_sentence(tmp_path):
    def text(name, content, encoding="utf-8"):
        (tmp_path / name).write_bytes(
            content.encode(encoding) if isinstance(content, str) else content
        )
        return tmp_path / name

    fails(tmp_path / "absent.csv", "no such file: give the path")
    fails(text("a.docx", ""), "unknown kind of file '.docx': give a .csv")
    fails(text("empty.csv", ""), "the file has no rows: it needs the columns prompt and benign")
    fails(text("none.csv", "a,b\nc,d\n"), "no column prompt and no column benign: expected")
    fails(
        text("one.csv", "prompt,answer\na,b\n"),
        "no column benign: expected prompt,benign .* found 'prompt', 'answer'",
    )
    fails(text("twice.csv", "prompt,benign,Prompt\na,b,c\n"), "column prompt is there twice")
    fails(text("head.csv", "prompt,benign\n"), "the file has no rows")
    fails(
        text("wide.csv", "prompt,benign\na,b\nc,d,e\n"),
        "line 3: more cells than columns: put text that contains commas in double quotes",
    )
    fails(
        text("quote.csv", 'prompt,benign\na,"b\nc,d\n'),
        "the row that begins at line 2: not valid CSV .* double quotes",
    )
    fails(text("inner.csv", 'prompt,benign\na,b\n"c"d,e\n'), "begins at line 3: not valid CSV")
    fails(
        text("huge.csv", f"prompt,benign\n{'a' * 200_000},b\n"),
        "begins at line 2: not valid CSV .field larger than field limit",
    )
    fails(
        text("latin.csv", "prompt,benign\ncafé,b\n", "latin-1"),
        "not UTF-8 text .* save it as UTF-8",
    )
    fails(text("wide16.csv", "prompt,benign\na,b\n", "utf-16-le"), "not UTF-8 text")
    fails(text("nul.csv", "prompt,benign\na\0,b\n"), "row 2: prompt contains a NUL")
    fails(
        text("split.csv", "prompt,benign,split\na,b,train\n"),
        "row 2: split 'train' is unknown: use discover, edit, val, test",
    )
    fails(
        text("bad.jsonl", '{"prompt": "a", "benign": "b"}\n{oops}\n'),
        "not valid JSON .line 2: .* one object per line",
    )
    fails(text("list.jsonl", '["a", "b"]\n'), "row 1: a JSON str, not an object")
    fails(text("miss.jsonl", '{"prompt": "a"}\n'), "row 1: no column benign")
    fails(text("num.jsonl", '{"prompt": 5, "benign": "b"}\n'), "row 1: prompt is a int, not text")
    fails(
        text("half.jsonl", '{"prompt": "\\ud800", "benign": "b"}\n'),
        "row 1: prompt contains a NUL or half a character",
    )
    fails(text("bad.parquet", "not parquet"), "not a readable .parquet file .* save it as CSV")


def test_one_class_only_and_too_few_rows_say_so(tmp_path):
    prompts, benign = zip(*asks(60))
    fails(
        write_csv(tmp_path / "a.csv", [(p, "") for p in prompts]),
        "category 'a' has 0 benign prompts and none in the split discover, edit, val, test: add "
        "rows",
    )
    fails(
        write_csv(tmp_path / "b.csv", [("", b) for b in benign]),
        "no prompts of category '' .there are: none.: fill the prompt column",
    )
    fails(
        write_csv(tmp_path / "c.csv", asks(2)), "category 'c' has 2 prompts and none in the split"
    )
    fails(
        write_csv(
            tmp_path / "d.csv", [(*p, "spam") for p in asks(60)], ("prompt", "benign", "category")
        ),
        "no prompts of category 'fraud' .there are: spam.",
        categories=["fraud"],
    )


cells = st.text(
    alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=12
)


@pytest.mark.long
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(cells, cells), max_size=12), st.sampled_from(("csv", "jsonl", "parquet")))
def test_any_text_is_read_back_and_everything_is_accounted_for(tmp_path, extra, kind):
    path = tmp_path / f"any.{kind}"
    frame = pd.DataFrame(asks(60) + extra, columns=["prompt", "benign"])
    writers = {
        "csv": lambda: write_csv(path, frame.values, encoding="utf-8-sig", newline="\r\n"),
        "jsonl": lambda: path.write_text(
            "".join(json.dumps(r) + "\n" for r in frame.to_dict("records"))
        ),
        "parquet": lambda: frame.to_parquet(path),
    }
    writers[kind]()
    policy = build_policy(str(path), on_leak="drop")
    assert adds_up(policy) and counts(policy)["read"] == 2 * len(frame)
    seen = {p.strip() for p in [*policy.records["prompt"], *policy.dropped["prompt"]]}
    assert {c.strip() for pair in extra for c in pair} <= seen
    assert policy.records["id"].is_unique and policy.records["prompt"].str.strip().ne("").all()


@pytest.mark.long
def test_a_hundred_thousand_rows_take_seconds(tmp_path, record_property):
    rng = random.Random(0)
    words = [f"w{i}" for i in range(20_000)]

    def ask():
        return " ".join(rng.choices(words, k=rng.randint(6, 16)))

    path = write_csv(tmp_path / "big.csv", [(ask(), ask()) for _ in range(100_000)])
    start = (
        time.process_time()
    )  # other work on the machine stretches the clock's seconds, not the processor's
    policy = build_policy(str(path))
    seconds = time.process_time() - start
    record_property("seconds", seconds)
    assert counts(policy)["read"] == 200_000 and adds_up(policy)
    assert seconds < 60
