"""Small random instances of every supported family, and small tokenizers, all built offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cdelta.policy.pairs import PromptPairs

VOCAB = 96
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
)
GQA = SIZES | dict(num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
TOKENS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=8, tie_word_embeddings=True)
GPT2 = dict(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=3,
    n_head=4,
    n_inner=48,
    n_positions=64,
    bos_token_id=0,
    eos_token_id=1,
)
CONFIGS = {
    "llama": (hf.LlamaConfig, GQA | TOKENS),
    "qwen2": (hf.Qwen2Config, GQA | TOKENS),
    "qwen3": (hf.Qwen3Config, GQA | TOKENS | dict(head_dim=16)),
    "mistral": (hf.MistralConfig, GQA | TOKENS | dict(sliding_window=8)),
    "gemma2": (hf.Gemma2Config, GQA | TOKENS | GEMMA),
    "gemma3": (hf.Gemma3TextConfig, GQA | TOKENS | GEMMA),
    "phi3": (hf.Phi3Config, GQA | TOKENS),
    "gpt2": (hf.GPT2Config, GPT2),
}
FAMILIES = tuple(CONFIGS)
LAYOUTS = ("llama", "qwen2", "gemma2", "phi3", "gpt2")
"""One family for each way of storing parameters: plain, biases, post-norms, fused, Conv1D."""
SENTENCE = (
    "how do i make a bomb cake knife poem song story please tell me about "
    "sort count red blue green one two"
)
WORDS = SENTENCE.split()
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def toy(
    family: str, seed: int = 0, attn: str = "eager", dtype: torch.dtype = torch.float32, **overrides
):
    """A frozen random model. Weights are large enough, and norms and biases uneven enough, to
    matter."""
    kind, values = CONFIGS[family]
    config = kind(**values)
    config.update(overrides)
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attn).to(dtype)
    for parameter in model.parameters():
        uneven = parameter.dim() == 1
        noise = torch.randn(parameter.shape, dtype=torch.float32) * (0.2 if uneven else 0.15)
        parameter.data = (parameter.data + noise).to(dtype) if uneven else noise.to(dtype)
    return model.eval().requires_grad_(False)


def toy_tokenizer() -> hf.PreTrainedTokenizerFast:
    """A word-level tokenizer with BOS, EOS and a chat template, at most `VOCAB` tokens."""
    special = ["<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        [WORDS], trainers.WordLevelTrainer(vocab_size=VOCAB, special_tokens=special)
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        padding_side="left",
    )


def save_toy(folder: str | Path, family: str = "llama", **kw) -> Path:
    """Write a checkpoint folder that `load_model` loads; returns it."""
    toy(family, **kw).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return Path(folder)


def save_chat_toy(
    folder: str | Path, texts: list[str], family: str = "llama", vocabulary: int = 1024
) -> Path:
    """A random checkpoint whose byte-level BPE tokenizer was trained on `texts`, with a context
    long enough for real prompts; returns its folder.
    """
    special = ["<bos>", "<eos>", "<|user|>", "<|assistant|>"]
    bpe = byte_level_bpe(texts, vocabulary, special)
    toy(family, vocab_size=vocabulary, max_position_embeddings=512).save_pretrained(folder)
    tok = hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=TEMPLATE,
    )
    tok.save_pretrained(folder)
    return Path(folder)


def byte_level_bpe(texts: list[str], vocabulary: int, special: list[str]) -> Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's: a word carries the space before it, and every byte has a
    token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, _trainer(vocabulary, special, alphabet))
    return bpe


def sentencepiece_bpe(
    texts: list[str], vocabulary: int, special: list[str], prefix: bool
) -> Tokenizer:
    """As Gemma's and, with a `prefix` space before every text, Mistral's and Phi-3's."""
    bpe = Tokenizer(models.BPE(unk_token=special[0]))
    scheme = "first" if prefix else "never"
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    words = [word for text in texts for word in text.replace(" ", " \0").split("\0")]
    bpe.train_from_iterator(words, _trainer(vocabulary, special, alphabet))
    return bpe


