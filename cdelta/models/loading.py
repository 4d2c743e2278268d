"""From a folder or a hub id to a model and its tokenizer, and the check that says beforehand what
would go wrong.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from cdelta.errors import CdeltaError, first_line
from cdelta.memory import free_memory
from cdelta.models.chat import chat_ids, rope_boundary, stop_ids
from cdelta.models.checkpoint import Checkpoint, meta_model, read_config
from cdelta.models.generation import checkpoint_penalties, unsupported_penalties
from cdelta.models.spec import ModelSpec
from cdelta.models.templates import bind_template, template_facts

GIB = 2**30
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


def load_model(
    path_or_id: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    system: str = "",
    template_args: Mapping[str, Any] | None = None,
    **kw,
):
    """A frozen model in eval mode and its tokenizer, from a checkpoint folder or a hub id.

    Args:
        dtype: name of a torch dtype, or "auto" for the checkpoint's own, widened to fp32 on a CPU
            that multiplies bf16 slower.
        device: "auto" is the GPU where there is one; ignored when `device_map` is given.
        revision: commit, tag or branch of a hub id; pin a commit for a run that others repeat.
        system, template_args: a system prompt and keywords for the chat template, from now on part
            of every prompt (`chat.bind_template`).
        kw: passed on to ``AutoModelForCausalLM.from_pretrained`` (`device_map`, ...).

    Raises `UnsupportedArchitecture` before any weight is read, and `CdeltaError` when there is no
    such checkpoint, when its parts do not belong together, or when the device is not there.
    """
    read_config(path_or_id, revision)
    check_dtype(dtype)
    place = None if "device_map" in kw else resolve_device(device)
    source: dict[str, Any] = dict(revision=revision, trust_remote_code=False)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path_or_id), dtype=dtype, output_loading_info=True, **source, **kw
        )
        model, found = loaded
        if place is not None:
            model.to(place)
        narrow = dtype == "auto" and model.dtype.itemsize == 2
        if narrow and place is not None and not bf16_is_faster(place.type):
            model.float()
    except Exception as error:  # transformers raises errors of a dozen types here
        raise CdeltaError(
            f"cannot load a model from {str(path_or_id)!r}: {_reason(error)}."
        ) from error
    _check_loaded(model, found, path_or_id)
    tok = load_tokenizer(path_or_id, revision)
    return model.eval().requires_grad_(False), bind_template(tok, system, **(template_args or {}))


PRODUCT = 512
"""Rows and columns of the matrices whose product is timed."""


@cache
def bf16_is_faster(device_type: str) -> bool:
    """Whether this machine multiplies bf16 matrices at least 1.5 times as fast as fp32 ones."""
    if device_type != "cpu":
        return True
    return 1.5 * product_seconds(torch.bfloat16) < product_seconds(torch.float32)


def product_seconds(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """The best of five products of two `PRODUCT` × `PRODUCT` matrices, about a training step's
    shape.
    """
    x, weight = torch.randn(2, PRODUCT, PRODUCT).to(device, dtype)
    found = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)[0, 0].item()  # waits for the device
        found.append(time.perf_counter() - start)
    return min(found[1:])


def load_tokenizer(path_or_id: str | Path, revision: str | None = None):
    """The tokenizer of a checkpoint folder or hub id. Raises `CdeltaError` when there is none."""
    try:
        tok = AutoTokenizer.from_pretrained(
            str(path_or_id), revision=revision, trust_remote_code=False
        )
    except Exception as error:  # as many types as files that can be wrong
        raise CdeltaError(
            f"cannot load a tokenizer from {str(path_or_id)!r}: "
            f"{_reason(error, '; copy its tokenizer files again')}."
        ) from error
    if not isinstance(tok.model_max_length, (int, float)):
        raise CdeltaError(
            f"{path_or_id}: tokenizer_config.json says model_max_length={tok.model_max_length!r}, "
            "which is no number: mend or remove it."
        )
    return tok


def _reason(error: Exception, remedy: str = "") -> str:
    if "gated" in str(error).casefold() or "401" in str(error):
        return "its licence must be accepted on its page, and then `hf auth login`"
    return first_line(error) + remedy


def _check_loaded(model: PreTrainedModel, found: Mapping[str, Any], source: str | Path) -> None:
    """Nothing was left random, and what the configuration ties is tied."""
    absent = sorted(map(str, found.get("missing_keys") or found.get("mismatched_keys") or ()))
    if absent:
        raise CdeltaError(
            f"{source}: the weights lack {len(absent)} parameters of config.json ({absent[0]}): "
            "weights and config.json disagree."
        )
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and outside is not None and outside.weight is not inside.weight:
        raise CdeltaError(
            f"{source}: config.json ties the unembedding to the embedding, but the weights hold "
            "another one: set tie_word_embeddings to false in config.json."
        )


def check_dtype(name: str) -> None:
    """Raise `CdeltaError` unless weights can be loaded in the dtype of that name."""
    if name not in DTYPES:
        raise CdeltaError(f"unknown dtype {name!r}: use float32, bfloat16, float16 or auto.")


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one, else the CPU. Raises
    `CdeltaError` if there is none.
    """
    try:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(default if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise CdeltaError(
            f"device {name!r} is not available here: use auto or one of {', '.join(there)}."
        ) from error
    if device.type == "meta":
        raise CdeltaError("device 'meta' holds no numbers: use auto, cpu or cuda.")
    return device


# ---------------------------------------------------------------------- what would go wrong


@dataclass(frozen=True)
class Finding:
    """One thing that `check_model` found."""

    level: str
    """"problem": nothing would work. "warning": read before you go on. "fact": good to know."""
    topic: str
    text: str


def check_model(path_or_id: str | Path, **options: Any) -> list[Finding]:
    """Everything about a checkpoint that would stop or surprise an edit, in seconds: no weight is
    loaded.

    Args:
        path_or_id: a checkpoint folder; of a hub id only configuration and tokenizer are looked at.
        options: other fields of `ModelCheck`.
    """
    return ModelCheck(path_or_id, **options).findings()


@dataclass
class ModelCheck:
    """The steps of `check_model`: each yields (level, text) or raises `CdeltaError`, a problem."""

    source: str | Path
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    prompts: Sequence[str] = ()
    """What would be asked,"""
    max_new_tokens: int = 0
    """and how long answers may get."""
    out: str | Path = ""
    """Where the edited checkpoint would be written."""
    system: str = ""
    template_args: Mapping[str, Any] | None = None

    def findings(self) -> list[Finding]:
        """What the steps found; a step is left out where one that it needs found a problem."""
        found: list[Finding] = []
        for topic, needed in STEPS.items():
            if any(each.level == "problem" and each.topic in needed for each in found):
                continue
            try:
                for level, text in getattr(self, f"_{topic}")():
                    found.append(Finding(level, topic, text))
            except CdeltaError as error:
                found.append(Finding("problem", topic, str(error)))
        return found

    def _model(self) -> Iterator[tuple[str, str]]:
        self.config = read_config(self.source, self.revision)
        self.checkpoint = Checkpoint(self.source) if Path(self.source).is_dir() else None
        self.model = meta_model(self.config)
        try:
            self.model.generation_config = GenerationConfig.from_pretrained(
                str(self.source), revision=self.revision or "main"
            )
        except OSError:  # there is none
            pass
        except Exception as error:  # its validation raises several types
            raise CdeltaError(
                f"generation_config.json cannot be read ({first_line(error)}): remove or mend it."
            ) from error
        spec = ModelSpec.from_model(self.model)
        yield (
            "fact",
            f"{spec.family}, {spec.n_params:,} parameters, {spec.n_layers} layers of "
            f"{spec.n_heads} heads ({spec.n_kv} key-value groups) and {spec.d_mlp} neurons",
        )

    def _weights(self) -> Iterator[tuple[str, str]]:
        if self.checkpoint is None:
            yield "fact", "a hub id: its weights are checked after the download"
            return
        size, stored = self.checkpoint.check().n_bytes, self.checkpoint.stored_dtype
        yield "fact", f"{size / GIB:.2f} GiB of {stored} weights"
        if self.dtype not in ("auto", stored, "float32"):
            yield (
                "warning",
                f"the weights are stored as {stored} and would be rounded to {self.dtype}: the "
                "edit is fitted to the rounded model.",
            )

    def _device(self) -> Iterator[tuple[str, str]]:
        check_dtype(self.dtype)
        place = resolve_device(self.device)
        size = 2 if self.dtype in ("bfloat16", "float16") else 4
        needed, free = size * self.model.num_parameters(), free_memory(place)
        yield "fact", f"{place}, {self.dtype}: the weights take {needed / GIB:.2f} GiB"
        if free is not None and needed > free:
            yield (
                "problem",
                f"{place} has {free / GIB:.2f} GiB left and the weights alone take "
                f"{needed / GIB:.2f}: use a smaller model, another dtype or another device.",
            )

    def _disk(self) -> Iterator[tuple[str, str]]:
        if not self.out or self.checkpoint is None:
            return
        out = Path(self.out).absolute()
        place = next(folder for folder in (out, *out.parents) if folder.exists())
        needed, free = self.checkpoint.n_bytes, shutil.disk_usage(place).free
        if needed > free:
            yield (
                "problem",
                f"{place} has {free / GIB:.2f} GiB left and an edited checkpoint takes "
                f"{needed / GIB:.2f}: choose another output folder.",
            )

    def _tokenizer(self) -> Iterator[tuple[str, str]]:
        tok = load_tokenizer(self.source, self.revision)
        self.tok = bind_template(tok, self.system, **(self.template_args or {}))
        yield "fact", f"{len(tok):,} tokens"

    def _template(self) -> Iterator[tuple[str, str]]:
        if self.tok.chat_template is None:
            yield "warning", "no chat template: prompts are written as 'User: ... Assistant:'"
            return
        facts = template_facts(self.tok)
        if not facts.takes_system:
            yield "fact", "no system turn: a system prompt stands before the user's words"
        if facts.reasons:
            yield (
                "warning",
                "the model may reason first: answers are those after an empty reasoning block",
            )
        if facts.date:
            yield "fact", f"the template writes the date: always {facts.date} here"

    def _tokens(self) -> Iterator[tuple[str, str]]:
        rows = self.model.get_input_embeddings().get_parameter("weight").shape[0]
        used = {*chat_ids(self.tok, "Which colour has snow?"), *stop_ids(self.model, self.tok)}
        outside = sorted(token for token in used if token >= rows)
        if outside:
            yield (
                "problem",
                f"the tokenizer writes the ids {outside[:3]}, but the embedding has {rows} rows: "
                "use the tokenizer that belongs to the model.",
            )
        if (self.tok.pad_token_id or 0) >= rows:
            yield "fact", "the padding token has no embedding: rows are padded with an end token"

    def _context(self) -> Iterator[tuple[str, str]]:
        most = max((len(chat_ids(self.tok, prompt)) for prompt in self.prompts), default=0)
        context = getattr(self.config.get_text_config(), "max_position_embeddings", 0)
        if context and most + self.max_new_tokens > context:
            yield (
                "problem",
                f"the longest prompt has {most} tokens and {self.max_new_tokens} more for its "
                f"answer exceed the context of {context}: shorten prompts or answers.",
            )
        boundary = rope_boundary(self.model)
        if boundary and most + self.max_new_tokens > boundary:
            yield "warning", f"prompts beyond {boundary} tokens use the long rotary factors"

    def _answers(self) -> Iterator[tuple[str, str]]:
        if named := checkpoint_penalties(self.model):
            yield (
                "warning",
                f"generation_config.json sets {named}, which other runtimes apply and plain greedy "
                "answers do not: measure both.",
            )
        if unknown := unsupported_penalties(self.model):
            yield (
                "warning",
                f"generation_config.json sets {unknown}, which answers here never apply.",
            )


STEPS = {
    "model": (),
    "weights": ("model",),
    "device": ("model",),
    "disk": ("model",),
    "tokenizer": ("model",),
    "template": ("model", "tokenizer"),
    "tokens": ("model", "tokenizer", "template"),
    "context": ("model", "tokenizer", "template"),
    "answers": ("model",),
}
"""Steps of `ModelCheck`, and those whose problems leave nothing to check."""
