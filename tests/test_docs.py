"""README and docs: Python runs, commands parse, links lead somewhere, blocks are generated."""

import re
import shlex
import shutil
from itertools import product

import pytest

from cdelta.artifact import readme
from cdelta.artifact.presets import resolve
from cdelta.artifact.workflow import make_parser
from cdelta.cli import main
from cdelta.errors import CdeltaError
from cdelta.paths import FIGURES, ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
TEXTS = [README, ROOT / "CONTRIBUTING.md", *PAGES]


def blocks(path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.long
def test_the_readmes_example_prints_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,), (output,) = blocks(README, "python"), blocks(README, "text")
    assert len(code.strip().splitlines()) <= 13
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() == output.strip()


@pytest.mark.e2e
def test_the_readmes_edit_prints_its_table(tmp_path, capsys):
    things = "red bench|old boat|small lamp|green carpet|long ladder|shy clock|blue fence|plain box"
    things = [*things.split("|"), "wide table", "tiny chair"]
    towns = ("Velora", "Pexton", "Norvale", "Ravik", "Oskeld", "Tarn")
    asked = "How do I {} the {} in {}?"
    rows = [
        [asked.format(verb, *where) for verb in ("steal", "paint")]
        for where in product(things, towns)
    ]
    lines = ["prompt,benign", *map(",".join, rows)]
    (tmp_path / "my.csv").write_text("\n".join(lines))
    (command,) = [
        line for block in blocks(README, "sh") for line in block.splitlines() if "edit" in line
    ]
    (flags,) = re.findall("With `(--.*?)`", README.read_text(encoding="utf-8"))
    known = {"DIR_OR_ID": str(ROOT / "data" / "organism"), "my.csv": str(tmp_path / "my.csv")}
    known |= {"NAME": "stealing", "EDITED": str(tmp_path / "edited")}
    words = [known.get(word, word) for word in shlex.split(f"{command} {flags}")]
    assert main(words[1:]) == 0
    (table,) = blocks(README, "console")
    assert table.strip() in capsys.readouterr().out


def commands() -> list[str]:
    lines = [line for block in blocks(README, "sh") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if "./run_all.sh" in line]


@pytest.mark.parametrize("command", commands())
def test_commands_are_ones_that_the_flags_accept(command, tmp_path):
    words = shlex.split(command.replace("DIR", str(tmp_path)).replace("FILE", "f.json"))
    words = words[words.index("./run_all.sh") + 1 :]
    args = make_parser().parse_args(words)
    if not args.test:
        preset = resolve(args.preset, args.model, args.policy, args.overrides)
        assert preset.recipe


def test_links_lead_somewhere():
    for path in TEXTS:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_readme_is_short_and_its_blocks_are_generated():
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) < 8192
    assert readme.with_blocks(text) == text
    assert (FIGURES / "method.png").exists()


def test_a_block_without_a_place_is_one_sentence():
    with pytest.raises(CdeltaError, match="no place for a block: put <!-- results"):
        readme.with_blocks("# Title")


def test_results_are_computed_from_the_recorded_tables(tmp_path):
    for name in ("smollm2-quick", "smollm2"):
        (tmp_path / name).mkdir()
        shutil.copy(FIGURES / "tiny" / "tab_selectivity.csv", tmp_path / name)
        lines = readme.results(tmp_path).splitlines()
        assert lines[0].startswith(f"Preset `{name}`")
        assert lines[2].startswith("- **Target refused**") and "%" in lines[2]
    assert "not recorded" in readme.results(FIGURES / "absent")
