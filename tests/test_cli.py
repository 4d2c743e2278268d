"""The command line does what the library does; every bad input is one line on stderr, exit code 2,
and nothing left behind.
"""

import csv
import json
import random
import resource

import pytest
import torch
import toys
from edits import random_delta
from transformers import AutoModelForCausalLM

from cdelta.cli import main
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.recipe import CANONICAL_REFUSAL


@pytest.fixture
def folder(tmp_path):
    """A checkpoint `base`, a delta `delta`, and a policy `policy.csv`."""
    base = save_editable(tmp_path / "base")
    random_delta(AutoModelForCausalLM.from_pretrained(base, dtype="auto")).save(tmp_path / "delta")
    write_policy(tmp_path / "policy.csv")
    return tmp_path


def save_editable(folder, seed=0):
    """A toy whose unembedding is sharp enough for an edit to have an effect."""
    model = toys.toy("llama", seed=seed)
    model.lm_head.weight.data *= 5
    model.save_pretrained(folder)
    toys.toy_tokenizer().save_pretrained(folder)
    return folder


def write_policy(path, n=30, benign=True, category="weapons"):
    """Requests of unknown words, so that none repeats another, that differ from their benign
    counterparts in one word.
    """
    rng, lines = random.Random(0), []
    for i in range(n):
        words = [f"w{6 * i + j}" for j in range(5)]
        split = ("discover", "edit", "val", "test", "edit")[i % 5]
        target, twin = (
            [*words, rng.choice(pool)] for pool in (["bomb", "knife"], ["cake", "poem"])
        )
        lines.append([" ".join(target), " ".join(twin) if benign else "", category, split])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "benign", "category", "split"], *lines])


def edit_arguments(folder, **changes):
    given = {
        "model": folder / "base",
        "policy": folder / "policy.csv",
        "category": "weapons",
        "out": folder / "out",
        "recipe": "tiny",
        "steps": 30,
        "check-every": 10,
        "batch-size": 16,
        "max-new-tokens": 6,
        "param-budget": 0.5,
        "min-pairs": 4,
        "lr": 0.02,
        "objective": "positive",
        "refusal": "please tell me",
    }
    return [
        "edit",
        *(str(part) for key, value in {**given, **changes}.items() for part in (f"--{key}", value)),
    ]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_apply_verify_revert_lora(folder, capsys):
    base, delta, out = (str(folder / name) for name in ("base", "delta", "out"))
    assert main(["apply", base, delta, out, "--scale", "0.5"]) == 0
    assert main(["verify", base, out, delta, "--json", str(folder / "report.json")]) == 0
    assert json.loads((folder / "report.json").read_text())["scale"] == 0.5
    assert main(["verify", base, out, delta, "--scale", "-1"]) == 1
    assert main(["revert", out, delta, str(folder / "back")]) == 0
    assert (folder / "back" / "model.safetensors").read_bytes() == (
        folder / "base" / "model.safetensors"
    ).read_bytes()
    assert main(["lora", delta, str(folder / "lora")]) == 0
    said = capsys.readouterr()
    assert (
        "Verified" in said.out
        and "NOT verified" in said.out
        and "bit for bit" in said.out
        and said.err == ""
    )