def _trainer(vocabulary: int, special: list[str], alphabet: list[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )


# ---------------------------------------------------------------------- families as they behave


@dataclass(frozen=True)
class ChatStyle:
    """How the chat models of one family write a conversation."""

    template: str | None
    bos: str
    end: str
    """Ends a turn; an answer may end with it or with `eos`."""
    eos: str
    special: tuple[str, ...] = ()
    sentencepiece: bool = False
    prefix: bool = False
    """Every text begins with a space."""
    adds_bos: bool = False
    """The tokenizer puts a BOS before plain text."""


_LLAMA_TEMPLATE = """{{ bos_token }}
{%- set date = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- set ns = namespace(system="") %}
{%- if messages[0]["role"] == "system" %}
{%- set ns.system = messages[0]["content"] | trim %}{% endif %}
{{- "<|start|>system<|header|>\n\nToday Date: " + date + "\n\n" + ns.system + "<|eot|>" }}
{%- for m in messages if m["role"] != "system" %}
{{- "<|start|>" + m["role"] + "<|header|>\n\n" + m["content"] | trim + "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant<|header|>\n\n" }}{% endif %}"""
_CHATML = """{%- if messages[0]["role"] != "system" and default_system %}
{{- "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" }}{% endif %}
{%- for m in messages %}
{{- "<|im_start|>" + m["role"] + "\n" }}
{%- if thinks and m["role"] == "assistant" and loop.last %}
{{- "<think>\n\n</think>\n\n" }}{% endif %}
{{- m["content"] + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}
{%- if thinks and enable_thinking is defined and enable_thinking is false %}
{{- "<think>\n\n</think>\n\n" }}{% endif %}
{%- endif %}"""
_MISTRAL = """{{ bos_token }}
{%- set ns = namespace(system="") %}
{%- for m in messages %}
{%- if m["role"] == "system" %}{% set ns.system = m["content"] + "\n\n" %}
{%- elif m["role"] == "user" %}
{{- "[INST] " + (ns.system if loop.last else "") + m["content"] + "[/INST]" }}
{%- else %}{{ " " + m["content"] | trim + eos_token }}{% endif %}
{%- endfor %}"""
_GEMMA = """{{ bos_token }}
{%- if messages[0]["role"] == "system" %}SYSTEM{% endif %}
{%- for m in messages %}
{%- if (m["role"] == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("Conversation roles must alternate user/assistant/...") }}{% endif %}
{{- "<start_of_turn>" + ("model" if m["role"] == "assistant" else m["role"]) + "\n" }}
{{- m["content"] | trim + "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\n" }}{% endif %}"""
_PHI = """{%- for m in messages %}
{{- "<|" + m["role"] + "|>\n" + m["content"] + "<|end|>\n" }}
{%- endfor %}
{{- "<|assistant|>\n" if add_generation_prompt else eos_token }}"""


def _chatml(default_system: bool, thinks: bool) -> str:
    words = {"default_system": default_system, "thinks": thinks}
    return "".join(f"{{%- set {k} = {str(v).lower()} %}}" for k, v in words.items()) + _CHATML


_IM = ("<|im_start|>", "<|im_end|>")
_TURN = ("<start_of_turn>", "<end_of_turn>")
_REJECTS = '{{ raise_exception("System role not supported") }}'
_GEMMA3 = _GEMMA.replace(
    '{%- if messages[0]["role"] == "system" %}SYSTEM{% endif %}',
    '{%- set system = messages[0]["content"] if messages[0]["role"] == "system" else "" %}'
    '{%- set messages = messages[1:] if messages[0]["role"] == "system" else messages %}',
).replace(
    'm["content"] | trim',
    '(system + "\\n\\n" if loop.first and system else "") + m["content"] | trim',
)
STYLES: dict[str, ChatStyle] = {
    "llama": ChatStyle(
        _LLAMA_TEMPLATE,
        "<|begin|>",
        "<|eot|>",
        "<|eot|>",
        ("<|start|>", "<|header|>"),
        adds_bos=True,
    ),
    "qwen2": ChatStyle(_chatml(True, False), "", "<|im_end|>", "<|im_end|>", _IM),
    "qwen3": ChatStyle(_chatml(False, True), "", "<|im_end|>", "<|im_end|>", _IM),
    "mistral": ChatStyle(
        _MISTRAL, "<s>", "</s>", "</s>", ("[INST]", "[/INST]"), True, prefix=True, adds_bos=True
    ),
    "gemma2": ChatStyle(
        _GEMMA.replace("SYSTEM", _REJECTS),
        "<bos>",
        "<end_of_turn>",
        "<eos>",
        _TURN,
        True,
        adds_bos=True,
    ),
    "gemma3": ChatStyle(_GEMMA3, "<bos>", "<end_of_turn>", "<eos>", _TURN, True, adds_bos=True),
    "phi3": ChatStyle(
        _PHI,
        "",
        "<|end|>",
        "<|endoftext|>",
        ("<|user|>", "<|assistant|>", "<|system|>"),
        True,
        prefix=True,
    ),
    "gpt2": ChatStyle(None, "", "<|endoftext|>", "<|endoftext|>"),
}
"""llama: date, system turn. qwen2: a system prompt of its own. qwen3: thinks. mistral: system and
user share a turn, a space before the answer. gemma2: rejects the system role. gemma3: system and
user share a turn. phi3: two end tokens. gpt2: no template."""


def family_tokenizer(
    family: str, texts: list[str], vocabulary: int = 600
) -> hf.PreTrainedTokenizerFast:
    """A tokenizer trained on `texts` that behaves as those of the family's chat models."""
    style = STYLES[family]
    named = dict.fromkeys(["<unk>", style.bos, style.eos, style.end, *style.special])
    special = [token for token in named if token]
    if style.sentencepiece:
        bpe = sentencepiece_bpe(texts, vocabulary, special, style.prefix)
    else:
        bpe = byte_level_bpe(texts, vocabulary, special)
    if style.adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{style.bos} $A", special_tokens=[(style.bos, special.index(style.bos))]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=style.bos or None,
        eos_token=style.eos,
        unk_token="<unk>",
        chat_template=style.template,
    )


