"""Delta arithmetic is that of dense tensors; every bit is restored; files are byte-exact."""

import json

import pytest
import torch
import toys
from edits import mask_of, random_delta, same_weights, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from cdelta.delta.base import WrongBase, model_hash
from cdelta.delta.weight_delta import METADATA, OVERLAPS, WEIGHTS, WeightDelta, combine, compose
from cdelta.errors import CdeltaError
from cdelta.files import new_folder

MODEL = toys.toy("llama")
scales = st.floats(-3, 3, allow_nan=False, width=32)
deltas = st.integers(0, 5).map(lambda seed: random_delta(MODEL, seed=seed))


def dense(delta: WeightDelta) -> dict[str, torch.Tensor]:
    """The delta as full tensors on all parameters."""
    full = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in MODEL.named_parameters()}
    for name, (dim, index) in delta.slices.items():
        full[name].index_copy_(dim, index, delta.values[name].double())
    return full


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=0, atol=tolerance) for name in a)


@settings(max_examples=20, deadline=None)
@given(a=deltas, b=deltas, k=scales)
def test_algebra_is_that_of_dense_tensors(a, b, k):
    da, db = dense(a), dense(b)
    assert equal(dense(a + b), {n: da[n] + db[n] for n in da})
    assert equal(dense(a - b), {n: da[n] - db[n] for n in da})
    assert equal(dense(k * a), {n: k * da[n] for n in da})
    assert equal(dense(a + b), dense(b + a), 0)
    assert equal(dense(a - a), {n: 0 * da[n] for n in da}, 0)
    assert equal(dense(-a), dense(-1.0 * a), 0)
    assert equal(dense(k * (a + b)), dense(k * a + k * b), 1e-5)


@settings(max_examples=4, deadline=None)
@given(a=deltas, b=deltas, c=deltas)
def test_sums_do_not_depend_on_the_order(a, b, c):
    for overlap in OVERLAPS:
        assert combine([a, b, c], overlap).hash() == combine([c, a, b], overlap).hash()
    assert equal(dense(combine([a, b, c])), dense(a + b + c), 1e-6)


def test_subtracting_one_of_two_leaves_the_other():
    a, b = random_delta(MODEL, seed=1), random_delta(MODEL, seed=2)
    assert equal(dense(a + b - b), dense(a))


def test_overlap_rules():
    mask = mask_of(MODEL)
    a = random_delta(MODEL, mask=mask, seed=1)
    b, c = -2.0 * a, random_delta(MODEL, seed=3)
    assert equal(dense(combine([a, b], "mean")), dense(-0.5 * a))
    assert equal(dense(combine([a, b], "largest")), dense(b), 0)
    owned = dense(WeightDelta({n: torch.ones_like(v) for n, v in a.values.items()}, a.slices))
    mixed, sum_ = dense(combine([a, c], "mean")), dense(combine([a, c], "sum"))
    alone = {
        n: torch.where((owned[n] == 0) | (dense(c)[n] == 0), sum_[n], sum_[n] / 2) for n in sum_
    }
    assert equal(mixed, alone)
    assert equal(
        dense(combine([a, b, 0.5 * b], "elect")), dense(-1.5 * a)
    )  # a is outvoted everywhere
    assert equal(
        dense(combine([a, c], "elect")),
        {
            n: torch.where(x * y > 0, (x + y) / 2, torch.where(x.abs() > y.abs(), x, y))
            for (n, x), y in zip(dense(a).items(), dense(c).values())
        },
    )
    with pytest.raises(CdeltaError, match="overlap rule"):
        combine([a, b], "vote")
    with pytest.raises(WrongBase, match="different base"):
        combine([a, b.with_metadata(base_hash="other")])


def test_compose_takes_each_delta_at_its_own_scale():
    a, b = (
        random_delta(MODEL, seed=seed).with_metadata(category=name, k=k)
        for seed, name, k in ((1, "crime", 0.5), (2, "hate", 2.0))
    )
    both = compose([a, b])
    assert (
        equal(dense(both), dense(0.5 * a + 2.0 * b))
        and both.metadata["k"] == 1.0
        and both.metadata["category"] == "crime+hate"
    )
    assert [part["hash"] for part in both.metadata["parts"]] == [a.hash(), b.hash()]
    assert (
        both.metadata["base_hash"] == a.metadata["base_hash"]
        and both.metadata["shapes"].keys() == both.values.keys()
    )
    assert equal(dense(both - 2.0 * b), dense(0.5 * a))


def test_restrict_splits_a_delta_into_parts():
    delta, other = random_delta(MODEL, seed=1), mask_of(MODEL, seed=2)
    inside = delta.restrict(other)
    assert equal(
        dense(delta), {n: dense(inside)[n] + dense(delta - inside)[n] for n in dense(delta)}, 0
    )
    assert delta.restrict(mask_of(MODEL, seed=1)).hash() == delta.hash()
    zeros = WeightDelta.zeros(other)
    outside = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in MODEL.named_parameters()}
    for name, (dim, index) in zeros.slices.items():
        outside[name].index_fill_(dim, index, False)
    assert all(not dense(inside)[n][outside[n]].any() for n in outside)


