"""What comes from outside is data, never a program."""

import ast

import pytest

from cdelta.paths import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "cdelta").rglob("*.py")), ids=lambda p: p.stem)
def test_nothing_from_outside_is_executed(path):
    """No pickle, no evaluated text, no code from a checkpoint."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(each.name for each in node.names)]
            assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "joblib"}
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("eval", "exec", "torch.load", "yaml.load")
            assert not [
                word
                for word in node.keywords
                if word.arg == "trust_remote_code" and ast.unparse(word.value) != "False"
            ]
