"""TODO models.loading."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cdelta.errors import CdeltaError
from cdelta.models.families import check_supported


def load_model(
    path_or_id: str | Path,
    dtype: str = "bfloat16",
    device: str = "auto",
    revision: str | None = None,
    **kw,
):
    """A frozen model in eval mode and its tokenizer, from a checkpoint folder or a hub id.

    Args:
        dtype: name of a torch dtype, or "auto" for the checkpoint's own.
        device: "auto" is the GPU where there is one; ignored when `device_map` is given.
        revision: commit, tag or branch of a hub id; pin a commit for a run that others repeat.
        kw: passed on to ``AutoModelForCausalLM.from_pretrained`` (`device_map`,
            `attn_implementation`, ...).

    Raises `UnsupportedArchitecture` before any weight is read, `CdeltaError` when there is no such
    checkpoint.
    """
    source = dict(
        pretrained_model_name_or_path=str(path_or_id), revision=revision, trust_remote_code=False
    )
    try:
        check_supported(AutoConfig.from_pretrained(**source))
        model = AutoModelForCausalLM.from_pretrained(dtype=torch_dtype(dtype), **source, **kw)
        tok = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CdeltaError(
            f"cannot load a model and tokenizer from {str(path_or_id)!r}: {reason}"
        ) from error
    if "device_map" not in kw:
        model.to(default_device() if device == "auto" else device)
    return model.eval().requires_grad_(False), tok


def torch_dtype(name: str) -> torch.dtype | str:
    """The torch dtype called `name`; "auto" stays. Raises `CdeltaError` on other words."""
    dtype = getattr(torch, name, None)
    if name == "auto" or isinstance(dtype, torch.dtype):
        return dtype or name
    raise CdeltaError(f"unknown dtype {name!r}: use float32, bfloat16, float16 or auto.")


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
