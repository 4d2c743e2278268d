"""Nothing half-written is ever seen under its own name; memory is counted in bytes everywhere."""

import hashlib
import os
import resource

import pytest
import torch

from cdelta import memory
from cdelta.errors import CdeltaError, first_line
from cdelta.files import file_hash, new_folder, remove_folder, replacing, write_json, write_text


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    write_text(path, "old ☕")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("half")
        assert path.read_text(encoding="utf-8") == "old ☕"
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "old ☕" and names(path.parent) == {"a.txt"}
    write_json(path, {"é": 1})
    assert path.read_text(encoding="utf-8") == '{\n "é": 1\n}\n'


def test_what_a_dead_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    for pid in (999999999, os.getpid() + 10**12, 1):
        (tmp_path / f".out.{pid}.partial").mkdir()
    with new_folder(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
    assert names(tmp_path) == {"out", ".out.1.partial"}
    with pytest.raises(CdeltaError, match="already exists"), new_folder(tmp_path / "out"):
        pass


def test_a_removed_folder_is_gone(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_folder(tmp_path / "a")
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == set()


def test_file_hash_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, platform, unit):
    usage = type("Usage", (), {"ru_maxrss": 5000})
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr("sys.platform", platform)
    assert memory.peak_memory() == memory.peak_memory(torch.device("cpu")) == 5000 * unit


def test_resident_and_free_memory_are_plausible():
    assert 10**7 < memory.resident_bytes() < memory.peak_memory() * 1.5
    assert memory.free_memory(torch.device("cpu")) > 10**6
    assert memory.free_memory(torch.device("meta")) is None


def test_the_first_line_of_an_error():
    assert first_line(ValueError("one.\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 999))) == 200
