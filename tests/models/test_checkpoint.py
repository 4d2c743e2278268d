"""Checkpoint folders are read tensor by tensor, under the model's own names."""

import json

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from cdelta.errors import CdeltaError
from cdelta.models.checkpoint import Checkpoint, local_folder, rewrite_tensors


def test_parameters_are_the_models(family, tmp_path):
    path = toys.save_toy(tmp_path, family)
    model = dict(toys.toy(family).named_parameters())
    found = dict(Checkpoint(path).parameters())
    assert list(found) == sorted(model) and all(
        torch.equal(found[name], model[name]) for name in model
    )


def test_names_in_another_order_are_found(tmp_path):
    path = toys.save_toy(tmp_path)
    tensors = {
        ".".join(["language_model", *name.split(".")]): t
        for name, t in load_file(path / "model.safetensors").items()
    }
    save_file(tensors, path / "model.safetensors")
    assert Checkpoint(path).key_of["model.norm.weight"] == "language_model.model.norm.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rewriting_changes_only_what_it_is_told(dtype, tmp_path):
    path = toys.save_toy(tmp_path, dtype=dtype) / "model.safetensors"
    before, size = (
        {name: t.clone() for name, t in load_file(path).items()},
        path.stat().st_size,
    )  # cloned: loaded tensors map the file
    rewrite_tensors(path, {"model.norm.weight": lambda tensor: tensor.mul_(2)})
    after = load_file(path)
    assert path.stat().st_size == size
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "model.norm.weight"
    ]
    assert torch.equal(after["model.norm.weight"], 2 * before["model.norm.weight"])


def test_bad_folders_are_one_clear_error(tmp_path):
    with pytest.raises(CdeltaError, match="no config.json"):
        Checkpoint(tmp_path)
    path = toys.save_toy(tmp_path / "a")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(CdeltaError, match="config.json says"):
        Checkpoint(path).check()
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CdeltaError, match="weights and config.json disagree"):
        Checkpoint(path).check()
    (path / "model.safetensors").unlink()
    with pytest.raises(CdeltaError, match="no safetensors weights"):
        Checkpoint(path).check()


def test_integer_tensors_are_refused(tmp_path):
    save_file({"x": torch.ones(3, dtype=torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(CdeltaError, match="unquantised"):
        rewrite_tensors(tmp_path / "x.safetensors", {"x": lambda tensor: None})


def test_local_folder_is_the_folder_itself(tmp_path, monkeypatch):
    assert local_folder(tmp_path) == tmp_path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CdeltaError, match="neither a checkpoint folder nor a hub model"):
        local_folder("nobody/nothing-at-all")
