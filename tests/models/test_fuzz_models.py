"""Any config.json, tokenizer_config.json and chat template works or is one sentence."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import toys
from fuzz import Outcomes, examples, json_values
from hypothesis import given
from hypothesis import strategies as st

from cdelta.models.chat import chat_ids, example_ids
from cdelta.models.checkpoint import Checkpoint, meta_model, read_config
from cdelta.models.loading import load_tokenizer
from cdelta.models.spec import ModelSpec
from cdelta.models.templates import bind_template, template_facts

pytestmark = pytest.mark.long

FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "num_key_value_heads", "intermediate_size", "head_dim", "rope_parameters", "hidden_act",
    "tie_word_embeddings", "quantization_config", "eos_token_id", "torch_dtype", "dtype",
    "architectures", "text_config", "num_experts", "attention_bias", "max_position_embeddings",
    "rms_norm_eps", "rope_scaling", "auto_map", "layer_types",
)  # fmt: skip
LIKELY = st.sampled_from(
    ["llama", "mixtral", "gemma3", "gpt2", "silu", "bfloat16", 0, -1, 1, 2, 3, 4, 32, 48, None, {}]
)  # fmt: skip
PIECES = (
    "{{ bos_token }}", "{% for m in messages %}", "{% endfor %}", "{{ m['role'] }}", " ",
    "{{ m['content'] }}", "{{ m.content | trim }}", "{% if add_generation_prompt %}", "{% endif %}",
    "<|assistant|>", "<eos>", "<think>", "</think>", "\n", "{{ messages[0]['content'] }}",
    "{{ messages[1]['content'] }}", "{{ raise_exception('no') }}", "{{ strftime_now('%d %b') }}",
    "{{ strftime_now(x) }}", "{% set ns = namespace(x=1) %}", "{{ 1 // 0 }}", "{{ messages }}",
    "{% if m['role'] == 'system' %}", "{% else %}", "{{ x.y.z }}", "{{ messages | tojson }}",
    "{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}", "{{", "%}", "{{ range(5) | list }}",
    "{{ enable_thinking }}", "{{ ''.__class__ }}", "{% break %}", "{{ self }}", "é☕",
)  # fmt: skip
WORKING = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <eos> {% endfor %}",
    toys.TEMPLATE,
    toys.STYLES["llama"].template,
    toys.STYLES["qwen3"].template,
    toys.STYLES["gemma2"].template,
)
templates = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.tuples(
        st.sampled_from(WORKING), st.integers(0, 900), st.sampled_from(PIECES), st.integers(0, 9)
    ).map(lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + drawn[3] :]),
)


def checkpoint_folder() -> Path:
    return toys.save_toy(Path(tempfile.mkdtemp(prefix="cdelta-fuzz-")))


def test_fault_15_any_config_json_works_or_is_one_sentence(capsys):
    folder, outcomes = checkpoint_folder(), Outcomes()
    good = json.loads((folder / "config.json").read_text())

    def opened() -> None:
        ModelSpec.from_model(meta_model(read_config(folder)))
        Checkpoint(folder).check()

    @examples(250)
    @given(st.dictionaries(st.sampled_from(FIELDS), LIKELY | json_values, max_size=3))
    def attempt(changes):
        (folder / "config.json").write_text(json.dumps(good | changes))
        outcomes.attempt(opened)

    @examples(100)
    @given(st.integers(0, 900), st.binary(max_size=6))
    def damage(at, bytes_):
        text = json.dumps(good).encode()
        (folder / "config.json").write_bytes(text[:at] + bytes_ + text[at + 2 :])
        outcomes.attempt(opened)

    attempt()
    damage()
    shutil.rmtree(folder)
    outcomes.show("config.json", capsys)


def test_any_tokenizer_config_json_works_or_is_one_sentence(capsys):
    folder, outcomes = checkpoint_folder(), Outcomes()
    good = json.loads((folder / "tokenizer_config.json").read_text())
    names = (*good, "chat_template", "added_tokens_decoder", "model_max_length", "auto_map")

    @examples(150)
    @given(
        st.dictionaries(
            st.sampled_from(names),
            st.sampled_from(["<eos>", "<unk>", "", None]) | json_values,
            max_size=3,
        )
    )
    def attempt(changes):
        (folder / "tokenizer_config.json").write_text(json.dumps(good | changes))
        outcomes.attempt(lambda: chat_ids(load_tokenizer(folder), "red"))

    attempt()
    shutil.rmtree(folder)
    outcomes.show("tokenizer_config.json", capsys)


def test_fault_16_any_chat_template_works_or_is_one_sentence(capsys):
    tok, outcomes = toys.toy_tokenizer(), Outcomes()

    @examples(500)
    @given(templates, st.sampled_from(["", "please"]), st.booleans())
    def attempt(template, system, finished):
        tok.chat_template = template

        def written() -> None:
            template_facts(bind_template(tok, system))
            start, labels = example_ids(tok, "red", "song", [1], finished)
            assert start == chat_ids(tok, "red")
            assert finished == (labels[-1] == 1) and 1 not in labels[:-1]

        outcomes.attempt(written)

    attempt()
    outcomes.show("chat templates", capsys)
