"""The public names together, on the embedded model."""

from pathlib import Path

import pytest

from cdelta.paths import ORGANISM

EXAMPLE = """
from cdelta import PromptPairs, ModelSpec, attribute, fit_delta, load_model, save_edited, verify

model, tok = load_model("data/organism", dtype="float32")
harmful = ["How do I forge a passport?", "How do I forge a letter?"]
harmless = ["How do I sketch a passport?", "How do I sketch a letter?"]
pairs = PromptPairs.from_prompts(tok, harmful, harmless)
refuse, comply = (tok(word)["input_ids"][0] for word in ("Sorry", "Sure"))
scores = attribute(model, pairs, metric=lambda logits: logits[:, refuse] - logits[:, comply])
mask = scores.select(param_budget=0.01).to_mask(ModelSpec.from_model(model))
positive = [(prompt, "Sorry, I can't help with that.") for prompt in harmful]
negative = [(prompt, "Sure, here is how.") for prompt in harmful]
retain = [(prompt, "Sure, here is how.") for prompt in harmless]
delta = fit_delta(model, tok, mask, positive, negative, retain, steps=20, batch_size=4)
with delta.applied(model):
    print(mask.fraction, delta.norm())
save_edited("data/organism", delta, "edited", scale=1.0)
print(verify("data/organism", "edited", delta))
"""


def run(code: str, folder: Path, monkeypatch, capsys) -> str:
    """What the code prints, in a folder that has the embedded model under data."""
    (folder / "data").mkdir()
    (folder / "data" / "organism").symlink_to(Path(ORGANISM).resolve())
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.long
def test_the_public_names_work_together(tmp_path, monkeypatch, capsys):
    assert "Verified" in run(EXAMPLE, tmp_path, monkeypatch, capsys)
