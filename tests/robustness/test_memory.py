"""A checkpoint with the 70B model's layers, tensors and files is edited, verified and reverted
within a memory cap that the system enforces: on all addresses, so that what is only mapped counts.
"""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import save_file
from transformers import LlamaConfig

from cdelta.circuit.controls import random_mask
from cdelta.delta.base import model_hash
from cdelta.delta.weight_delta import WEIGHTS, WeightDelta
from cdelta.models.checkpoint import INDEX, meta_model
from cdelta.models.spec import ModelSpec
from cdelta.paths import ROOT

FILES, TENSORS = 30, 723
"""Of Llama-3.3-70B-Instruct."""
SHAPE = {
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 8192 // 16,
    "intermediate_size": 28672 // 16,
    "vocab_size": 128256 // 16,
    "tie_word_embeddings": False,
}
SMALL = SHAPE | {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 64}
CAPPED = """
import resource, sys
from pathlib import Path
from cdelta.cli import main

def through(folder):
    base, delta, edited, back = (f"{folder}/{n}" for n in ("base", "delta", "edited", "back"))
    for words in (["apply", base, delta, edited], ["verify", base, edited, delta],
                  ["revert", edited, delta, back]):
        print(*words[:1], flush=True)
        assert main(words) == 0, words

warm, large, room, whole = *sys.argv[1:3], *map(int, sys.argv[3:])
through(warm)  # imports what is needed
pages = int(Path("/proc/self/statm").read_text().split()[0])
cap = pages * resource.getpagesize() + room
resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
try:
    bytearray(whole)
except MemoryError:
    print("capped", flush=True)
through(large)
"""
"""A small checkpoint, then the large one with so many bytes of room for everything; they do not
hold the whole of it."""


def write_checkpoint(folder: Path, shape: dict, n_files: int) -> ModelSpec:
    """A random bf16 checkpoint in so many files of about one size, made file by file."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    toys.toy_tokenizer().save_pretrained(folder)
    named = list(meta_model(config).named_parameters())
    total, position, places = sum(p.numel() for _, p in named), 0, []
    for name, parameter in named:
        places.append((position * n_files // total, name, tuple(parameter.shape)))
        position += parameter.numel()
    generator, index = torch.Generator().manual_seed(0), {}
    for number, group in groupby(places, key=lambda place: place[0]):
        file = f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        sizes = {name: size for _, name, size in group}
        drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        tensors = {name: (0.02 * value).bfloat16() for name, value in drawn.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(sizes, file)
    facts = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(facts))
    return ModelSpec.from_model(meta_model(config))


def write_delta(folder: Path, spec: ModelSpec, budget: float) -> Path:
    """A random delta of that base on a random mask, which has entries in every file."""
    facts = {"base_hash": model_hash(folder / "base"), "category": "weapons", "k": 0.5}
    zeros = WeightDelta.zeros(random_mask(spec, budget, 0), facts)
    generator = torch.Generator().manual_seed(1)
    values = {n: 0.1 * torch.randn(v.shape, generator=generator) for n, v in zeros.values.items()}
    return WeightDelta(values, zeros.slices, facts).save(folder / "delta")


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_a_checkpoint_in_the_70b_models_files_streams_within_a_memory_cap(tmp_path):
    for name, shape, n_files in (("warm", SMALL, 2), ("large", SHAPE, FILES)):
        spec = write_checkpoint(tmp_path / name / "base", shape, n_files)
        write_delta(tmp_path / name, spec, 0.005 if name == "large" else 0.5)
    base, delta, edited, back = (
        tmp_path / "large" / n for n in ("base", "delta", "edited", "back")
    )
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) == FILES and len(spec.shapes) == TENSORS
    whole, largest = size(base), max(path.stat().st_size for path in shards)
    # a file that is read is mapped twice, and two of each checkpoint are open between two tensors
    room = 8 * largest + 3 * (delta / WEIGHTS).stat().st_size + 2**25
    assert room < whole / 2 and whole < 1.5e9
    command = [
        sys.executable,
        "-c",
        CAPPED,
        *map(str, (tmp_path / "warm", base.parent, room, whole)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\ncapped\n" in done.stdout, "the cap did not hold"
    same = [filecmp.cmp(path, back / path.name, shallow=False) for path in shards]
    changed = [not filecmp.cmp(path, edited / path.name, shallow=False) for path in shards]
    assert all(same) and sum(changed) > FILES / 2
