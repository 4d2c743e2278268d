"""A run's artifacts: what is visible when, and what the manifest holds."""

import json
import os

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from cdelta.artifact.presets import Preset, resolve
from cdelta.artifact.run import (
    RunReader,
    collect_figures,
    discard,
    open_run,
    read_manifest,
    read_settings,
    reuse_stages,
    write_settings,
)
from cdelta.artifact.stages import read_stage
from cdelta.errors import CdeltaError
from cdelta.files import file_hash, locked
from cdelta.settings import changed

matplotlib.use("Agg")
TABLE = pd.DataFrame({"a_b": [1.23456789, 2.0], "text": ["50 %", "x & y"]})


def open_stage(folder, stage="02_attribution", **kw):
    return open_run(stage, preset="smoke", run_dir=str(folder), **kw)


def finish_table(folder, stage="02_attribution", id="tab_a", table=TABLE):
    run = open_stage(folder, stage)
    run.table(id, table, "A caption")
    run.finish()


def make_figure():
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([1, 3, 2])
    return figure


def test_nothing_is_visible_before_finish_and_everything_after(tmp_path):
    run = open_stage(tmp_path)
    run.path("scores/crime.txt").write_text("1")
    run.figure("fig_a", make_figure(), "A figure")
    assert not (tmp_path / "02_attribution").exists() and not (tmp_path / "figures").exists()
    with pytest.raises(CdeltaError, match="02_attribution.*not finished.*--only 02"):
        open_stage(tmp_path, "03_circuit").input("02_attribution")
    run.finish()
    assert (
        open_stage(tmp_path, "03_circuit").input("02_attribution", "scores/crime.txt").read_text()
        == "1"
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "fig_a.pdf",
        "fig_a.png",
        "manifest.json",
    }


def test_the_manifest_has_the_fixed_form(tmp_path):
    finish_table(tmp_path)
    manifest = json.loads((tmp_path / "figures" / "manifest.json").read_text())
    assert set(manifest) == {"preset", "commit", "items"} and manifest["preset"] == tmp_path.name
    (item,) = manifest["items"]
    assert set(item) == {"id", "kind", "notebook", "files", "sha256", "title", "caption"}
    assert (item["id"], item["kind"], item["notebook"], item["caption"]) == (
        "tab_a",
        "table",
        "02_attribution",
        "A caption",
    )
    assert item["sha256"] == {
        name: file_hash(tmp_path / "figures" / name) for name in item["files"]
    }


def test_a_finished_stage_tells_time_memory_and_settings(tmp_path):
    finish_table(tmp_path)
    facts = read_stage(tmp_path, "02_attribution")
    assert (
        facts["peak_memory_mb"] > 50
        and facts["seconds"] >= 0
        and facts["settings"]["name"] == "smoke"
    )


def test_tables_keep_full_precision_and_are_booktabs(tmp_path):
    finish_table(tmp_path)
    assert pd.read_csv(tmp_path / "figures" / "tab_a.csv").equals(TABLE)
    tex = (tmp_path / "figures" / "tab_a.tex").read_text()
    assert r"\toprule" in tex and r"a\_b" in tex and r"50 \%" in tex and "1.235" in tex


def test_a_page_is_an_item_like_others(tmp_path, capsys):
    run = open_stage(tmp_path)
    run.page("page_a", "<!DOCTYPE html><title>x</title>", "Click <here>.")
    run.finish()
    (item,) = read_manifest(tmp_path / "figures")["items"]
    assert (item["kind"], item["files"]) == ("page", ["page_a.html"])
    assert "figures/page_a.html" in capsys.readouterr().out


def test_an_index_with_a_meaning_is_written(tmp_path):
    finish_table(tmp_path, table=TABLE.set_index("text"))
    assert (tmp_path / "figures" / "tab_a.csv").read_text().startswith("text,a_b\n50 %,")


