"""Small random instances of every supported family, and a small tokenizer, all built offline."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GQA, **TOKENS),
    "qwen2": lambda: hf.Qwen2Config(**GQA, **TOKENS),
    "qwen3": lambda: hf.Qwen3Config(**GQA, **TOKENS, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**GQA, **TOKENS, sliding_window=8),
    "gemma2": lambda: hf.Gemma2Config(**GQA | TOKENS | GEMMA),
    "gemma3": lambda: hf.Gemma3TextConfig(**GQA | TOKENS | GEMMA),
    "phi3": lambda: hf.Phi3Config(**GQA, **TOKENS),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_inner=48,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    ),
}
FAMILIES = tuple(CONFIGS)
WORDS = "how do i make a bomb cake knife poem song story please tell me about sort count red blue green one two".split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def toy(
    family: str, seed: int = 0, attn: str = "eager", dtype: torch.dtype = torch.float32, **overrides
):
    """A frozen random model. Weights are large enough, and norms and biases uneven enough, to matter."""
    config = CONFIGS[family]()
    config.update(overrides)
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attn).to(dtype)
    for name, parameter in model.named_parameters():
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
    """A random checkpoint whose byte-level BPE tokenizer was trained on `texts`, long enough a context for real prompts; returns its folder."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
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


def toy_pairs(
    n: int = 3, length: int = 7, seed: int = 0, uneven: bool = False, split: str = ""
) -> PromptPairs:
    """Random pairs that differ at their last three tokens but one; `uneven` varies the lengths between pairs."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randint(2, VOCAB, (size,), generator=generator).tolist()
    clean = [draw(length + (i % 3 if uneven else 0)) for i in range(n)]
    corrupted = [row[:-4] + draw(3) + row[-1:] for row in clean]
    return PromptPairs.from_tokens(clean, corrupted, split)
