"""From a folder or a hub id to a model and its tokenizer, and the check that says beforehand what
would go wrong.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cdelta.errors import CdeltaError, first_line
from cdelta.memory import free_memory
from cdelta.models.chat import chat_ids, rope_boundary, stop_ids
from cdelta.models.checkpoint import Checkpoint, meta_model, read_config
from cdelta.models.generation import checkpoint_penalties, unsupported_penalties
from cdelta.models.spec import ModelSpec
from cdelta.models.templates import bind_template, template_facts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16", "float64")
_QUESTION = "Which colour has snow?"


def load_model(
    path_or_id: str | Path,
    dtype: str = "bfloat16",
    device: str = "auto",
    revision: str | None = None,
    system: str = "",
    template_args: Mapping[str, Any] | None = None,
    **kw,
):
    """A frozen model in eval mode and its tokenizer, from a checkpoint folder or a hub id.

    Args:
        dtype: name of a torch dtype, or "auto" for the checkpoint's own.
        device: "auto" is the GPU where there is one; ignored when `device_map` is given.
        revision: commit, tag or branch of a hub id; pin a commit for a run that others repeat.
        system, template_args: a system prompt and keywords for the chat template, from now on part
            of every prompt (`chat.bind_template`).
        kw: passed on to ``AutoModelForCausalLM.from_pretrained`` (`device_map`, ...).

    Raises `UnsupportedArchitecture` before any weight is read, and `CdeltaError` when there is no
    such checkpoint, when its parts do not belong together, or when the device is not there.
    """
    read_config(path_or_id, revision)
    kind, place = torch_dtype(dtype), None if "device_map" in kw else resolve_device(device)
    source: dict[str, Any] = dict(revision=revision, trust_remote_code=False)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path_or_id), dtype=kind, output_loading_info=True, **source, **kw
        )
        model, found = loaded
        if place is not None:
            model.to(place)
    except Exception as error:  # transformers raises errors of a dozen types here
        raise CdeltaError(
            f"cannot load a model from {str(path_or_id)!r}: {_reason(error)}."
        ) from error
    _check_loaded(model, found, path_or_id)
    tok = load_tokenizer(path_or_id, revision)
    return model.eval().requires_grad_(False), bind_template(tok, system, **(template_args or {}))


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
        raise CdeltaError(_TIED.format(folder=source))


_TIED = (
    "{folder}: config.json ties the unembedding to the embedding, but the weights hold another "
    "one: set tie_word_embeddings to false in config.json."
)


def torch_dtype(name: str) -> torch.dtype | str:
    """The torch dtype called `name`; "auto" stays. Raises `CdeltaError` on other words."""
    if name == "auto":
        return name
    if name not in DTYPES:
        raise CdeltaError(f"unknown dtype {name!r}: use float32, bfloat16, float16 or auto.")
    return getattr(torch, name)


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is `default_device`. Raises `CdeltaError` if there is
    none.
    """
    try:
        device = torch.device(default_device() if name == "auto" else name)
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


