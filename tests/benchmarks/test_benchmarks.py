"""The measuring scripts' own logic, on toys and made-up measurements: no timing is asserted."""

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from toys import toy_tokenizer

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))  # the scripts use each other


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_gpu_script_goes_through_everything(tmp_path):
    gpu = script("gpu")
    gpu.main(["--tiny", "--out", str(tmp_path / "out.json")])
    facts = json.loads((tmp_path / "out.json").read_text())
    assert [part for part in gpu.PARTS if "failed" in facts[part]] == []
    for run in facts["attribution"]["runs"]:
        assert run["seconds"] > 0 and run["peak_over_weights"] >= 1
        # the share has no bound here: a CPU's bf16 products may be slower than its fp32 ones
        assert run["share_of_matmul_ceiling"] > 0 and math.isfinite(run["completeness_error"])
    assert facts["edit"]["entries"] > 0 and facts["edit"]["peak_over_weights"] > 1
    assert facts["answers"]["runs"][0]["answers_per_second"] > 0
    assert facts["apply"]["checkpoint_gb"] > facts["apply"]["largest_shard_gb"]


def test_a_failing_part_does_not_lose_the_others(tmp_path, monkeypatch):
    gpu = script("gpu")
    parts = {"edit": lambda *_: 1 / 0, "answers": lambda *_: {"runs": []}}
    monkeypatch.setattr(gpu, "PARTS", parts)
    gpu.main(["--tiny", "--only", "edit", "answers", "--out", str(tmp_path / "out.json")])
    facts = json.loads((tmp_path / "out.json").read_text())
    assert "ZeroDivisionError" in facts["edit"]["failed"] and facts["answers"]["runs"] == []


def test_the_gpu_script_counts_the_arithmetic_of_a_forward_pass():
    """2 FLOP per weight and token, forward; a step is a forward and a backward pass."""
    gpu = script("gpu")
    spec = gpu.ModelSpec.from_model(gpu.random_model(gpu.TOY, "cpu"))
    vocabulary = gpu.TOY["vocab_size"]
    weights = spec.n_params - 2 * vocabulary * spec.d_model
    products = gpu.passes(spec, 1) - 4
    expected = 20 * weights * (2 + 5 * 2 + products)
    assert gpu.flop(spec, vocabulary, 10) == pytest.approx(expected)


def test_training_rows_are_as_long_as_asked():
    gpu = script("gpu")
    tok, rows = toy_tokenizer(), gpu.training_rows(gpu.TINY)
    prompt, reply = rows.positive[0]
    text = tok.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tok(text, add_special_tokens=False)["input_ids"]
    n = len(ids) + len(tok(reply, add_special_tokens=False)["input_ids"])
    assert abs(n - gpu.TINY.row_tokens) <= 2


def test_no_gpu_is_one_line():
    gpu = script("gpu")
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        gpu.main([])


@pytest.fixture
def attribution(monkeypatch):
    """The comparison, with made-up workers on a machine that gets slower with every process."""
    module, calls = script("attribution"), []

    def work(python, job, extra):
        calls.append((job, python, extra))
        seconds = {"reference": 100.0, "bridge": 20.0}.get(job[0], 5.0) * (1 + 0.1 * len(calls))
        return {
            "seconds": seconds,
            "cpu_seconds": seconds,
            "added_mb": 400.0 if job[0] in ("reference", "bridge") else 10.0 * job[2],
        }

    monkeypatch.setattr(module, "work", work)
    module.calls = calls
    return module


def test_ratios_are_formed_within_rounds_that_alternate(attribution):
    rows = attribution.table(2, ("python-of-the-reference", "src"), "tokenizer")
    order = [job for job, *_ in attribution.calls]
    assert (
        order[6:] == order[:6][::-1]
        and (("reference", 8, 8), "python-of-the-reference", "src") in attribution.calls
    )
    found = {(row["tool"], row["micro_batch"]): row for row in rows}
    row, theirs = found["ours-ig", 4], found["reference", 8]
    assert row["times_faster_low"] < row["times_faster"] < row["times_faster_high"] and row[
        "times_faster"
    ] == pytest.approx(20, rel=0.1)
    assert (
        (row["rounds"], row["threads"], row["memory_share"]) == (2, 1, 0.1)
        and row["machine"]
        and "times_faster" not in theirs
    )
    assert all(set(row) <= set(attribution.COLUMNS) for row in rows)


def test_without_the_reference_its_row_says_why_and_ours_are_measured(attribution):
    rows = attribution.table(1, ("", ""), "tokenizer")
    assert (
        rows[0]["tool"] == "reference"
        and rows[0]["note"].startswith("skipped: give --reference-python")
        and "seconds" not in rows[0]
    )
    assert all("seconds" in row for row in rows[1:])
    compared = [(row["tool"], "times_faster" in row) for row in rows[1:]]
    assert compared == [("ours-ig", False)] * 3 + [("bridge", False), ("ours-eap", True)]


