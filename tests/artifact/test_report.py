"""The report: what it shows first, readable numbers, formulas, and how it looks in a browser."""

import re
import shutil
import subprocess

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from cdelta.artifact import report
from cdelta.artifact.numbers import rate_columns, readable
from cdelta.artifact.report import aggregate, notebook_body, write_report
from cdelta.artifact.run import open_run
from cdelta.errors import CdeltaError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STAGE = "05_evaluation"


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        ("43136", False, "43136"),
        ("43136.0", False, "43136"),
        (43136.7, False, "43137"),
        (0.0374, True, "3.74\u00a0%"),
        ("1.0", True, "100\u00a0%"),
        (12.0, True, "12"),
        (0.00012345, False, "0.000123"),
        (1.5e-9, False, "1.50e-09"),
        ("True", False, "yes"),
        (float("nan"), True, "–"),
        ("crime", True, "crime"),
        ("2024-01-01", False, "2024-01-01"),
        (None, False, ""),
    ],
)
def test_numbers_are_readable(value, percent, text):
    assert readable(value, percent) == text


def test_columns_of_rates_are_known_by_their_names():
    assert rate_columns(["category", "refusal", "low", "high", "n"]) == {"refusal", "low", "high"}
    assert rate_columns(["CPR", "low", "high"]) == set()


def notebook():
    markdown = r"An edge's score is $S(u \to v)$, and $$f(C) = \frac{m(C)}{m_0}$$ `costs $5 or $6`"
    wide = "<table><tr>" + "".join(f"<td>column{i}</td>" for i in range(60)) + "</tr></table>"
    long = "\n".join(f"line {i} " + "x" * 300 for i in range(40))
    outputs = [
        new_output("stream", text=long),
        new_output("display_data", data={"text/html": wide}),
    ]
    code = new_code_cell("print('a')", outputs=outputs, execution_count=1)
    injected = new_code_cell("preset = 'x'", metadata={"tags": ["injected-parameters"]})
    cells = [new_markdown_cell("# 05 · Evaluation"), new_markdown_cell(markdown), injected, code]
    return new_notebook(cells=cells)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with one stage: a wide figure, a long table, a page, and its notebook."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    run = open_run(STAGE, preset="tiny", run_dir=str(folder))
    figure, _ = plt.subplots(figsize=(14, 3))
    figure.suptitle("Refusal rises to 100 %")
    run.figure("fig_selectivity", figure, "A wide figure.")
    names = [f"method{i}" for i in range(40)]
    rows = pd.DataFrame({"method": names, "refusal": 0.5, "n": 43136, "a_b": ["x" * 60] * 40})
    run.table("tab_shift", rows.assign(**{f"c{i}": 0.1234 for i in range(12)}), "Long & <wide>.")
    run.table("tab_selectivity", rows.head(2).assign(category="crime"), "Short.")
    run.page("page_graph", "<!DOCTYPE html><title>x</title><p>page", "Click <here>.")
    run.finish()
    (folder / "notebooks").mkdir()
    nbformat.write(notebook(), folder / "notebooks" / f"{STAGE}.ipynb")
    write_report(folder)
    return folder


def test_the_headline_comes_first_and_the_rest_is_folded(run_dir):
    page = (run_dir / "figures" / "report.html").read_text()
    places = [page.index(text) for text in ("In short", 'id="claims"', 'id="fig_selectivity"')]
    assert places == sorted(places) and page.count('id="fig_selectivity"') == 1
    folded = page[page.index('<details class="part"') :]
    assert 'id="tab_shift"' in folded and "all 40 rows" in folded
    assert "Refusal rises to 100 %" in page and "43136" in page and "50\u00a0%" in page
    assert "Long &amp; &lt;wide&gt;." in page and '<iframe src="page_graph.html"' in page
    assert "not measured" in page, "a claim whose table is missing is named as such"


def test_the_pages_load_nothing_from_elsewhere(run_dir):
    pages = [*(run_dir / "figures").glob("*.html"), *(run_dir / "figures" / "report").glob("*")]
    assert len(pages) == 3
    for page in pages:
        text = page.read_text()
        assert not re.search(r"<script|<link|@import|url\(|src=[\"']?(https?:)?//", text), page


def test_a_notebook_page_has_mathml_folded_output_and_no_injected_cell(run_dir):
    page = (run_dir / "figures" / "report" / f"{STAGE}.html").read_text()
    assert page.count("<math") == 2 and "frac" not in page.replace("<mfrac", "").replace(
        "</mfrac", ""
    )
    assert "costs $5 or $6" in page and "40 lines of output" in page
    assert "preset = " not in page and '<div class="scroll"><table' in page


def test_measurements_of_no_run_are_shown_with_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    columns = ["fault", "stage", "trials", "outcome", "machine"]
    rows = pd.DataFrame([("kill -9", "apply", 5, "identical", "AMD, 2 cores")], columns=columns)
    rows.to_csv(tmp_path / "bench" / "faults.csv", index=False)
    pd.DataFrame({"a_b": [1]}).to_csv(tmp_path / "bench" / "other.csv", index=False)
    monkeypatch.setattr(report, "FIGURES", tmp_path)
    faults, other = report._benchmarks()
    assert faults["rows"] == [["kill -9", "apply", "5", "identical", "AMD, 2 cores"]]
    assert faults["numeric"] == [False, False, True, False, False]
    assert "campaign.py" in faults["caption"] and "run.py or other.py" in other["caption"]


def test_a_formula_that_cannot_be_read_stays_code():
    cells = [new_markdown_cell(r"see $\left( x$")]
    assert r"<code>\left( x</code>" in notebook_body(new_notebook(cells=cells))[0]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["report.html", f"report/{STAGE}.html"])
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_a_browser_shows_it_without_errors_or_sideways_scroll(run_dir, page, width, tmp_path):
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" style="border:0;width:{width}px;height:900px" '
        f'src="file://{run_dir}/figures/{page}"></iframe><script>onload = () => {{'
        "const inside = document.getElementById('f').contentDocument;"
        "const broken = [...inside.images].filter(i => !i.complete || !i.naturalWidth).length;"
        "document.body.textContent ="
        " `width ${inside.documentElement.scrollWidth} broken ${broken}`;}</script>"
    )
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options = ["--allow-file-access-from-files", "--virtual-time-budget=8000"]
    log = ["--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"]
    shown = subprocess.run(
        [*command, *options, *log, f"file://{frame}"], capture_output=True, text=True, timeout=120
    )
    found = re.search(r"width (\d+) broken (\d+)", shown.stdout)
    assert found, shown.stderr[-2000:]
    assert int(found[1]) <= width and found[2] == "0" and "CONSOLE" not in shown.stderr


def test_several_runs_become_one_table(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RUNS", tmp_path)
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    page = aggregate([run_dir, other])
    table = pd.read_csv(page.parent / "tab_models.csv")
    assert list(table["run"]) == ["tiny", "tiny", "other", "other"]
    assert (
        list(table)[:4] == ["run", "model", "category", "method"]
        and "50\u00a0%" in page.read_text()
    )
    assert "Not in the table" not in page.read_text()
    gap = aggregate([run_dir, tmp_path / "none"])
    assert "Not in the table, for want of stage 05: none." in gap.read_text()
    assert set(pd.read_csv(gap.parent / "tab_models.csv")["run"]) == {"tiny"}
    with pytest.raises(CdeltaError, match=r"no run has a tab_selectivity \(none\)"):
        aggregate([tmp_path / "none"])