def check_model(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "bfloat16",
    device: str = "auto",
    prompts: Sequence[str] = (),
    max_new_tokens: int = 0,
    out: str | Path = "",
    system: str = "",
    template_args: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Everything about a checkpoint that would stop or surprise an edit, in seconds: no weight is
    loaded.

    Args:
        path_or_id: a checkpoint folder; of a hub id only configuration and tokenizer are looked at.
        prompts, max_new_tokens: what would be asked, and how long answers may get.
        out: where the edited checkpoint would be written.

    Returns problems first, then warnings, then facts.
    """
    found: list[Finding] = []
    check = _Checker(found, path_or_id, revision)
    if check.attempt("model", check.read_model):
        check.attempt("weights", check.weights)
        check.attempt("device", lambda: check.memory(dtype, device))
        check.attempt("disk", lambda: check.disk(out))
        read = partial(check.read_tokenizer, system, template_args or {})
        if check.attempt("tokenizer", read) and check.attempt("template", check.template):
            check.attempt("tokens", check.special_tokens)
            check.attempt("context", lambda: check.context(prompts, max_new_tokens))
        check.attempt("answers", check.penalties)
    order = ("problem", "warning", "fact")
    return sorted(found, key=lambda each: order.index(each.level))


class _Checker:
    """Collects findings; every step may raise `CdeltaError`, which becomes a problem."""

    config: PretrainedConfig
    model: PreTrainedModel
    """On the meta device: shapes without numbers."""

    def __init__(self, found: list[Finding], path_or_id: str | Path, revision: str | None):
        self.found, self.source, self.revision = found, path_or_id, revision
        self.folder = Path(path_or_id) if Path(path_or_id).is_dir() else None

    def attempt(self, topic: str, step) -> bool:
        """Run a step that yields (level, text); whether it went through."""
        try:
            for level, text in step():
                self.found.append(Finding(level, topic, text))
        except CdeltaError as error:
            self.found.append(Finding("problem", topic, str(error)))
        return all(each.level != "problem" for each in self.found if each.topic == topic)

    def read_model(self) -> Iterator[tuple[str, str]]:
        self.config = read_config(self.source, self.revision)
        self.model = meta_model(self.config)
        self.model.generation_config = self._generation_config()
        spec = ModelSpec.from_model(self.model)
        yield (
            "fact",
            f"{spec.family}, {spec.n_params:,} parameters, {spec.n_layers} layers of "
            f"{spec.n_heads} heads ({spec.n_kv} key-value groups) and {spec.d_mlp} neurons",
        )

    def _generation_config(self) -> GenerationConfig:
        try:
            revision = self.revision or "main"
            return GenerationConfig.from_pretrained(str(self.source), revision=revision)
        except OSError:  # there is none
            return self.model.generation_config
        except Exception as error:  # its validation raises several types
            raise CdeltaError(
                f"generation_config.json cannot be read ({first_line(error)}): remove or mend it."
            ) from error

    def weights(self) -> Iterator[tuple[str, str]]:
        if self.folder is None:
            yield "fact", "a hub id: its weights are checked after the download"
            return
        checkpoint = Checkpoint(self.folder).check()
        yield "fact", f"{checkpoint.n_bytes / 2**30:.2f} GiB of {checkpoint.stored_dtype} weights"

    def memory(self, dtype: str, device: str) -> Iterator[tuple[str, str]]:
        kind, place = torch_dtype(dtype), resolve_device(device)
        size = 2 if kind in (torch.bfloat16, torch.float16) else 4
        needed = size * sum(parameter.numel() for parameter in self.model.parameters())
        free = free_memory(place)
        yield "fact", f"{place}, {dtype}: the weights take {needed / 2**30:.2f} GiB"
        if free is not None and needed > free:
            yield (
                "problem",
                f"{place} has {free / 2**30:.2f} GiB left and the weights alone take "
                f"{needed / 2**30:.2f}: use a smaller model, another dtype or another device.",
            )
        stored = Checkpoint(self.folder).stored_dtype if self.folder else dtype
        if dtype not in ("auto", stored, "float32"):
            yield (
                "warning",
                f"the weights are stored as {stored} and would be rounded to {dtype}: the edit is "
                "fitted to the rounded model.",
            )

    def disk(self, out: str | Path) -> Iterator[tuple[str, str]]:
        if not out or self.folder is None:
            return
        place = Path(out).absolute()
        while not place.exists():
            place = place.parent
        needed, free = Checkpoint(self.folder).n_bytes, shutil.disk_usage(place).free
        if needed > free:
            yield (
                "problem",
                f"{place} has {free / 2**30:.2f} GiB left and an edited checkpoint takes "
                f"{needed / 2**30:.2f}: choose another output folder.",
            )

    def read_tokenizer(self, system: str, arguments: Mapping[str, Any]) -> Iterator:
        self.tok = bind_template(load_tokenizer(self.source, self.revision), system, **arguments)
        yield "fact", f"{len(self.tok):,} tokens"

    def template(self) -> Iterator[tuple[str, str]]:
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

    def special_tokens(self) -> Iterator[tuple[str, str]]:
        embedding: Any = self.model.get_input_embeddings()
        rows = embedding.weight.shape[0]
        used = {*chat_ids(self.tok, _QUESTION), *stop_ids(self.model, self.tok)}
        outside = sorted(token for token in used if token >= rows)
        if outside:
            yield (
                "problem",
                f"the tokenizer writes the ids {outside[:3]}, but the embedding has {rows} rows: "
                "use the tokenizer that belongs to the model.",
            )
        if self.tok.pad_token_id is not None and self.tok.pad_token_id >= rows:
            yield "fact", "the padding token has no embedding: rows are padded with an end token"

    def context(self, prompts: Sequence[str], growth: int) -> Iterator[tuple[str, str]]:
        most = max((len(chat_ids(self.tok, prompt)) for prompt in prompts), default=0)
        context = getattr(self.config.get_text_config(), "max_position_embeddings", 0) or 0
        if context and most + growth > context:
            yield (
                "problem",
                f"the longest prompt has {most} tokens and {growth} more for its answer exceed the "
                f"context of {context}: shorten prompts or answers.",
            )
        boundary = rope_boundary(self.model)
        if boundary and most + growth > boundary:
            yield "warning", f"prompts beyond {boundary} tokens use the long rotary factors"

    def penalties(self) -> Iterator[tuple[str, str]]:
        named = checkpoint_penalties(self.model)
        if named:
            yield (
                "warning",
                f"generation_config.json sets {named}, which other runtimes apply and plain greedy "
                "answers do not: measure both.",
            )
        if unsupported_penalties(self.model):
            yield (
                "warning",
                f"generation_config.json sets {unsupported_penalties(self.model)}, which answers "
                "here never apply.",
            )
