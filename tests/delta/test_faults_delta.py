"""Faults of deltas and of what is published, each by the number it was reported under."""

import json
import shutil

import pytest
import torch
import toys
from edits import FIT, NEGATIVE, POSITIVE, RETAIN, mask_of, random_delta
from huggingface_hub.repocard import metadata_load

from cdelta import fit_delta, load_model
from cdelta.cli import main
from cdelta.delta.apply import read_record, revert, save_edited
from cdelta.delta.base import WrongBase, public_name
from cdelta.delta.lora import export_lora
from cdelta.delta.verify import verify
from cdelta.delta.weight_delta import METADATA, WEIGHTS, WeightDelta
from cdelta.errors import CdeltaError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{0}\nsize 12345\n".format(
    "a" * 64
)
SNAPSHOT = "models--acme--small-model/snapshots/0123456789abcdef"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, a delta with k = 0.25 on disk, and the edited folder; treat as read-only."""
    root = tmp_path_factory.mktemp("faults")
    base = toys.save_toy(root / "base")
    delta = random_delta(toys.toy("llama")).with_metadata(k=0.25)
    delta.save(root / "delta")
    save_edited(base, delta, root / "edited")
    return root


def copied(places, name: str, to):
    return shutil.copytree(places / name, to)


# ---------------------------------------------------------------------- 4: the delta's own k


def test_fault_04_apply_and_lora_take_the_deltas_own_k(places, tmp_path, capsys):
    base, delta = places / "base", places / "delta"
    assert main(["apply", str(base), str(delta), str(tmp_path / "out")]) == 0
    assert "k = 0.25" in capsys.readouterr().out
    assert read_record(tmp_path / "out")["scale"] == 0.25
    assert main(["lora", str(delta), str(tmp_path / "lora")]) == 0
    assert "k = 0.25" in capsys.readouterr().out
    assert main(["apply", str(base), str(delta), str(tmp_path / "two"), "--scale", "2"]) == 0
    assert read_record(tmp_path / "two")["scale"] == 2.0


def test_fault_04_every_function_does(places, tmp_path):
    delta = WeightDelta.load(places / "delta")
    assert read_record(places / "edited")["scale"] == 0.25
    exact = (
        export_lora(delta, tmp_path / "a").folder,
        export_lora(delta, tmp_path / "b", 0.25).folder,
    )
    first, second = (path / "adapter_model.safetensors" for path in exact)
    assert first.read_bytes() == second.read_bytes()
    model = toys.toy("llama")
    with delta.applied(model, 0.25):
        model.save_pretrained(tmp_path / "saved")  # no record
    toys.toy_tokenizer().save_pretrained(tmp_path / "saved")
    assert verify(places / "base", tmp_path / "saved", delta).scale == 0.25
    assert verify(places / "base", tmp_path / "saved", delta).ok


# ---------------------------------------------------------------------- 12: one base, one hash


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fitted", ["float16", "bfloat16", "float32"])
def test_fault_12_a_fit_in_another_dtype_fits_its_base(stored, fitted, tmp_path):
    base = toys.save_toy(tmp_path / "base", dtype=stored)
    model, tok = load_model(base, dtype=fitted, device="cpu")
    delta = fit_delta(model, tok, mask_of(model), POSITIVE, NEGATIVE, RETAIN, **FIT)
    out = save_edited(base, delta, tmp_path / "out")
    assert verify(base, out, delta).ok
    with pytest.raises(WrongBase):
        save_edited(toys.save_toy(tmp_path / "other", seed=1), delta, tmp_path / "no")


# ---------------------------------------------------------------------- 17: pointers and damage


def test_fault_17_revert_after_a_clone_without_lfs(places, tmp_path):
    edited = copied(places, "edited", tmp_path / "edited")
    (edited / "cdelta" / "original.safetensors").write_text(POINTER)
    with pytest.raises(CdeltaError, match="git lfs pull"):
        revert(edited, WeightDelta.load(places / "delta"), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert main(["revert", str(edited), str(places / "delta"), str(tmp_path / "back")]) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "folder"])
def test_fault_17_damaged_originals(damage, places, tmp_path):
    edited = copied(places, "edited", tmp_path / "edited")
    path = edited / "cdelta" / "original.safetensors"
    whole = bytearray(path.read_bytes())
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole[:-10] if damage == "cut" else whole)
    with pytest.raises(CdeltaError, match="damaged|missing"):
        revert(edited, WeightDelta.load(places / "delta"), tmp_path / "back")


@pytest.mark.parametrize("file", [WEIGHTS, METADATA])
def test_fault_17_pointers_of_a_delta(file, places, tmp_path):
    delta = copied(places, "delta", tmp_path / "delta")
    (delta / file).write_text(POINTER)
    with pytest.raises(CdeltaError, match="git lfs pull"):
        WeightDelta.load(delta)


@pytest.mark.parametrize("file", ["model.safetensors", "cdelta/edit.json"])
def test_fault_17_pointers_of_an_edited_folder(file, places, tmp_path):
    edited = copied(places, "edited", tmp_path / "edited")
    (edited / file).unlink()
    (edited / file).write_text(POINTER)
    for action in (verify, revert):
        where = (places / "base", edited) if action is verify else (edited,)
        more = () if action is verify else (tmp_path / "back",)
        with pytest.raises(CdeltaError, match="git lfs pull"):
            action(*where, WeightDelta.load(places / "delta"), *more)


def test_fault_17_records_of_a_wrong_shape(places, tmp_path):
    edited = copied(places, "edited", tmp_path / "edited")
    path = edited / "cdelta" / "edit.json"
    for text in ("[]", "{}", "1", '{"scale": 1}', "[" * 100_000, '{"scale": NaN}', "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(CdeltaError, match="damaged"):
            revert(edited, WeightDelta.load(places / "delta"), tmp_path / "back")


def test_fault_17_shards_outside_the_folder(places, tmp_path):
    base = copied(places, "base", tmp_path / "base")
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CdeltaError, match="no file of the folder"):
        save_edited(base, WeightDelta.load(places / "delta"), tmp_path / "out")


def test_fault_17_a_forced_edit_is_reverted_as_well(places, tmp_path):
    other = toys.save_toy(tmp_path / "other", seed=1)
    delta = WeightDelta.load(places / "delta")
    save_edited(other, delta, tmp_path / "out", force=True)
    assert revert(tmp_path / "out", delta, tmp_path / "back")
    want = (other / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == want


# ---------------------------------------------------------------------- 25: what is published


@pytest.mark.parametrize(
    "given, name",
    [
        ("acme/small-model", ("acme/small-model", None)),
        ("gpt2", ("gpt2", None)),
        (f"/home/me/.cache/hub/{SNAPSHOT}", ("acme/small-model", "0123456789abcdef")),
        (f"/home/me/.cache/hub/{SNAPSHOT}/", ("acme/small-model", "0123456789abcdef")),
        ("/home/me/models/mine", ("mine", None)),
        ("./models/mine/", ("mine", None)),
        ("..\\models\\mine", ("mine", None)),
        ("C:\\Users\\me\\mine", ("mine", None)),
        ("~/mine", ("mine", None)),
        ("", ("", None)),
    ],
)
def test_fault_25_names_hold_no_path(given, name):
    assert public_name(given) == name


def test_fault_25_card_and_adapter_name_the_base_not_a_path(tmp_path):
    base = toys.save_toy(tmp_path / SNAPSHOT)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: acme\n---\n")
    model, tok = load_model(base, device="cpu")
    delta = fit_delta(model, tok, mask_of(model), POSITIVE, NEGATIVE, RETAIN, **FIT)
    delta.save(tmp_path / "delta")
    out, adapter = save_edited(base, delta, tmp_path / "out"), tmp_path / "adapter"
    export_lora(delta, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/small-model"
    assert config["revision"] == "0123456789abcdef"
    front = metadata_load(out / "README.md")
    assert (front["base_model"], front["license"]) == ("acme/small-model", "other")
    assert front["license_name"] == "acme"
    assert metadata_load(adapter / "README.md")["license"] == "other"
    for folder in (out, adapter, tmp_path / "delta"):
        for path in (p for p in folder.rglob("*") if p.is_file()):
            assert str(tmp_path).encode() not in path.read_bytes(), path


def test_fault_25_paths_that_an_older_delta_recorded_are_not_published(places, tmp_path):
    delta = WeightDelta.load(places / "delta")
    delta = delta.with_metadata(base=f"/home/me/{SNAPSHOT}", base_revision=None)
    out = save_edited(places / "base", delta, tmp_path / "out")
    export_lora(delta, tmp_path / "adapter")
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert b"/home/me" not in path.read_bytes(), path
    assert read_record(out)["metadata"]["base_revision"] == "0123456789abcdef"


def test_fault_25_the_licence_file_goes_along(places, tmp_path):
    base = copied(places, "base", tmp_path / "base")
    (base / "LICENSE").write_text("terms")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    delta = WeightDelta.load(places / "delta")
    out = save_edited(base, delta, tmp_path / "out")
    assert (out / "LICENSE").read_text() == "terms"
    assert (out / "additional_chat_templates" / "tool.jinja").is_file()
    (out / "LICENSE").write_text("other terms")
    assert "LICENSE differs" in " ".join(verify(base, out, delta).problems)


@pytest.mark.parametrize("text", ["", "---\n: [\n---\n", "---\n- a\n---\n", "\xff\xfe", "no front"])
def test_fault_25_cards_that_cannot_be_read_are_no_licence(text, places, tmp_path):
    base = copied(places, "base", tmp_path / "base")
    (base / "README.md").write_bytes(text.encode("latin-1"))
    out = save_edited(base, WeightDelta.load(places / "delta"), tmp_path / "out")
    assert "license" not in metadata_load(out / "README.md")
    assert "not stated" in (out / "README.md").read_text()


# ---------------------------------------------------------------------- 26: one rank for all


def test_fault_26_one_rank_for_all_modules_with_its_error(places, tmp_path, capsys):
    arguments = ["lora", str(places / "delta"), str(tmp_path / "lora"), "--rank", "4"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 4 and not config["rank_pattern"] and "rank 4" in said
    written = export_lora(WeightDelta.load(places / "delta"), tmp_path / "again", rank=4)
    assert f"{written.error:.2%}" in said and 0 < written.error < 1
    assert set(written.errors) == set(config["target_modules"])