def test_an_index_without_a_name_is_not(tmp_path):
    finish_table(tmp_path, table=TABLE[TABLE["a_b"] > 1.5])
    assert (tmp_path / "figures" / "tab_a.csv").read_text() == "a_b,text\n2.0,x & y\n"


def test_figures_are_the_same_bytes_every_time_and_embed_editable_fonts(tmp_path):
    for folder in ("one", "two"):
        run = open_stage(tmp_path / folder)
        run.figure("fig_a", make_figure(), "A figure")
        run.finish()
    pdf, png = (
        [
            (tmp_path / folder / "figures" / f"fig_a.{kind}").read_bytes()
            for folder in ("one", "two")
        ]
        for kind in ("pdf", "png")
    )
    assert pdf[0] == pdf[1] and png[0] == png[1]
    assert b"CreationDate" not in pdf[0] and b"/Type3" not in pdf[0]


def test_an_id_is_used_once(tmp_path):
    run = open_stage(tmp_path)
    run.table("tab_a", TABLE, "A caption")
    with pytest.raises(CdeltaError, match="'tab_a' was saved before"):
        run.table("tab_a", TABLE, "again")
    run.finish()
    other = open_stage(tmp_path, "03_circuit")
    other.table("tab_a", TABLE, "of another stage")
    with pytest.raises(CdeltaError, match="reuses the ids tab_a"):
        other.finish()


def test_a_repeated_stage_replaces_its_artifacts_and_items_only(tmp_path):
    finish_table(tmp_path, "01_dataset", "tab_other")
    finish_table(tmp_path, id="tab_old")
    finish_table(tmp_path, id="tab_new")
    assert [item["id"] for item in read_manifest(tmp_path / "figures")["items"]] == [
        "tab_other",
        "tab_new",
    ]
    assert not (tmp_path / "figures" / "tab_old.csv").exists()


def test_a_stage_started_again_fences_the_older_one_off(tmp_path):
    old = open_stage(tmp_path)
    new = open_stage(tmp_path)
    for use in (old.finish, lambda: old.path("x")):
        with pytest.raises(CdeltaError, match="started again elsewhere"):
            use()
    new.path("x").write_text("new")
    new.finish()
    assert (tmp_path / "02_attribution" / "x").read_text() == "new"
    assert not list(tmp_path.glob(".02_*")) and not list(tmp_path.glob(".trash*"))


def test_discard_removes_an_invalidated_stage_with_its_figures(tmp_path):
    finish_table(tmp_path)
    (
        tmp_path / "02_attribution" / "stage.json"
    ).unlink()  # what Snakemake does before it runs the stage again
    discard(tmp_path, "02_attribution")
    assert (
        not (tmp_path / "02_attribution").exists()
        and read_manifest(tmp_path / "figures")["items"] == []
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"manifest.json"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda figures: (figures / "tab_a.csv").unlink(),
        lambda figures: (figures / "tab_a.csv").write_text("edited"),
        lambda figures: (figures / "fig_mine.png").write_text("x"),
        lambda figures: (figures / "manifest.json").unlink(),
    ],
)
def test_missing_changed_and_undeclared_figures_are_put_right(tmp_path, spoil):
    finish_table(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    spoil(tmp_path / "figures")
    collect_figures(tmp_path)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}


def test_unknown_names_are_one_clear_error(tmp_path):
    with pytest.raises(CdeltaError, match="unknown stage '12_magic'"):
        open_stage(tmp_path, "12_magic")
    finish_table(tmp_path)
    with pytest.raises(CdeltaError, match="has no 'nope.json'.*stage.json"):
        open_stage(tmp_path, "03_circuit").input("02_attribution", "nope.json")


def test_device_auto_resolves_and_a_missing_gpu_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert open_stage(tmp_path).device == "cpu"
    with pytest.raises(CdeltaError, match="'cuda' is not available here"):
        open_stage(tmp_path, device="cuda").device


