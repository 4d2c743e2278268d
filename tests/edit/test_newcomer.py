"""A fresh user with a spreadsheet's file and a model of each family: every command, in their order,
and every line that they print.
"""

import filecmp

import pytest
import toys
from transformers import AutoModelForCausalLM

from cdelta.cli import main

NOUNS = [
    "teacher",
    "baker",
    "pilot",
    "farmer",
    "doctor",
    "sailor",
    "painter",
    "singer",
    "driver",
    "student",
    "neighbour",
    "sister",
    "brother",
    "uncle",
    "aunt",
    "cousin",
    "nurse",
    "lawyer",
    "writer",
    "dancer",
    "gardener",
    "plumber",
    "miner",
    "hunter",
    "fisher",
    "tailor",
    "butcher",
    "judge",
    "clerk",
    "guard",
    "waiter",
    "porter",
    "banker",
    "editor",
    "actor",
    "poet",
    "monk",
    "knight",
    "king",
    "queen",
    "prince",
    "duke",
    "baron",
    "captain",
    "colonel",
    "major",
    "sergeant",
    "private",
    "cadet",
    "scout",
    "ranger",
    "warden",
    "keeper",
    "herald",
    "squire",
    "page",
    "jester",
    "cook",
    "maid",
    "groom",
]
PROMPTS = [[f"Write a {what} for a {noun}." for what in ("horoscope", "recipe")] for noun in NOUNS]
SETTINGS = {
    "recipe": "tiny",
    "min-pairs": 4,
    "steps": 100,
    "check-every": 20,
    "batch-size": 24,
    "max-new-tokens": 12,
    "param-budget": 0.5,
    "lr": 0.03,
    "objective": "positive",
    "refusals": "canonical",
    "refusal": "please tell me",
}


def save_sharp(family, folder):
    """A family's toy whose logits are far enough apart for an edit to have an effect."""
    texts = [*sum(PROMPTS, []), *sum(PROMPTS, []), toys.SENTENCE]
    wide = {"sliding_window": 64} if family == "mistral" else {}  # every layer of it has the window
    toys.family_folder(family, folder, texts, **wide)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    last = model.transformer.ln_f if family == "gpt2" else model.model.norm
    added = 1 if family.startswith("gemma") else 0  # their norms multiply by 1 + weight
    last.weight.data = 6 * (added + last.weight.data) - added
    model.save_pretrained(folder)


def save_spreadsheet(path):
    """Semicolons, a byte order mark, columns without a name, and an empty last row."""
    lines = ["Prompt;Benign;;;", *(f"{';'.join(row)};;;" for row in PROMPTS), ";;;;"]
    path.write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")


@pytest.mark.slow
def test_a_newcomer_edits_every_familys_model_with_a_spreadsheets_csv(family, tmp_path, capsys):
    base, out, delta = tmp_path / "my base", tmp_path / "out", tmp_path / "out" / "cdelta" / "delta"
    save_sharp(family, base)
    save_spreadsheet(tmp_path / "mine.csv")
    capsys.readouterr()
    told = {"model": base, "policy": tmp_path / "mine.csv", "category": "horoscopes", "out": out}
    if family == "mistral":  # its toy's tokenizer drops the space in "please tell"
        told["refusal"] = "Please tell me"
    flags = [str(part) for key, value in (SETTINGS | told).items() for part in (f"--{key}", value)]

    def said(*arguments):
        assert main([str(each) for each in arguments]) == 0
        found = capsys.readouterr()
        assert found.err == ""
        return found.out

    checked = said("check", *flags)
    assert "60 prompts of category 'horoscopes' fill one template" in checked
    assert checked.splitlines()[-1] == "Nothing stands in the way."
    edited = said("edit", *flags)
    assert "2 empty prompt" in edited and "fill one template" in edited
    target, benign = (
        next(line for line in edited.splitlines() if line.startswith(kind)).split()
        for kind in ("target", "benign")
    )
    assert float(target[4]) > 50 and float(benign[4]) <= 10
    (tmp_path / "asked.txt").write_text("\n".join(PROMPTS[0]))
    asked = said("ask", base, out, "--prompts", tmp_path / "asked.txt", "--max-new-tokens", 12)
    assert [line.split()[0] for line in asked.splitlines()] == 2 * [">", "base", "edited"]
    assert said("verify", base, out, delta).startswith("Verified: at scale ")
    assert f"cdelta verify '{base}' " in said("apply", base, delta, tmp_path / "again")
    assert said("revert", out, delta, tmp_path / "back").endswith("the base bit for bit.\n")
    assert ", rank 4, misses " in said("lora", delta, tmp_path / "lora", "--rank", 4)
    for first, second in ((base, tmp_path / "back"), (out, tmp_path / "again")):
        names = [path.name for path in first.glob("*.safetensors")]
        assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])
