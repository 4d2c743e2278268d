"""A written checkpoint is the base plus the delta and nothing else; it loads anywhere; verify sees every bit; revert undoes it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import toys
from edits import mask_of, random_delta
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from cdelta.circuit.mask import ParameterMask
from cdelta.delta import apply as deploy
from cdelta.delta.apply import read_record, revert, save_edited
from cdelta.delta.lora import export_lora
from cdelta.delta.verify import verify
from cdelta.delta.weight_delta import WeightDelta, WrongBase, compose
from cdelta.errors import CdeltaError
from cdelta.models.checkpoint import Checkpoint
from cdelta.models.generation import generate
from cdelta.models.loading import load_model
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
    return ParameterMask.from_units(
        ModelSpec.from_model(model), heads=[(0, 1)], neurons=[(0, 3), (0, 40)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_model_is_the_applied_one_bit_for_bit(family, dtype, tmp_path):
    base = toys.save_toy(tmp_path / "base", family, dtype=DTYPES[dtype])
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
    problems = lambda out: " ".join(verify(base, out, delta).problems)
    out = save_edited(base, delta, tmp_path / "dtype")
    load(out).half().save_pretrained(out)
    assert "torch.float16" in problems(out)
    out = save_edited(base, delta, tmp_path / "tensor")
    tensors = load_file(out / "model.safetensors")
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight is only in" in problems(out) and "extra is only in" in problems(out)
    out = save_edited(base, delta, tmp_path / "tokenizer")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").write_text("{}")
    assert "tokenizer.json differs" in problems(out)


# ---------------------------------------------------------------------- bad input, full disks, kills


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

    monkeypatch.setattr(deploy.shutil, "copyfile", full)
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
from cdelta import cli, deploy
deploy._write_record = lambda *_: (print("writing", flush=True), time.sleep(60))
sys.exit(cli.main(["apply", {base!r}, {delta!r}, {out!r}]))
"""


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


# ---------------------------------------------------------------------- elsewhere


def answers_elsewhere(folder: Path, prompts: list[str], runtime: str) -> list[str] | str:
    """What the script says in a process that has neither this package nor this repository."""
    code = [
        sys.executable,
        str(TESTS.parent / "cdelta" / "artifact" / "external" / "runtimes.py"),
        str(folder),
        "8",
        runtime,
    ]
    found = subprocess.run(
        code,
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize(
    "runtime, module",
    [("transformers", "transformers"), ("ctranslate2", "ctranslate2"), ("llama.cpp", "xllamacpp")],
)
def test_answers_alike_where_cdelta_cannot_be_imported(runtime, module, tmp_path):
    base = toys.save_chat_toy(
        tmp_path / "base", ["make a bomb please", "tell me about red"], vocabulary=300
    )
    model, tok = load_model(base, dtype="float32", device="cpu")
    delta, prompts = random_delta(model, size=0.3), ["make a bomb", "please tell me about red"]
    out = save_edited(base, delta, tmp_path / "out")
    with delta.applied(model):
        expected = generate(model, tok, prompts, max_new_tokens=8)
    assert expected != generate(model, tok, prompts, max_new_tokens=8)
    found = answers_elsewhere(out, prompts, runtime)
    if isinstance(found, str):
        assert find_spec(module) is None and found.startswith("ModuleNotFoundError")
        pytest.skip(f"{runtime}: {found}")
    assert found == expected


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc"
)
def test_peak_memory_of_a_streaming_apply(tmp_path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path / "base", max_shard_size="40MB")
    delta = random_delta(model, budget=0.02)
    delta.save(tmp_path / "delta")
    places = [str(tmp_path / name) for name in ("base", "delta", "out")]
    code = [sys.executable, "-m", "cdelta.artifact.external.apply_memory", *places, "1.0"]
    found = json.loads(
        subprocess.run(code, capture_output=True, text=True, check=True, cwd=TESTS.parent).stdout
    )
    assert (
        found["total"] > 100e6
        and found["delta"] >= 4 * delta.count()
        and (tmp_path / "out").is_dir()
    )
    assert 0 < found["peak"] < found["largest"] + found["delta"]


@pytest.mark.filterwarnings("ignore")
def test_lora_is_exact_and_peft_loads_it(family, tmp_path):
    base = toys.save_toy(tmp_path / "base", family)
    delta = random_delta(load(base))
    out = save_edited(base, delta, tmp_path / "out", scale=0.5)
    adapter = export_lora(delta, tmp_path / "lora", scale=0.5)
    adapted = PeftModel.from_pretrained(load(base), adapter).eval()
    torch.testing.assert_close(adapted(IDS).logits, load(out)(IDS).logits, rtol=1e-4, atol=1e-4)
    if not any(name.endswith(".bias") for name in delta.values):
        merged = adapted.merge_and_unload()
        for (name, a), (_, b) in zip(merged.named_parameters(), load(out).named_parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_lora_needs_shapes_and_a_finite_scale(tmp_path):
    delta = random_delta(toys.toy("llama"))
    with pytest.raises(CdeltaError, match="shapes"):
        export_lora(WeightDelta(delta.values, delta.slices), tmp_path / "lora")
    with pytest.raises(CdeltaError, match="finite"):
        export_lora(delta, tmp_path / "lora", scale=float("inf"))
    assert not (tmp_path / "lora").exists()


def test_model_card_says_what_was_done(tmp_path):
    base = toys.save_toy(tmp_path / "base")
    delta = random_delta(load(base))
    out = save_edited(
        base, delta, tmp_path / "out", 0.5, selectivity=[{"prompts": "target", "refused": 0.98765}]
    )
    card = (out / "README.md").read_text()
    for text in (
        "weapons",
        f"{delta.count():,} parameters",
        "| target | 0.988 |",
        "cdelta verify",
        "cdelta revert",
        "Limits",
        "0.5·ΔΘ",
    ):
        assert text in card
    both = save_edited(
        base, compose([delta, delta.with_metadata(category="fraud")]), tmp_path / "both"
    )
    assert (
        "edited to refuse weapons+fraud" in (both / "README.md").read_text()
        and "?" not in (both / "README.md").read_text()
    )
    record = read_record(out)
    assert (
        record["scale"] == 0.5
        and record["delta_hash"] == delta.hash()
        and record["mask_hash"] == mask_of(load(base)).hash()
    )
    (out / "cdelta" / "edit.json").write_text("{")
    with pytest.raises(CdeltaError, match="damaged"):
        read_record(out)