def test_a_lock_is_exclusive_and_freed(tmp_path):
    lock = tmp_path / "lock"
    with locked(lock), pytest.raises(BlockingIOError), locked(lock, wait=False):
        pass
    with locked(tmp_path / "lock", wait=False):
        pass


def test_scratch_outlives_a_restart_and_goes_with_the_finish(tmp_path):
    finish_table(tmp_path, "01_dataset", "tab_other")
    open_stage(tmp_path).scratch("rows").joinpath("part").write_text("1")
    again = open_stage(tmp_path)  # the first one was killed
    assert again.scratch("rows").joinpath("part").read_text() == "1"
    assert RunReader("02_attribution", again.preset, tmp_path).scratch("rows") == again.scratch(
        "rows"
    ), "other processes share it"
    assert not list(
        RunReader("02_attribution", resolve("tiny"), tmp_path).scratch("rows").iterdir()
    ), "other settings do not"
    again.finish()
    assert not again.scratch("rows").joinpath("part").exists()


def test_seconds_count_killed_tries_up_to_their_last_file(tmp_path):
    for worked in (60, 30):  # seconds of two tries, long ago
        work = open_stage(tmp_path).scratch(".")
        (work / f"part {worked}").write_text("1")
        for path in work.iterdir():
            os.utime(path, (1000, 1000 + worked * path.name.startswith("part")))
        os.utime(work, (1000, 1000))
    open_stage(tmp_path).finish()
    assert 90 <= read_stage(tmp_path, "02_attribution")["seconds"] < 120


def test_scratch_belongs_to_the_runs_of_earlier_stages(tmp_path):
    finish_table(tmp_path, "01_dataset", "tab_other")
    before = open_stage(tmp_path).scratch("rows")
    (tmp_path / "01_dataset" / "stage.json").write_text("{}")
    assert open_stage(tmp_path).scratch("rows") != before


def test_the_folders_own_settings_come_before_the_presets(tmp_path):
    mine = resolve("smoke", overrides=["edit.lr=0.5"], run_name="mine")
    write_settings(tmp_path, mine, device="cpu")
    assert read_settings(tmp_path) == mine
    run = open_stage(tmp_path, "04_edit")
    assert run.settings.edit.lr == 0.5 and run.preset.name == "mine"


def test_stages_of_the_same_outcome_are_taken_from_another_run(tmp_path, monkeypatch):
    """Stage 02 differs, so 03, which reads it, is not taken although its own settings are equal."""
    source, target = tmp_path / "source", tmp_path / "target"
    monkeypatch.setattr("cdelta.artifact.run.fingerprint", lambda stage, _: f"print of {stage}")
    for stage in ("00_subject", "01_dataset", "02_attribution", "03_circuit"):
        finish_table(source, stage, f"tab_{stage}")
        (source / "notebooks").mkdir(exist_ok=True)
        (source / "notebooks" / f"{stage}.ipynb").write_text("{}")
    names = ("00_subject", "01_dataset", "02_attribution", "03_circuit")
    wanted = {name: f"print of {name}" for name in names} | {"02_attribution": "another"}
    assert reuse_stages(source, target, wanted) == ["00_subject", "01_dataset"]
    items = read_manifest(target / "figures")["items"]
    assert [item["id"] for item in items] == ["tab_00_subject", "tab_01_dataset"]
    assert all((target / "figures" / file).exists() for item in items for file in item["files"])
    assert (target / "notebooks" / "01_dataset.ipynb").exists()
    assert not (target / "03_circuit").exists() and (source / "03_circuit").exists()


def test_fault_19_settings_of_any_legal_path_come_back_as_they_were(tmp_path):
    folder = tmp_path / "run #3" / "it's {x} 'q'\n: - !tag"
    model = str(folder / "model #1")
    write_settings(folder, changed(Preset(), {"model": model, "policy": f"cast={model}"}))
    assert read_settings(folder).model == model
    assert read_settings(folder).policy == f"cast={model}"
