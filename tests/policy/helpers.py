"""What the policy tests share: rows made by hand, real files where they are, and tokenizers trained
on the spot."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TEMPLATE = (
    "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def real(name: str) -> Path:
    """A folder of real upstream files; the test is skipped where there is none."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


def trained_tokenizer(texts, vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=alphabet,
            special_tokens=["<u>", "<a>"],
            show_progress=False,
        ),
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tok.chat_template = TEMPLATE
    return tok


def row(prompt: str, role: str = "target", **more: str) -> dict[str, str]:
    """One record as a source gives it."""
    base = {
        "prompt": prompt,
        "category": "crime",
        "expected": "refuse" if role == "target" else "comply",
        "role": role,
        "source": "made",
        "source_revision": "1",
        "source_id": prompt,
        "license": "none",
        "group_id": prompt,
        "split": "edit",
    }
    return base | more
