"""What lies in a finished stage's folder is read whole or not at all."""

import json
import random

import pytest

from cdelta.artifact.run import open_run
from cdelta.errors import CdeltaError


@pytest.fixture
def folder(tmp_path):
    """A run whose first stages are finished."""
    rng = random.Random(0)
    for stage in ("00_subject", "01_dataset"):
        run = open_run(stage, "smoke", str(tmp_path))
        for name in ("rows.parquet", "policy/ids.json", "model/model.safetensors"):
            run.path(name).write_bytes(rng.randbytes(200))
        run.finish()
    return tmp_path


def test_whole_artifacts_are_read(folder):
    run = open_run("02_attribution", "smoke", str(folder))
    for stage in ("00_subject", "01_dataset"):
        for name in ("", "policy", "rows.parquet", "model/model.safetensors"):
            assert run.input(stage, name).exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_in_any_stage_folder_is_one_sentence(damage, folder):
    files = [p for p in sorted(folder.glob("*/**/*")) if p.is_file() and p.name != "stage.json"]
    files = [path for path in files if path.relative_to(folder).parts[0][0] == "0"]
    assert len(files) == 6
    for path in files:
        whole, stage = path.read_bytes(), path.relative_to(folder).parts[0]
        changed = bytes([whole[0] ^ 1]) + whole[1:] if damage == "flip" else whole[:-1]
        path.unlink()
        if damage != "missing":
            path.write_bytes(changed)
        run = open_run("02_attribution", "smoke", str(folder))
        for name in ("", str(path.relative_to(folder / stage))):
            with pytest.raises(CdeltaError, match="no longer what stage|has no"):
                run.input(stage, name)
        path.write_bytes(whole)
        assert open_run("02_attribution", "smoke", str(folder)).input(stage) == folder / stage


def test_a_damaged_record_of_a_stage_is_one_sentence(folder):
    path = folder / "01_dataset" / "stage.json"
    text = path.read_text()
    for changed in (text[:-20], "", text.replace('"sha256"', '"sha256')):
        path.write_text(changed)
        with pytest.raises(CdeltaError, match="damaged"):
            open_run("02_attribution", "smoke", str(folder)).input("01_dataset")
    facts = json.loads(text)
    facts["sha256"]["rows.parquet"] = "0" * 64
    path.write_text(json.dumps(facts))
    with pytest.raises(CdeltaError, match="no longer what stage"):
        open_run("02_attribution", "smoke", str(folder)).input("01_dataset")
