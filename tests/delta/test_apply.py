"""A written checkpoint is the base plus the delta; verify sees every bit; revert undoes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from edits import random_delta
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cdelta.circuit.circuit import ParameterMask
from cdelta.delta import apply
from cdelta.delta.apply import revert, save_edited
from cdelta.delta.base import WrongBase
from cdelta.delta.verify import verify
from cdelta.delta.weight_delta import WeightDelta
from cdelta.errors import CdeltaError
from cdelta.models.checkpoint import Checkpoint
from cdelta.models.spec import ModelSpec

IDS = torch.tensor([[2, 9, 30, 41, 7], [60, 3, 3, 11, 80]])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TESTS = Path(__file__).parents[1]


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager")


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def sharded_toy(folder: Path, family: str = "llama", **kw) -> Path:
    toys.toy(family, **kw).save_pretrained(folder, max_shard_size="30KB")
    toys.toy_tokenizer().save_pretrained(folder)
    return folder


def first_layer_mask(model) -> ParameterMask:
    units = [("a", 0, 1), ("m", 0, 3), ("m", 0, 40)]
    return ParameterMask.from_units(ModelSpec.from_model(model), units)


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_model_is_the_applied_one_bit_for_bit(layout, dtype, tmp_path):
    base = toys.save_toy(tmp_path / "base", layout, dtype=DTYPES[dtype])
    model = load(base)
    delta = random_delta(model)
    out = save_edited(base, delta, tmp_path / "out", scale=0.6)
    with delta.applied(model, 0.6):
        edited = load(out)
        for (name, a), (_, b) in zip(model.named_parameters(), edited.named_parameters()):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        assert torch.equal(model(IDS).logits, edited(IDS).logits)
    report = verify(base, out, delta)
    assert (
        report.ok
        and report.scale == 0.6
        and report.mask_entries == delta.count()
        and report.changed_outside == 0
    )
    assert report.n_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("save", [toys.save_toy, sharded_toy])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])  # untied, tied, tied and fused
def test_same_files_names_and_bytes_but_for_the_mask(save, family, tmp_path):
    base = save(tmp_path / "base", family)
    delta = random_delta(load(base), mask=first_layer_mask(load(base)))
    out = save_edited(base, delta, tmp_path / "out")
    before, after = files(base), files(out)
    own = {"README.md", "cdelta/edit.json", "cdelta/original.safetensors"}
    assert set(after) - set(before) == own and not set(before) - set(after)
    checkpoint = Checkpoint(base)
    touched = {checkpoint.file_of[checkpoint.key_of[name]] for name in delta.values}
    assert {name for name in before if before[name] != after[name]} == touched
    linked = {file for file in checkpoint.shards if os.path.samefile(base / file, out / file)}
    assert linked == set(checkpoint.shards) - touched and (save is toys.save_toy or linked)
    assert [len(before[file]) for file in touched] == [len(after[file]) for file in touched]


def test_base_is_never_written(tmp_path):
    base = sharded_toy(tmp_path / "base")
    before = files(base)
    save_edited(base, random_delta(load(base)), tmp_path / "out")
    assert files(base) == before


def test_other_weight_formats_do_not_ride_along(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors"):
        (base / name).write_bytes(b"the unedited weights")
    out = save_edited(base, random_delta(load(base)), tmp_path / "out")
    assert not [
        p
        for p in out.iterdir()
        if p.name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors")
    ]


def test_names_without_the_models_prefix_are_found(tmp_path):
    base = toys.save_toy(
        tmp_path / "base", "gpt2"
    )  # as on the hub: "h.0..." instead of "transformer.h.0..."
    renamed = {
        name.removeprefix("transformer."): t
        for name, t in load_file(base / "model.safetensors").items()
    }
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    model = load(base)
    delta = random_delta(model)
    out = save_edited(base, delta, tmp_path / "out")
    assert (
        load_file(out / "model.safetensors").keys() == renamed.keys()
        and verify(base, out, delta).ok
    )
    with delta.applied(model):
        assert torch.equal(model(IDS).logits, load(out)(IDS).logits)


@pytest.mark.parametrize("save", [toys.save_toy, sharded_toy])
@pytest.mark.parametrize("dtype", DTYPES)
def test_revert_gives_every_byte_back(save, dtype, tmp_path):
    base = save(tmp_path / "base", dtype=DTYPES[dtype])
    (base / "README.md").write_text("the base's own card")
    delta = random_delta(load(base), size=1.0)
    out = save_edited(base, delta, tmp_path / "out", scale=0.37)
    assert revert(out, delta, tmp_path / "back") is True
    assert files(tmp_path / "back") == files(base)


def test_edits_on_edits_are_reverted_one_by_one(tmp_path):
    base = toys.save_toy(tmp_path / "base", dtype=torch.bfloat16)
    first = random_delta(load(base), seed=1)
    one = save_edited(base, first, tmp_path / "one")
    second = random_delta(load(one), seed=2)
    two = save_edited(one, second, tmp_path / "two")
    with pytest.raises(WrongBase, match="last edit"):
        revert(two, first, tmp_path / "no")
    assert revert(two, second, tmp_path / "one again") and files(tmp_path / "one again") == files(
        one
    )
    assert revert(tmp_path / "one again", first, tmp_path / "base again") and files(
        tmp_path / "base again"
    ) == files(base)


def test_revert_without_a_record_is_subtraction_and_says_so(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    model = load(base)
    delta = random_delta(model)
    with delta.applied(model):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(WrongBase, match="force a subtraction"):
        revert(tmp_path / "out", delta, tmp_path / "back")
    assert revert(tmp_path / "out", delta, tmp_path / "back", force=True) is False
    for a, b in zip(load(base).parameters(), load(tmp_path / "back").parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_revert_notices_a_later_change(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    delta = random_delta(load(base))
    out = save_edited(base, delta, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CdeltaError, match="changed after the edit"):
        revert(out, delta, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "cdelta/base_README.md"])
def test_revert_notices_a_changed_file(name, tmp_path):
    base = toys.save_toy(tmp_path / "base")
    (base / "README.md").write_text("card")
    delta = random_delta(load(base))
    out = save_edited(base, delta, tmp_path / "out")
    for change in (lambda path: path.write_text(path.read_text() + " "), Path.unlink):
        change(out / name)
        with pytest.raises(CdeltaError, match="changed after the edit|no config.json"):
            revert(out, delta, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# ---------------------------------------------------------------------- verify


def flip(path: Path, name: str, entry: int, bit: int = 0) -> None:
    """Flip one bit of one entry in place."""
    tensors = load_file(path)
    raw = (
        tensors[name].view({2: torch.int16, 4: torch.int32}[tensors[name].element_size()]).view(-1)
    )
    raw[entry] ^= 1 << bit
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flipped_bit_outside_the_mask_is_found(dtype, tmp_path):
    base = toys.save_toy(tmp_path / "base", dtype=DTYPES[dtype])
    delta = random_delta(load(base), mask=first_layer_mask(load(base)))
    for number, name in enumerate(
        ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight")
    ):
        out = save_edited(base, delta, tmp_path / str(number))
        flip(
            out / "model.safetensors", name, entry=5
        )  # up_proj: row 0, and the mask owns rows 3 and 40
        report = verify(base, out, delta)
        assert not report.ok and report.changed_outside == 1 and report.wrong_inside == 0
        assert report.problems == (f"{name}: 1 entries outside the mask changed.",)


def test_what_verify_reports(tmp_path):
    base = toys.save_toy(tmp_path / "base", dtype=torch.bfloat16)
    delta = random_delta(load(base), size=1e-3)
    out = save_edited(base, delta, tmp_path / "out")
    report = verify(base, out, delta)
    assert report.ok and 0 < report.survived < report.nonzero == delta.count()
    assert json.loads(report.to_json())["ok"] is True
    assert str(report).startswith("Verified: at scale 1 ") and "\n" not in str(report)
    wrong = verify(base, out, delta, scale=-40.0)
    assert not wrong.ok and wrong.wrong_inside > 0 and str(wrong).startswith("NOT verified")
    assert not verify(base, base, 100 * delta).ok
    assert verify(base, base, delta, scale=0.0).ok


def test_verify_accepts_the_same_edit_in_other_shards(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    model = load(base)
    delta = random_delta(model)
    with delta.applied(model):
        model.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    toys.toy_tokenizer().save_pretrained(tmp_path / "out")
    assert verify(base, tmp_path / "out", delta).ok


def test_verify_names_other_differences(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    delta = random_delta(load(base))

    def problems(out: Path) -> str:
        return " ".join(verify(base, out, delta).problems)

    out = save_edited(base, delta, tmp_path / "dtype")
    load(out).half().save_pretrained(out)
    assert "F16" in problems(out)
    out = save_edited(base, delta, tmp_path / "tensor")
    tensors = load_file(out / "model.safetensors")
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight is only in" in problems(out) and "extra is only in" in problems(out)
    out = save_edited(base, delta, tmp_path / "tokenizer")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").write_text("{}")
    assert "tokenizer.json differs" in problems(out)
    out = save_edited(base, delta, tmp_path / "more")
    for name in ("adapter_config.json", "pytorch_model.bin", "more/template.jinja"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
        assert name in problems(out)
        (out / name).unlink()
    assert problems(out) == ""


def test_verify_reads_few_rows_at_a_time(tmp_path, monkeypatch):
    base = toys.save_toy(tmp_path / "base")
    delta = random_delta(load(base))
    out = save_edited(base, delta, tmp_path / "out")
    whole = verify(base, out, delta)
    monkeypatch.setattr("cdelta.delta.verify.ENTRIES_AT_ONCE", 100)
    assert verify(base, out, delta) == whole and whole.ok
    flip(out / "model.safetensors", "model.layers.1.mlp.down_proj.weight", entry=700)
    report = verify(base, out, delta)
    assert report.changed_outside + report.wrong_inside == 1


def test_the_last_bit_inside_the_mask_counts(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    delta = random_delta(load(base))
    out = save_edited(base, delta, tmp_path / "out")
    name, (dim, index) = next(iter(delta.slices.items()))
    row_length = load_file(out / "model.safetensors")[name].shape[1]
    entry = int(index[0]) * (row_length if dim == 0 else 1)
    flip(out / "model.safetensors", name, entry)
    report = verify(base, out, delta)
    assert report.wrong_inside == 1 and report.changed_outside == 0


# ---------------------------------------------------------------------- bad input, kills


def test_bad_input_leaves_nothing(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    delta = random_delta(load(base))
    other = toys.save_toy(tmp_path / "other", seed=1)
    cut = toys.save_toy(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1000])
    (tmp_path / "empty").mkdir()
    foreign = random_delta(toys.toy("qwen3"))
    out = tmp_path / "out"
    for path, what, scale, message in (
        (other, delta, 1.0, "not for this model"),
        (cut, delta, 1.0, "damaged or truncated"),
        (tmp_path / "empty", delta, 1.0, "no checkpoint folder"),
        (base, foreign, 1.0, "another architecture"),
        (base, delta, float("nan"), "finite"),
        (base, WeightDelta(delta.values, delta.slices), 1.0, "made for base"),
    ):
        with pytest.raises(CdeltaError, match=message):
            save_edited(path, what, out, scale)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "cut", "empty", "other"]
    save_edited(other, delta, out, force=True)
    with pytest.raises(CdeltaError, match="already exists"):
        save_edited(base, delta, out)


def test_missing_shard_and_damaged_index(tmp_path):
    base = sharded_toy(tmp_path / "base")
    delta = random_delta(load(base))
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.rename(base / "hidden")
    with pytest.raises(CdeltaError, match="lacks model-00001"):
        save_edited(base, delta, tmp_path / "out")
    (base / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CdeltaError, match="index.json is damaged"):
        save_edited(base, delta, tmp_path / "out")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    base = toys.save_toy(tmp_path / "base")
    delta = random_delta(load(base))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(apply.shutil, "copyfile", full)
    with pytest.raises(CdeltaError, match="cannot write .*out: No space left on device"):
        save_edited(base, delta, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.skipif(not os.access("/proc", os.R_OK), reason="no read-only file system at hand")
def test_read_only_output(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    with pytest.raises(CdeltaError, match="cannot write /proc/x"):
        save_edited(base, random_delta(load(base)), "/proc/x/out")


KILLED = """
import sys, time; sys.path[:0] = [{tests!r}, {root!r}]
from cdelta import cli
from cdelta.delta import apply
apply._write_record = lambda *_: (print("writing", flush=True), time.sleep(60))
sys.exit(cli.main(["apply", {base!r}, {delta!r}, {out!r}]))
"""


@pytest.mark.long
@pytest.mark.parametrize("signal, left_hidden", [("SIGTERM", False), ("SIGKILL", True)])
def test_a_kill_in_the_middle_of_a_save_leaves_no_output(signal, left_hidden, tmp_path):
    import signal as signals

    base = toys.save_toy(tmp_path / "base")
    delta = random_delta(load(base))
    delta.save(tmp_path / "delta")
    names = dict(
        tests=str(TESTS),
        root=str(TESTS.parent),
        base=str(base),
        delta=str(tmp_path / "delta"),
        out=str(tmp_path / "out"),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(**names)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(getattr(signals, signal))
    assert process.wait() != 0
    left = {p.name for p in tmp_path.iterdir()} - {"base", "delta"}
    assert all(name.startswith(".out.") for name in left) and bool(left) == left_hidden
    save_edited(base, delta, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "delta", "out"}
