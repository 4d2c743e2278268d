"""Greedy answers of a checkpoint folder in a process that cannot import `cdelta`: what a user of the edited checkpoint gets.

``python cdelta/artifact/external/runtimes.py FOLDER MAX_NEW_TOKENS RUNTIME < prompts.json > answers.json``, RUNTIME being ``transformers``, ``ctranslate2`` or
``llama.cpp``, the latter two with a precision if wanted (``ctranslate2:int8``, ``llama.cpp:Q4_0``). They are optional (pip install ctranslate2
gguf xllamacpp): where one is missing or does not know the architecture, one string that says so is printed instead of the answers. GGUF is
written here for Llama checkpoints with a byte-level BPE tokenizer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer  # noqa: E402

sys.modules["cdelta"] = None  # a later import of it fails


def transformers_answers(folder, prompts, limit, precision):
    """Token ids through plain `transformers`, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    how = {
        "max_new_tokens": limit,
        "do_sample": False,
        "pad_token_id": model.generation_config.pad_token_id or 0,
    }
    return [
        model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **how)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]


def ctranslate2_answers(folder, prompts, limit, precision):
    """Token ids through CTranslate2 and its own converter; precision: its compute type."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    tok = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as converted:
        TransformersConverter(folder).convert(converted, force=True)
        generator = ctranslate2.Generator(
            converted, device="cpu", intra_threads=1, compute_type=precision or "float32"
        )
        rows = [tok.convert_ids_to_tokens(ids) for ids in prompts]
        found = generator.generate_batch(
            rows,
            max_batch_size=64,
            max_length=limit,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
    return [result.sequences_ids[0] for result in found]


def llama_cpp_answers(folder, prompts, limit, precision):
    """Texts through llama.cpp (xllamacpp's build of it) from a GGUF file; precision: a GGML type for the matrices of the blocks."""
    import xllamacpp

    with tempfile.TemporaryDirectory() as scratch:
        write_gguf(Path(folder), f"{scratch}/model.gguf", precision or "F32")
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = (
            f"{scratch}/model.gguf",
            512,
            1,
            False,
        )
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(settings)
        ask = {"n_predict": limit, "temperature": 0, "top_k": 1, "cache_prompt": False}
        return [
            server.handle_completions({"prompt": ids, **ask})["choices"][0]["text"]
            for ids in prompts
        ]


def write_gguf(folder, path, precision):
    """A Llama checkpoint as GGUF: sizes, tokenizer, template, and its tensors under GGUF's names."""
    import gguf

    config, kind = (
        json.loads((folder / "config.json").read_text()),
        gguf.GGMLQuantizationType[precision],
    )
    if config["model_type"] != "llama":
        raise ValueError(f"GGUF is written here for Llama checkpoints, not {config['model_type']}")
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {
        "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size", "head_count": "num_attention_heads", "head_count_kv": "num_key_value_heads",
        "layer_norm_rms_eps": "rms_norm_eps", "rope_dimension_count": "head_dim", "key_length": "head_dim", "value_length": "head_dim",
        "vocab_size": "vocab_size", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
    }  # fmt: skip
    for name, key in sizes.items():
        getattr(writer, f"add_{name}")(config[key])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    _add_tokenizer(
        writer, json.loads((folder / "tokenizer.json").read_text()), config["vocab_size"]
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, array in _gguf_tensors(folder, config):
        stored = kind if array.ndim == 2 and ".layers." in name else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)),
            gguf.quants.quantize(array, stored),
            raw_dtype=stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer, tokenizer, size):
    import gguf

    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    words = {i: word for word, i in tokenizer["model"]["vocab"].items()} | special
    kinds = [
        gguf.TokenType.CONTROL
        if i in special
        else gguf.TokenType.NORMAL
        if i in words
        else gguf.TokenType.UNUSED
        for i in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.get(i, f"<unused {i}>") for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])


def _gguf_tensors(folder, config):
    """(name, fp32 array) of every tensor; q and k rows in the order of llama.cpp, whose rotations pair neighbours instead of halves."""
    import numpy as np
    from safetensors.torch import load_file

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in (
        pair for file in sorted(folder.glob("*.safetensors")) for pair in load_file(file).items()
    ):
        array = tensor.float().numpy()
        for module, n in heads.items():
            if f".{module}." in name:
                array = array.reshape(n, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        yield name, np.ascontiguousarray(array)


RUNTIMES = {
    "transformers": transformers_answers,
    "ctranslate2": ctranslate2_answers,
    "llama.cpp": llama_cpp_answers,
}


def main(folder, limit, runtime="transformers"):
    """Answers to the prompts on stdin, or why there are none."""
    name, _, precision = runtime.partition(":")
    tok = AutoTokenizer.from_pretrained(folder)
    chat = [[{"role": "user", "content": prompt}] for prompt in json.load(sys.stdin)]
    prompts = [
        tok.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        for turns in chat
    ]
    try:
        found = RUNTIMES[name](folder, prompts, int(limit), precision)
    except Exception as error:
        if name == "transformers":
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return [
        (
            answer if isinstance(answer, str) else tok.decode(answer, skip_special_tokens=True)
        ).strip()
        for answer in found
    ]


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:]), sys.stdout)
