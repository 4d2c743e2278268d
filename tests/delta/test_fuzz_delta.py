"""Whatever lies in a delta's folder or an edited folder's record: a `CdeltaError` or a whole delta.

``CDELTA_FUZZ=100000 pytest tests/delta/test_fuzz_delta.py`` tries that many inputs of every kind.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import toys
from edits import random_delta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cdelta.delta.apply import model_card, read_record, revert, save_edited
from cdelta.delta.lora import export_lora
from cdelta.delta.verify import verify
from cdelta.delta.weight_delta import METADATA, WEIGHTS, WeightDelta, compose
from cdelta.errors import CdeltaError

pytestmark = pytest.mark.long

TRIALS = int(os.environ.get("CDELTA_FUZZ", 150))
fuzz = settings(
    max_examples=TRIALS,
    deadline=None,
    derandomize="CDELTA_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
MODEL = toys.toy("llama")
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "model.norm.weight", "", "\x00", "-1"]),
)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A base, a delta and the edited folder; copied for every example."""
    root = tmp_path_factory.mktemp("fuzz")
    toys.save_toy(root / "base")
    delta = random_delta(MODEL, budget=0.02).with_metadata(k=0.5)
    delta.save(root / "delta")
    save_edited(root / "base", delta, root / "edited")
    return root


def used(folder: Path) -> str:
    """Load a delta and do with it what commands do; the error's text, or "" if all went well."""
    try:
        delta = WeightDelta.load(folder)
        model_card(delta, delta.k, [], folder)
        compose([delta, delta])
        with tempfile.TemporaryDirectory() as scratch:
            export_lora(delta, Path(scratch) / "lora")
        with delta.applied(MODEL):
            pass
        delta.check_base(MODEL)
    except CdeltaError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 1000
        return str(error)
    return ""


def unsealed(header: dict) -> str:
    """A header without checksums, whose content then counts by itself."""
    plain = {key: value for key, value in header.items() if not key.endswith("sha256")}
    return json.dumps(plain | {"format": "cdelta.delta.1"})


@fuzz
@given(st.data())
def test_any_bytes_in_either_file(whole, data):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(whole / "delta", Path(scratch) / "delta"))
        path = folder / data.draw(st.sampled_from([WEIGHTS, METADATA]))
        content = path.read_bytes()
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(len(content), start + 50)))
        changed = content[:start] + data.draw(st.binary(max_size=20)) + content[stop:]
        cut = changed[: data.draw(st.integers(0, len(changed)))]
        path.write_bytes(data.draw(st.sampled_from([changed, cut])))
        assert used(folder) or path.read_bytes() == content


@fuzz
@given(documents)
def test_any_json_as_the_header(whole, document):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(whole / "delta", Path(scratch) / "delta"))
        (folder / METADATA).write_text(json.dumps(document))
        assert used(folder)


@fuzz
@given(st.data())
def test_any_value_at_any_place_of_the_header(whole, data):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(whole / "delta", Path(scratch) / "delta"))
        header = json.loads((folder / METADATA).read_text())
        part = header
        while True:
            key = data.draw(st.sampled_from(sorted(part)))
            if not (isinstance(part[key], dict) and part[key] and data.draw(st.booleans())):
                break
            part = part[key]
        part[key] = data.draw(documents)
        (folder / METADATA).write_text(unsealed(header))
        used(folder)


@fuzz
@given(st.data())
def test_any_tensors(whole, data):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(whole / "delta", Path(scratch) / "delta"))
        header = json.loads((folder / METADATA).read_text())
        tensors = load_file(folder / WEIGHTS)
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]))
        value = data.draw(st.sampled_from([0, 1, -1, 2**62, float("nan"), float("inf")]))
        if value != value or abs(value) == float("inf"):
            dtype = torch.float32
        tensors[name] = torch.full(shape, value).to(dtype)
        save_file(tensors, folder / WEIGHTS)
        (folder / METADATA).write_text(unsealed(header))
        used(folder)


@fuzz
@given(st.data())
def test_any_bytes_in_the_record_of_an_edit(whole, data):
    delta = WeightDelta.load(whole / "delta")
    with tempfile.TemporaryDirectory() as scratch:
        edited = Path(shutil.copytree(whole / "edited", Path(scratch) / "edited"))
        path = edited / "cdelta" / data.draw(st.sampled_from(["edit.json", "original.safetensors"]))
        content = path.read_bytes()
        start = data.draw(st.integers(0, len(content)))
        changed = content[:start] + data.draw(st.binary(max_size=20)) + content[start + 5 :]
        path.write_bytes(changed)
        for action in (
            lambda: read_record(edited),
            lambda: verify(whole / "base", edited, delta),
            lambda: revert(edited, delta, Path(scratch) / "back"),
        ):
            try:
                action()
            except CdeltaError as error:
                assert "\n" not in str(error).strip()
        if changed != content:
            assert not (Path(scratch) / "back").exists()
