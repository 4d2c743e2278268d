"""The comparison of two runs."""

import pytest

from robustness import twice


def write(folder, **files):
    for name, text in files.items():
        path = folder / "figures" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_differs_or_is_absent_is_named(tmp_path):
    write(tmp_path / "a", tab_same="1", tab_other="1", tab_gone="1")
    write(tmp_path / "b", tab_same="1", tab_other="2")
    tables, figures, deltas = twice.compare(tmp_path / "a", tmp_path / "b")
    assert (tables["files"], tables["identical"]) == (3, 1)
    assert tables["different"] == "tab_gone tab_other"
    assert figures["files"] == deltas["files"] == 0


def test_folders_without_files_are_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="hold no tables, figures or deltas"):
        twice.main([str(tmp_path), str(tmp_path), "--out", str(tmp_path / "out.csv")])
