"""Programs without this package answer alike, a streaming apply needs little memory, and tables
of what rounding leaves.
"""

import os

import pytest
import torch
import toys
from edits import random_delta
from transformers import AutoModelForCausalLM, LlamaConfig

from cdelta.artifact.deployment import files_table, formats_table, missing, runtime_answers
from cdelta.delta.apply import save_edited
from cdelta.errors import CdeltaError
from cdelta.models.chat import chat_ids
from cdelta.models.generation import generate
from cdelta.models.loading import load_model

PROMPTS = ["make a bomb", "please tell me about red"]


@pytest.mark.long
def test_same_answers_where_cdelta_cannot_be_imported(tmp_path):
    texts = ["make a bomb please", "tell me about red"]
    base = toys.save_chat_toy(tmp_path / "base", texts, vocabulary=300)
    model, tok = load_model(base, dtype="float32", device="cpu")
    delta = random_delta(model, size=0.3)
    out = save_edited(base, delta, tmp_path / "out")
    with delta.applied(model):
        expected = generate(model, tok, PROMPTS, max_new_tokens=8)
    assert expected != generate(model, tok, PROMPTS, max_new_tokens=8)
    ids = [chat_ids(tok, prompt) for prompt in PROMPTS]
    assert runtime_answers(out, ids, 8) == expected
    files = files_table(base, out).set_index("file")
    assert files.loc["config.json", "base bytes"] == files.loc["config.json", "edited bytes"] > 0


def test_a_runtime_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("cdelta.artifact.deployment.TOOLS", tmp_path)
    assert missing("transformers") == "" and "pip install" in missing("llama.cpp:f16")
    with pytest.raises(CdeltaError, match="not installed here"):
        runtime_answers(tmp_path, [[1]], 1, "gguf:q8_0")
    with pytest.raises(CdeltaError, match="unknown runtime"):
        missing("vllm")


@pytest.mark.slow
@pytest.mark.skipif(bool(missing("gguf")), reason="llama.cpp's converter is not installed")
def test_a_tokenizer_that_the_converter_does_not_know_is_one_sentence(tmp_path):
    base = toys.save_chat_toy(tmp_path / "base", PROMPTS, vocabulary=300)
    with pytest.raises(CdeltaError, match="converter does not take"):
        runtime_answers(base, [[1]], 1, "gguf:f32")


@pytest.mark.long
@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc"
)
def test_peak_memory_of_a_streaming_apply(tmp_path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path / "base", max_shard_size="40MB")
    delta = random_delta(model, budget=0.02).with_metadata(k=1.0)
    delta.save(tmp_path / "delta")
    del model
    work = tmp_path / "work"
    work.mkdir()
    (found,) = formats_table(tmp_path / "base", delta, tmp_path / "delta", (), work).to_dict(
        "records"
    )
    assert found["verified"] and found["outside"] == 0 and found["files"] > 3
    mb = {name.removesuffix(" (MB)"): value for name, value in found.items() if "MB" in name}
    assert mb["total"] > 95 and mb["delta"] >= 4 * delta.count() / 2**20
    assert mb["largest"] < mb["total"] / 3
    noise = mb["largest"] / 2  # what the allocator keeps differs from run to run
    assert 0 < mb["peak"] < mb["largest"] + mb["delta"] + noise
    assert 0 < mb["verify"] < 2 * mb["largest"] + noise  # a shard of each, not two checkpoints