def test_scaled_by_layer_and_norms():
    delta = random_delta(MODEL)
    halved = delta.scaled_by_layer({0: 0.5, 1: 0.0})
    for name, value in delta.values.items():
        factor = {".0.": 0.5, ".1.": 0.0}.get(name[len("model.layers") :][:3], 1.0)
        assert torch.equal(halved.values[name], factor * value)
    whole = torch.cat([v.flatten() for v in delta.values.values()]).norm().item()
    assert delta.norm() == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_applied_restores_every_bit_also_after_errors_and_nested(layout, dtype):
    model = toys.toy(layout, dtype=dtype)
    before, first, second = (
        weights(model),
        random_delta(model, seed=1),
        random_delta(model, seed=2, size=30.0),
    )
    with pytest.raises(RuntimeError, match="inside"), first.applied(model, 0.7):
        middle = weights(model)
        assert not same_weights(model, before)
        with second.applied(model, -2.0):
            assert not same_weights(model, middle)
        assert same_weights(model, middle)
        raise RuntimeError("inside")
    assert same_weights(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_adds_in_fp32_and_rounds_once(dtype):
    model = toys.toy("llama", dtype=dtype)
    delta, before = random_delta(model), weights(model)
    change = dense(delta)
    with delta.applied(model, 0.3):
        for name, parameter in model.named_parameters():
            wanted = (before[name].float() + 0.3 * change[name].float()).to(dtype)
            assert torch.equal(parameter, wanted)


def test_applied_with_zero_scale_keeps_negative_zeros():
    model = toys.toy("llama")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(-0.0)
    with random_delta(model).applied(model, 0.0):
        assert model.model.layers[0].mlp.up_proj.weight.signbit().all()


def test_applied_refuses_another_architecture_and_leaves_it_alone():
    other = toys.toy("qwen3")
    before = weights(other)
    with (
        pytest.raises(WrongBase, match="another architecture"),
        random_delta(MODEL).applied(other),
    ):
        pass
    with (
        pytest.raises(CdeltaError, match="finite"),
        random_delta(other).applied(other, float("nan")),
    ):
        pass
    assert same_weights(other, before)


def test_save_and_load_are_byte_exact(tmp_path):
    delta = random_delta(MODEL)
    loaded = WeightDelta.load(delta.save(tmp_path / "a"))
    loaded.save(tmp_path / "b")
    assert loaded.hash() == delta.hash() and loaded.mask_hash() == mask_of(MODEL).hash()
    assert loaded.metadata == delta.metadata
    for file in (WEIGHTS, METADATA):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_damaged_files_are_one_clear_error(tmp_path):
    folder = random_delta(MODEL).save(tmp_path / "d")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CdeltaError, match="damaged"):
        WeightDelta.load(folder)
    (folder / WEIGHTS).write_bytes(whole)
    header = json.loads((folder / METADATA).read_text())
    for changed in ({"dims": header["dims"]}, header | {"format": "cdelta.delta.1", "dims": [1]}):
        (folder / METADATA).write_text(json.dumps(changed))
        with pytest.raises(CdeltaError, match="damaged"):
            WeightDelta.load(folder)
    with pytest.raises(CdeltaError, match="no weight delta"):
        WeightDelta.load(tmp_path)


def test_deltas_from_before_there_were_checksums_are_read(tmp_path):
    delta = random_delta(MODEL)
    folder = delta.save(tmp_path / "d")
    header = json.loads((folder / METADATA).read_text())
    old = {"format": "cdelta.delta.1", "dims": header["dims"], "metadata": header["metadata"]}
    (folder / METADATA).write_text(json.dumps(old))
    assert WeightDelta.load(folder).hash() == delta.hash()


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    delta = random_delta(MODEL)
    next(iter(delta.values.values())).view(-1)[0] = float("nan")
    with pytest.raises(CdeltaError, match="not finite"):
        delta.save(tmp_path / "d")
    assert not any(tmp_path.iterdir())


def test_hash_is_that_of_the_stored_bits(layout, tmp_path):
    path = toys.save_toy(tmp_path / "a", layout)
    model = toys.toy(layout)
    assert model_hash(path) == model_hash(str(path)) == model_hash(model)
    assert model_hash(model) != model_hash(toys.toy(layout, seed=1))
    assert model_hash(model) != model_hash(toys.toy(layout, dtype=torch.bfloat16))
    with random_delta(model).applied(model):
        assert model_hash(model) != model_hash(path)


def test_hash_does_not_depend_on_the_shards(tmp_path):
    toys.toy("gemma2").save_pretrained(tmp_path / "one")
    toys.toy("gemma2").save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert model_hash(tmp_path / "one") == model_hash(tmp_path / "many")


def test_check_base_refuses_another_base():
    delta = random_delta(MODEL)
    delta.check_base(MODEL)
    with pytest.raises(WrongBase, match="use that base, or force it"):
        delta.check_base(toys.toy("llama", seed=1))
    with pytest.raises(WrongBase):
        WeightDelta(delta.values, delta.slices).check_base(MODEL)


def test_new_folder_is_all_or_nothing(tmp_path):
    with pytest.raises(ValueError), new_folder(tmp_path / "x") as partial:
        (partial / "file").write_text("half")
        raise ValueError
    with (
        pytest.raises(CdeltaError, match="cannot write .*No space left"),
        new_folder(tmp_path / "x"),
    ):
        raise OSError(28, "No space left on device")
    (tmp_path / ".x.999999999.partial").mkdir()
    with new_folder(tmp_path / "x") as partial:
        (partial / "file").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(CdeltaError, match="already exists"), new_folder(tmp_path / "x"):
        pass
    (tmp_path / "plain").write_text("")
    with pytest.raises(CdeltaError, match="cannot write"), new_folder(tmp_path / "plain" / "x"):
        pass