def test_combined_deltas_are_applied_and_reverted_as_one(folder, capsys):
    base, first, second, both, out = (
        str(folder / name) for name in ("base", "delta", "second", "both", "out")
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    random_delta(model, seed=1).with_metadata(category="hate", k=0.5).save(second)
    assert main(["combine", first, second, both]) == 0
    assert main(["apply", base, both, out]) == 0 and main(["verify", base, out, both]) == 0
    with WeightDelta.load(first).applied(model), WeightDelta.load(second).applied(model, 0.5):
        for a, b in zip(
            model.parameters(), AutoModelForCausalLM.from_pretrained(out, dtype="auto").parameters()
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert main(["revert", out, both, str(folder / "back")]) == 0
    assert "weapons+hate" in capsys.readouterr().out
    refused(
        folder,
        capsys,
        ["combine", first, str(folder / "nothing"), str(folder / "x")],
        "holds no weight delta",
    )
    refused(folder, capsys, ["combine", first, second, both], "already exists")


FULL = [
    ["apply", "{0}/base", "{0}/delta", "{0}/out"],
    ["revert", "{0}/edited", "{0}/delta", "{0}/out"],
    ["lora", "{0}/delta", "{0}/out"],
    ["combine", "{0}/delta", "{0}/delta", "{0}/out"], [],
]  # fmt: skip


@pytest.mark.parametrize("command", FULL, ids=lambda command: command[0] if command else "edit")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder, capsys, command):
    """No file may grow beyond 20 kB, by the system's own limit."""
    assert main(["apply", *(str(folder / name) for name in ("base", "delta", "edited"))]) == 0
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        refused(
            folder,
            capsys,
            [part.format(folder) for part in command] or edit_arguments(folder, steps=2),
            "File too large",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.long
def test_edit_from_a_csv_to_a_verified_checkpoint(folder, capsys):
    assert main(edit_arguments(folder)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Estimate: model of 29,408 parameters")
    assert (
        lines[1].split()[:4] == ["prompts", "n", "before", "after"]
        and lines[2].startswith("target")
        and lines[3].startswith("benign")
    )
    out = folder / "out"
    assert main(["verify", str(folder / "base"), str(out), str(out / "cdelta" / "delta")]) == 0
    assert json.loads((out / "cdelta" / "verify.json").read_text())["ok"]
    assert {"curve", "table", "log"} == json.loads(
        (out / "cdelta" / "training.json").read_text()
    ).keys()
    assert main(["revert", str(out), str(out / "cdelta" / "delta"), str(folder / "back")]) == 0
    assert names(folder) == {"base", "delta", "policy.csv", "out", "back"}


def test_edit_says_what_it_drops_and_records_it(folder, capsys):
    """A repeated row, and a prompt that is longer than the model's context."""
    rows = (folder / "policy.csv").read_text().splitlines()
    too_long = f"{'bomb ' * 600},a cake of w900 w901 w902,weapons,edit"
    (folder / "policy.csv").write_text("\n".join([*rows, rows[1], too_long]))
    assert main(edit_arguments(folder)) == 0
    assert capsys.readouterr().out.startswith(
        "Dropped 3 of 64 prompts (2 duplicate prompt, 1 longer than 58 tokens), "
        "first row 32, row 32 benign, row 33; policy.json "
    )
    record = json.loads((folder / "out" / "cdelta" / "policy.json").read_text())
    assert record["dropped"][0] == {
        "source_id": "row 32",
        "reason": "duplicate prompt",
        "match": "row 2",
    } and "bomb" not in json.dumps(record)
    assert sum(len(ids) for ids in record["ids"].values()) == 61 and len(record["sha256"]) == 64


@pytest.mark.long
def test_no_chat_template_falls_back_and_says_so(folder, capsys):
    save_editable(folder / "base", seed=2)  # one that says something to the bare template
    (folder / "base" / "chat_template.jinja").unlink()
    assert main(edit_arguments(folder)) == 0
    assert "no chat template; prompts are written as" in capsys.readouterr().out.splitlines()[0]


def break_delta(folder):
    file = folder / "delta" / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def break_base(folder):
    file = folder / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_base(folder):
    toys.toy("llama", seed=5).save_pretrained(folder / "base")


def other_architecture(folder):
    toys.toy("qwen3").save_pretrained(folder / "base")


APPLY = ["apply", "{0}/base", "{0}/delta", "{0}/out"]


@pytest.mark.parametrize(
    "command, prepare, message",
    [
        (APPLY, break_delta, "damaged"),
        (APPLY, break_base, "damaged or truncated"),
        (APPLY, other_base, "not for this model"),
        (APPLY, other_architecture, "another architecture"),
        ([*APPLY, "--scale", "nan"], None, "finite"),
        ([*APPLY, "--scale", "much"], None, "invalid 'float'"),
        (["apply", "{0}/base", "{0}/delta", "/proc/x/out"], None, "cannot write"),
        (["apply", "{0}/base", "{0}/nothing", "{0}/out"], None, "holds no weight delta"),
        (["apply", "{0}/base", "{0}/delta", "{0}/base"], None, "already exists"),
        (["apply", "{0}/base"], None, "required"),
        (["verify", "{0}/base", "{0}/delta", "{0}/delta"], None, "no checkpoint folder"),
        (
            [
                "verify",
                "{0}/base",
                "{0}/base",
                "{0}/delta",
                "--scale",
                "0",
                "--json",
                "/proc/x.json",
            ],
            None,
            "cannot write",
        ),
        (["revert", "{0}/base", "{0}/delta", "{0}/out"], None, "does not record this delta"),
        (["lora", "{0}/delta", "{0}/out", "--scale", "inf"], None, "finite"),
        (["verify", "{0}/base", "{0}/base", "{0}/delta", "--scale", "nan"], None, "finite"),
        (
            ["verify", "{0}/base", "{0}/delta/delta.safetensors", "{0}/delta"],
            None,
            "no checkpoint folder",
        ),
        (["unknown"], None, "invalid choice"),
    ],
)
def test_bad_input(folder, capsys, command, prepare, message):
    if prepare:
        prepare(folder)
    refused(folder, capsys, [part.format(folder) for part in command], message)


@pytest.mark.parametrize(
    "changes, prepare, message",
    [
        ({"category": "gambling"}, None, "gambling"),
        ({"policy": "/nowhere.csv"}, None, "no such file"),
        ({}, lambda folder: write_policy(folder / "policy.csv", benign=False), "benign"),
        ({}, lambda folder: write_policy(folder / "policy.csv", n=0), "no rows"),
        ({"param-budget": 2}, None, "param_budget must lie in (0, 1]"),
        ({"steps": 0}, None, "steps must be above 0"),
        ({"lr": "nan"}, None, "lr must be finite"),
        ({"dtype": "float7"}, None, "unknown dtype"),
        ({"min-pairs": 99}, None, "99 needed"),
        ({"out": "/proc/x"}, None, "cannot write"),
        ({}, break_base, "base"),
        ({}, lambda folder: (folder / "out").mkdir(), "already exists"),
    ],
)
def test_bad_input_of_edit(folder, capsys, changes, prepare, message):
    if prepare:
        prepare(folder)
    refused(folder, capsys, edit_arguments(folder, **{"steps": 2, **changes}), message)


def refused(folder, capsys, arguments, message):
    before = names(folder)
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = error.code
    said = capsys.readouterr()
    assert code == 2
    assert message in said.err and said.err.count("\n") == 1
    assert names(folder) == before


def test_the_default_refusal_is_judged_one():
    from cdelta.evaluation.judges import Rules

    assert Rules().outcome(CANONICAL_REFUSAL) == "refuse"