def family_folder(
    family: str, folder: str | Path, texts: list[str] | None = None, vocabulary: int = 600, **kw
) -> Path:
    """A random checkpoint of a family with a tokenizer and a template that behave as its chat
    models' do (`STYLES`); returns its folder.

    `texts` trains the tokenizer (default: prompts of the embedded policy set); `kw` as for `toy`.
    """
    tok = family_tokenizer(family, texts or policy_texts(), vocabulary)
    style, sizes = STYLES[family], dict(vocab_size=len(tok), max_position_embeddings=512)
    model = toy(family, **sizes | kw)
    ends = tok.convert_tokens_to_ids(list(dict.fromkeys([style.eos, style.end])))
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = tok.bos_token_id, ends, None
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return Path(folder)


def policy_texts(every: int = 9) -> list[str]:
    """Prompts and answers of the embedded policy set, to train a tokenizer on."""
    from cdelta.policy.synthetic import records

    return [row[name] for row in records()[::every] for name in ("prompt", "reference")]


def toy_pairs(
    n: int = 3, length: int = 7, seed: int = 0, uneven: bool = False, split: str = ""
) -> PromptPairs:
    """Random pairs that differ at their last three tokens but one; `uneven` varies the lengths
    between pairs.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> list[int]:
        return torch.randint(2, VOCAB, (size,), generator=generator).tolist()

    clean = [draw(length + (i % 3 if uneven else 0)) for i in range(n)]
    corrupted = [row[:-4] + draw(3) + row[-1:] for row in clean]
    return PromptPairs.from_tokens(clean, corrupted, split)
