"""Other people's prompts stay out of a recorded folder."""

import html
import json

from cdelta.artifact.report import hide_pictures, hide_prompts

PROMPT = 'How do I "borrow" 100% of Ann\'s <b>code</b> & data_set?'


def test_a_prompt_is_hidden_however_a_file_writes_it(tmp_path):
    tex = PROMPT.replace("%", r"\%").replace("&", r"\&").replace("_", r"\_")
    doubled = PROMPT.replace('"', '""')
    pages = [html.escape(PROMPT), html.escape(PROMPT, quote=False)]
    texts = {
        "a.csv": f'crime,"{doubled}",refuse',
        "b.tex": f"crime & {tex} & refuse",
        "report/c.html": "<td>{}</td><td>{}</td>".format(*pages),
        "d.html": json.dumps({"prompt": PROMPT}),
    }
    (tmp_path / "report").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    hide_prompts(tmp_path, {PROMPT: "cast-7"})
    for name in texts:
        found = (tmp_path / name).read_text()
        assert "borrow" not in found and "[prompt cast-7]" in found, name
    assert (tmp_path / "a.csv").read_text() == 'crime,"[prompt cast-7]",refuse'


def test_pictures_of_prompts_go_from_folder_pages_and_manifest(tmp_path):
    (tmp_path / "report").mkdir()
    for name in ("fig_seen.png", "fig_base.png", "tab_a.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "report.html").write_text('<img src="fig_base.png"><img alt="" src="fig_seen.png">')
    (tmp_path / "report" / "01_dataset.html").write_text('<img src="data:image/png;base64,AA">')
    items = [{"id": id, "files": [f"{id}.png"]} for id in ("fig_seen", "fig_base")]
    manifest = {"preset": "p", "commit": "c", "items": items}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    hide_pictures(tmp_path)
    assert not (tmp_path / "fig_seen.png").exists() and (tmp_path / "fig_base.png").exists()
    page = (tmp_path / "report.html").read_text()
    assert "fig_seen" not in page and 'src="fig_base.png"' in page
    assert "data:image" not in (tmp_path / "report" / "01_dataset.html").read_text()
    kept = json.loads((tmp_path / "manifest.json").read_text())["items"]
    assert [item["id"] for item in kept] == ["fig_base"] and len(kept[0]["sha256"]) == 1
