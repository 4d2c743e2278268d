"""The harness on a model in memory, offline, with a task file of our own."""

import json

import pytest
import torch
import yaml
from toys import toy

from cdelta.errors import CdeltaError
from cdelta.evaluation.lm_eval import harness
from cdelta.methods.steering import Addition

pytest.importorskip("lm_eval")
QUESTIONS = [
    {"question": f"tell me about {w}", "choices": ["cake", "song", "two"], "answer": i % 3}
    for i, w in enumerate(("red", "blue", "count", "story"))
]


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = {
        "task": "cdelta_toy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def by_hand(model, tok):
    """Accuracy from summed log-probabilities of each choice."""
    right = []
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            head, tail = tok(row["question"])["input_ids"], tok(choice)["input_ids"]
            logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            scores.append(
                sum(logp[len(head) - 1 + i, token].item() for i, token in enumerate(tail))
            )
        right.append(scores.index(max(scores)) == row["answer"])
    return sum(right) / len(right)


def test_the_model_in_memory_is_what_is_measured(tokenizer, task_folder):
    model = toy("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Addition({1: 3 * torch.ones(32)}).applied(model):
        table = harness(model, tokenizer, ["cdelta_toy"], include=task_folder)
        assert table.iloc[0][["task", "metric", "n"]].tolist() == ["cdelta_toy", "acc", 4]
        assert table["value"][0] == pytest.approx(by_hand(model, tokenizer))
    assert harness(model, tokenizer, ["cdelta_toy"], include=task_folder, limit=2)["n"][0] == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CdeltaError, match="no task nonsense"):
        harness(model, tokenizer, ["nonsense"], include=task_folder)
