"""Rounded weights are what the schemes say, and survival counts what is left of a delta."""

import pytest
import torch
import toys
from edits import random_delta, same_weights, weights

from cdelta.delta.quantise import SCHEMES, codes, quantisation_survival, quantised
from cdelta.errors import CdeltaError

WEIGHT = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def fake_quantised(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """fp32 values that the rounded weight stands for."""
    return codes(weight, scheme).values()


@pytest.mark.parametrize("scheme, bits, width", [("int8", 8, 64), ("int4", 4, 32)])
def test_integers_have_few_levels_and_small_errors(scheme, bits, width):
    rounded = fake_quantised(WEIGHT, scheme).unflatten(1, (-1, width))
    step = WEIGHT.unflatten(1, (-1, width)).abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    assert ((rounded / step) - (rounded / step).round()).abs().max() < 1e-3
    assert ((rounded - WEIGHT.unflatten(1, (-1, width))).abs() <= 0.5001 * step).all()
    torch.testing.assert_close(
        fake_quantised(2 * WEIGHT, scheme), 2 * fake_quantised(WEIGHT, scheme)
    )


def test_float_schemes_round_to_their_dtype():
    assert torch.equal(fake_quantised(WEIGHT, "bf16"), WEIGHT.bfloat16().float())
    assert torch.equal(fake_quantised(WEIGHT, "fp16"), WEIGHT.half().float())
    assert not fake_quantised(torch.zeros(4, 32), "int4").any()
    with pytest.raises(CdeltaError, match="unknown quantisation"):
        fake_quantised(WEIGHT, "int3")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_equal_to_torchao(scheme):
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=granularity.PerGroup(32)
        ),
    }[scheme]()
    module = torch.nn.Sequential(torch.nn.Linear(64, 16, bias=False))
    module[0].weight.data = WEIGHT.clone()
    quantization.quantize_(module, config)
    different = (module[0].weight.dequantize() - fake_quantised(WEIGHT, scheme)).abs() > 1e-5
    assert different.float().mean() < 0.01  # ties between two levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["q8_0", "q4_1"])
def test_equal_to_gguf_bit_for_bit(scheme, dtype):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[scheme.upper()]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 96, generator=generator) * torch.logspace(-6, 3, 64)[:, None]
    weight[3], weight[4], weight[5, :32] = 0.0, -2.5, 7.0
    weight[6] = torch.arange(-48, 48) / 2  # halves are rounded
    weight = weight.to(dtype).float()
    stored = gguf.quants.quantize(weight.numpy(), kind)
    expected = torch.from_numpy(gguf.quants.dequantize(stored, kind))
    assert torch.equal(fake_quantised(weight, scheme), expected)
    again = fake_quantised(expected, scheme)  # what came from the format goes back to it
    assert (again - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_rows_that_have_no_blocks_are_kept_in_16_bits():
    weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    for scheme in ("q8_0", "q4_1"):
        assert torch.equal(fake_quantised(weight, scheme), weight.half().float())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_model_is_restored(layout, scheme):
    model = toys.toy(layout)
    before = weights(model)
    with pytest.raises(RuntimeError), quantised(model, scheme):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        raise RuntimeError
    assert same_weights(model, before)
    assert changed and all("attn" in name or "mlp" in name for name in changed)
    assert not any("norm" in name or "bias" in name for name in changed)


def test_survival_grows_with_precision_and_size(layout, tmp_path):
    base = toys.save_toy(tmp_path / "base", layout)
    delta = random_delta(toys.toy(layout), size=1e-3)
    rows = {row["scheme"]: row for row in quantisation_survival(base, delta)}
    share = {scheme: row["share"] for scheme, row in rows.items()}
    assert share["fp16"] > share["bf16"] > share["int8"] > share["int4"]
    assert rows["bf16"]["outside"] == 0 and all(
        row["entries"] == rows["bf16"]["entries"] for row in rows.values()
    )
    large = quantisation_survival(base, delta, scale=100.0, schemes=["int8"])[0]
    assert (
        large["share"] > 0.9
        and large["projection"] == pytest.approx(1, abs=0.02)
        and large["error"] < 0.05
    )


def test_survival_of_a_bf16_checkpoint_is_what_verify_counts(tmp_path):
    from cdelta.delta.apply import save_edited
    from cdelta.delta.verify import verify

    base = toys.save_toy(tmp_path / "base", dtype=torch.bfloat16)
    delta = random_delta(toys.toy("llama", dtype=torch.bfloat16), size=1e-3)
    report = verify(base, save_edited(base, delta, tmp_path / "out"), delta)
    assert quantisation_survival(base, delta, schemes=["bf16"])[0]["survived"] == report.survived