def test_the_quick_run_writes_every_curve(tmp_path):
    scaling = script("scaling")
    scaling.main(["--quick", "--out", str(tmp_path / "scaling.csv")])
    rows = list(csv.DictReader((tmp_path / "scaling.csv").open()))
    curves = {row["curve"] for row in rows}
    assert {curve.split(",")[0] for curve in curves} == {"attribution", "step", "apply"}
    assert all(row["machine"] and row["torch"] and row["rounds"] == "1" for row in rows)
    assert all(float(row["seconds"]) >= 0 for row in rows)


def test_scaling_rounds_alternate_and_give_medians_and_extremes():
    scaling, calls = script("scaling"), []

    def measure(name):
        calls.append(name)
        return {"seconds": float(len(calls)), "added_mb": 1.0, "floor_seconds": 0.5}

    todo = [scaling.Point("c", x, lambda x=x: measure(x)) for x in (1, 2)]
    rows = scaling.table(todo, 3)
    assert calls == [1, 2, 2, 1, 1, 2]
    assert (rows[0]["seconds_low"], rows[0]["seconds"], rows[0]["seconds_high"]) == (1, 4, 5)


def test_the_runner_names_every_script_and_where_it_writes(tmp_path, monkeypatch):
    run, started = script("run"), []
    monkeypatch.setattr(run.subprocess, "run", lambda command, check: started.append(command))
    monkeypatch.setattr(run, "SMOLLM2", tmp_path)
    run.main(["--all", "--quick", "--folder", str(tmp_path)])
    assert [Path(command[1]).stem for command in started] == list(run.NAMES)
    assert all(command[3].startswith(str(tmp_path)) for command in started)


def test_the_scaling_figure_has_a_panel_per_curve_and_measure(tmp_path):
    scaling, draw = script("scaling"), script("draw")
    todo = [
        scaling.Point(
            curve, x, lambda x=x: {"seconds": x, "added_mb": 2 * x, "floor_seconds": x / 2}
        )
        for curve in ("attribution, pairs", "step, mask")
        for x in (1.0, 2.0)
    ]
    scaling.common.write_csv(tmp_path / "scaling.csv", scaling.table(todo, 2))
    draw.main(["--table", str(tmp_path / "scaling.csv")])
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    figure = draw.draw(draw.pd.read_csv(tmp_path / "scaling.csv"))
    seconds = figure.axes[0].get_lines()
    assert len(figure.axes) == 4 and list(seconds[0].get_ydata()) == [1, 2]
    assert any(list(each.get_ydata()) == [0.5, 1.0] for each in seconds)


def test_the_recorded_estimates_of_scale_are_todays_and_of_the_models_sizes(tmp_path):
    scale = script("scale_estimates")
    scale.main(["--out", str(tmp_path / "out.csv")])
    recorded = scale.common.BENCH / "scale_estimates.csv"
    assert (tmp_path / "out.csv").read_text() == recorded.read_text(), "run scale_estimates.py"
    rows = list(csv.DictReader(recorded.open()))
    published = [134_515_008, 1_235_814_400, 8_030_261_248, 70_553_706_496]
    assert [int(row["parameters"]) for row in rows] == published
    for name in ("weights_gb", "attribution_gb", "training_gb", "hours_at_200_tflops"):
        values = [float(row[name]) for row in rows]
        assert values[0] > 0 and values == sorted(values)


@pytest.mark.slow
def test_the_estimates_hold_for_the_model_that_can_be_run_here():
    """SmolLM2-135M's shape in fp32: memory within half, and time, which other work on the machine
    stretches, within a factor of three.
    """
    scale = script("scale_estimates")
    torch, name, steps = scale.torch, "SmolLM2-135M", 5
    model = scale.gpu.random_model(scale.SHAPES[name], "cpu", torch.float32)
    spec = scale.ModelSpec.from_model(model)
    pairs = scale.gpu.random_pairs(8, scale.PROMPT_TOKENS, model.config.vocab_size - 1)
    options = {"steps": steps, "micro_batch": 4}
    scale.gpu.attribute(model, pairs[:1], scale.gpu.metric, steps=1)
    _, found = scale.gpu.measured(
        lambda: scale.gpu.attribute(model, pairs, scale.gpu.metric, **options)
    )
    predicted = scale.attribution_memory(model, spec, 4, steps)
    assert 1 / 1.5 < found.memory / predicted < 1.5, (found, predicted)
    tokens = 8 * scale.PROMPT_TOKENS * scale.gpu.passes(spec, steps)
    seconds = 2 * spec.n_params * tokens / scale.scaling.ceiling()
    assert 1 / 3 < found.seconds / seconds < 3, (found, seconds)
