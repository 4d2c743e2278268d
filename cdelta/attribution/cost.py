"""What an attribution run takes: a prediction before it runs, and a refusal where it would not
fit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, TypeVar

import torch

from cdelta.attribution.batch import Batch, batches, compute_dtype
from cdelta.attribution.linear import Wiring
from cdelta.errors import CdeltaError
from cdelta.memory import GpuPeak, ResidentPeak, free_memory
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs

Result = TypeVar("Result")

STEPS_AT_ONCE = 8
"""Most gradient steps of a pair in one pass; what more of them need is done in turn."""
AUTO_SHARE = 0.5
"""Share of the device's free memory that ``micro_batch="auto"`` may take."""
AUTO_TOKENS = 16384
"""Tokens in one pass beyond which ``micro_batch="auto"`` gains nothing: the products are large."""


@dataclass(frozen=True)
class Cost:
    """`seconds`, and peak `memory` in bytes on top of the loaded model; predicted or `measured`."""

    seconds: float
    memory: int


def passes(spec: ModelSpec, steps: int) -> float:
    """Arithmetic of a run, in forward passes: the two runs for the differences, every step's
    forward and backward pass, and (once for `STEPS_AT_ONCE` steps) reader gradients and their
    products with source differences.
    """
    width, kv_width = spec.n_heads * spec.head_dim, 2 * spec.n_kv * spec.head_dim
    forward = spec.n_layers * spec.d_model * (2 * width + kv_width + 3 * spec.d_mlp)
    readers = spec.n_layers * spec.d_model * (width + kv_width)
    products = Wiring(spec).edges().sum().item() * spec.d_model
    contractions = -(-steps // STEPS_AT_ONCE)
    return 2 + 2 * steps + contractions * ((readers + products) / forward)


def memory_needed(model, spec: ModelSpec, todo: list[Batch], steps: int) -> int:
    """Peak bytes on top of the model, which grow with the largest micro-batch only."""
    tokens = max(batch.mask.numel() for batch in todo)
    positions = max(batch.mask.shape[1] for batch in todo)
    own, work = model.dtype.itemsize, compute_dtype(model).itemsize
    wiring, width = Wiring(spec), spec.n_heads * spec.head_dim
    dense = len(wiring.sources) * spec.d_model * work
    inputs = spec.n_layers * (width + spec.d_mlp) * work
    eager = model.config._attn_implementation == "eager"
    outputs = spec.n_layers * (width + spec.n_kv * spec.head_dim) * own
    graph = graph_per_token(spec, own, positions if eager else 0) + outputs
    buffers = wiring.readers_per_layer * spec.d_model * work
    passing = 4 * 4 * (width + spec.d_mlp)  # a layer's gradients in fp32, on their way
    passing += 3 * 4 * model.config.get_text_config().vocab_size // positions  # logits of one token
    weights = spec.d_mlp * spec.d_model * work  # exact patching: what each neuron writes
    second = min(steps, STEPS_AT_ONCE) * (graph + passing) + buffers if steps else weights
    return tokens * (dense + inputs + second)


def graph_per_token(spec: ModelSpec, own: int, positions: int) -> int:
    """Bytes that autograd keeps per token, parameters frozen: projections in `own` bytes, norms
    fp32.

    `positions` is the row length under eager attention, which keeps its weights, and 0 otherwise.
    """
    width, kv_width = spec.n_heads * spec.head_dim, spec.n_kv * spec.head_dim
    layer_norm = f"{spec.layout.blocks}.0.{spec.layout.attn_norm}.bias" in spec.shapes
    copies, size = (1, own) if layer_norm else (2, 4)  # RMS norms compute in fp32, step by step
    norms = (4 if spec.layout.attn_post else 2) * copies * spec.d_model
    if any("q_norm" in name for name in spec.shapes):
        norms += 2 * (width + kv_width)
    per_neuron = 4 if spec.gated else 1  # gate, up and their product; or the activation alone
    activations = 2 * width + 2 * kv_width + per_neuron * spec.d_mlp
    return spec.n_layers * (activations * own + norms * size + 3 * spec.n_heads * positions * 4)


def fitting_micro_batch(
    model, spec: ModelSpec, pairs: PromptPairs, steps: int, device: torch.device
) -> int:
    """Most pairs in memory at a time within `AUTO_SHARE` of the free memory and `AUTO_TOKENS`."""
    longest = max(map(len, pairs.clean))
    rows = longest * max(1, min(steps, STEPS_AT_ONCE))
    useful = max(1, min(len(pairs), AUTO_TOKENS // rows))
    free = free_memory(device)
    if free is None:
        return useful
    needed = memory_needed(model, spec, batches(pairs, 1, device), steps)
    return max(1, min(useful, int(AUTO_SHARE * free / needed)))


def check_memory(needed: int, device: torch.device, micro_batch: int) -> None:
    """Raise `CdeltaError`, naming a micro-batch that fits, if `device` has less than `needed`
    bytes.
    """
    free = free_memory(device)
    if free is None or needed <= free:
        return
    fitting = int(micro_batch * free / needed)
    remedy = "shorten the prompts or use a larger device"
    if fitting:
        remedy = f"use micro_batch={fitting}"
    raise CdeltaError(
        f"attribution with micro_batch={micro_batch} needs about {needed / 2**30:.1f} GiB beside "
        f"the model, and {device} has {free / 2**30:.1f} GiB left: {remedy}."
    )


def measured(call: Callable[[], Result], device: torch.device | str = "cpu") -> tuple[Result, Cost]:
    """``call()``'s result, its seconds, and the peak of the memory it took.

    Memory is what was allocated on a GPU, and resident memory, sampled (Linux), on a CPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    with GpuPeak() if on_gpu else ResidentPeak() as peak:
        start = time.perf_counter()
        result = call()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return result, Cost(seconds, peak.memory)
