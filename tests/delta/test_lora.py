"""An adapter is the delta, exactly or as near as its rank allows, and says how near."""

import json

import pytest
import torch
import toys
from edits import random_delta
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cdelta.delta.apply import save_edited
from cdelta.delta.lora import export_lora
from cdelta.delta.weight_delta import WeightDelta
from cdelta.errors import CdeltaError

IDS = torch.tensor([[2, 9, 30, 41, 7], [60, 3, 3, 11, 80]])
pytestmark = pytest.mark.filterwarnings("ignore")


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager")


def test_exact_adapter_is_the_edited_checkpoint(layout, tmp_path):
    base = toys.save_toy(tmp_path / "base", layout)
    delta = random_delta(load(base))
    out = save_edited(base, delta, tmp_path / "out", scale=0.5)
    written = export_lora(delta, tmp_path / "lora", scale=0.5)
    assert written.error == 0.0
    adapted = PeftModel.from_pretrained(load(base), written.folder).eval()
    torch.testing.assert_close(adapted(IDS).logits, load(out)(IDS).logits, rtol=1e-4, atol=1e-4)
    if not any(name.endswith(".bias") for name in delta.values):
        merged = adapted.merge_and_unload()
        for (name, a), b in zip(merged.named_parameters(), load(out).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2 stores its weights transposed
def test_rank_r_is_the_best_of_that_rank(kind, tmp_path):
    base = toys.save_toy(tmp_path / "base", kind)
    delta = random_delta(load(base))
    written = export_lora(delta, tmp_path / "lora", rank=3)
    config = json.loads((written.folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == written.rank == 3 and not config["rank_pattern"]
    tensors = load_file(written.folder / "adapter_model.safetensors")
    total = wanted = 0.0
    for name in (n for n in delta.values if n.endswith(".weight")):
        module = name.removesuffix(".weight")
        a = tensors[f"base_model.model.{module}.lora_A.weight"]
        b = tensors[f"base_model.model.{module}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == 3
        change = (b @ a).T if kind == "gpt2" else b @ a
        singular = torch.linalg.svdvals(delta.values[name].double())
        best = singular[3:].square().sum().sqrt() / singular.square().sum().sqrt()
        assert written.errors[module] == pytest.approx(best.item(), abs=1e-6)
        own = change.index_select(*delta.slices[name])
        missed = (own - delta.values[name]).double().square().sum().item()
        total, wanted = total + missed, wanted + singular.square().sum().item()
        outside = change.square().sum() - own.square().sum()
        assert abs(outside.item()) < 1e-6 * change.square().sum().item()
    assert written.error == pytest.approx((total / wanted) ** 0.5, abs=1e-6) and written.error > 0.1
    assert f"| all | {written.error:.3f} |" in (written.folder / "README.md").read_text()
    adapted = PeftModel.from_pretrained(load(base), written.folder).eval()
    assert not torch.equal(adapted(IDS).logits, load(base)(IDS).logits)


def test_a_rank_beyond_the_masks_misses_nothing(tmp_path):
    delta = random_delta(toys.toy("llama"))
    written = export_lora(delta, tmp_path / "lora", rank=64)
    assert written.rank == 64 and written.error < 1e-6


def test_bad_requests_leave_nothing(tmp_path):
    delta = random_delta(toys.toy("llama"))
    bias, shapes = "model.layers.9.mlp.up_proj.bias", {"model.layers.9.mlp.up_proj.bias": [4]}
    alone = WeightDelta({bias: torch.ones(2)}, {bias: (0, torch.arange(2))}, {"shapes": shapes})
    for what, options, message in (
        (WeightDelta(delta.values, delta.slices), {}, "shapes"),
        (delta, {"scale": float("inf")}, "finite"),
        (delta, {"rank": 0}, "at least 1"),
        (alone, {}, "changes no weight"),
        (alone + delta, {}, "without its weight"),
    ):
        with pytest.raises(CdeltaError, match=message):
            export_lora(what, tmp_path / "lora", **options)
    assert not any(tmp_path.iterdir())
