"""Greedy answers of a checkpoint folder in a process that cannot import `cdelta`.

``python -P cdelta/artifact/runtimes.py FOLDER MAX_NEW_TOKENS RUNTIME TOOLS < prompts.json`` prints
a JSON list of answers: what a user of the edited checkpoint gets. (-P: modules beside this file
are no part of it.) `prompts.json` is a list of lists of token ids. RUNTIME is one of

- ``transformers``: the folder through plain `transformers`, in fp32;
- ``gguf:TYPE``: through `transformers` from the GGUF file that llama.cpp's own converter writes;
- ``llama.cpp:TYPE``: the same file through llama.cpp,

TYPE being one that the converter knows (``f32``, ``f16``, ``bf16``, ``q8_0``). The last two need
the packages of `deployment.TOOLS_COMMAND` in the folder TOOLS. Exit code 2 and one line on stderr
where the converter does not know the model or its tokenizer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules["cdelta"] = None  # a later import of it fails

Prompts = list[list[int]]


def transformers_answers(
    folder: str, prompts: Prompts, limit: int, weights: str, **options: str
) -> list[str]:
    """Through plain `transformers`, in fp32, with the weights of another folder."""
    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, **options)
    answers = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=tok.pad_token_id or 0,
        )
        answers.append(tok.decode(out[0, len(ids) :], skip_special_tokens=True))
    return answers


def llama_cpp_answers(file: Path, prompts: Prompts, limit: int) -> list[str]:
    """Through llama.cpp, as the package `xllamacpp` builds it, on one thread."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.warmup = 2048, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    greedy = {"n_predict": limit, "temperature": 0, "top_k": 1, "cache_prompt": False}
    replies = [server.handle_completions({"prompt": ids, **greedy}) for ids in prompts]
    return [reply["choices"][0]["text"] for reply in replies]


def write_gguf(folder: str, file: Path, kind: str, tools: str) -> None:
    """Convert the checkpoint with llama.cpp's `convert_hf_to_gguf.py`; exits where it cannot."""
    script = Path(tools) / "convert_hf_to_gguf.py"
    done = subprocess.run(
        [sys.executable, script, folder, "--outfile", file, "--outtype", kind],
        env={**os.environ, "PYTHONPATH": tools},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        print(f"llama.cpp's converter does not take {folder}: {last}", file=sys.stderr)
        sys.exit(2)


def main(folder: str, limit: str, runtime: str, tools: str) -> list[str]:
    """Answers to the prompts on stdin."""
    prompts, n = json.load(sys.stdin), int(limit)
    name, _, kind = runtime.partition(":")
    if name == "transformers":
        return transformers_answers(folder, prompts, n, folder)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.gguf"
        write_gguf(folder, file, kind, tools)
        if name == "gguf":
            return transformers_answers(folder, prompts, n, scratch, gguf_file=file.name)
        sys.path.append(tools)  # after everything else: TOOLS has a `gguf` of its own
        return llama_cpp_answers(file, prompts, n)


if __name__ == "__main__":
    json.dump([answer.strip() for answer in main(*sys.argv[1:])], sys.stdout)
