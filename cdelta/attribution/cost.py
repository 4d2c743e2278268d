"""What an attribution run takes: a prediction before it runs, a refusal where it would not fit, and what a call took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, TypeVar

import torch

from cdelta.attribution.passes import Batch, compute_dtype
from cdelta.attribution.wiring import Wiring
from cdelta.errors import CdeltaError
from cdelta.memory import GpuPeak, ResidentPeak, free_memory
from cdelta.models.spec import ModelSpec

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """`seconds`, and peak `memory` in bytes on top of the loaded model; predicted (`attribution.estimate_cost`) or `measured`."""

    seconds: float
    memory: int


def passes(spec: ModelSpec, steps: int) -> float:
    """Arithmetic of a run, in forward passes: the two runs for the differences, and each step's forward, backward and products."""
    return 2 + steps * (2 + extra_work(spec))


def extra_work(spec: ModelSpec) -> float:
    """Arithmetic of a step's reader gradients and products with source differences, in forward passes."""
    wiring, width = Wiring(spec), spec.n_heads * spec.head_dim
    kv_width = 2 * spec.n_kv * spec.head_dim
    forward = spec.n_layers * spec.d_model * (2 * width + kv_width + 3 * spec.d_mlp)
    readers = spec.n_layers * spec.d_model * (width + kv_width)
    return (readers + wiring.edges().sum().item() * spec.d_model) / forward


def memory_needed(model, spec: ModelSpec, todo: list[Batch], steps: int) -> int:
    """Peak bytes on top of the model. Grows with the largest micro-batch, not with the number of pairs."""
    tokens = max(batch.mask.numel() for batch in todo)
    positions = max(batch.mask.shape[1] for batch in todo)
    own, work = model.dtype.itemsize, compute_dtype(model).itemsize
    wiring, width = Wiring(spec), spec.n_heads * spec.head_dim
    dense = len(wiring.sources) * spec.d_model * work
    inputs = spec.n_layers * (width + spec.d_mlp) * work
    two_runs = 2 * spec.n_layers * (width + spec.d_mlp + spec.d_model) * own
    graph = graph_per_token(
        spec, own, positions if model.config._attn_implementation == "eager" else 0
    )
    buffers = 2 * wiring.readers_per_layer * spec.d_model * work
    second = graph + buffers if steps else spec.d_mlp * spec.d_model * work
    return tokens * (dense + inputs + max(two_runs, second))


def graph_per_token(spec: ModelSpec, own: int, positions: int) -> int:
    """Bytes that autograd keeps per token, parameters frozen: projections in `own` bytes, norms in fp32.

    `positions` is the row length under eager attention, which keeps its weights, and 0 otherwise.
    """
    width, kv_width = spec.n_heads * spec.head_dim, spec.n_kv * spec.head_dim
    query_key_norm = any("q_norm" in name for name in spec.shapes)
    norms = (4 if spec.layout.attn_post else 2) * 2 * spec.d_model + query_key_norm * 2 * (
        width + kv_width
    )
    activations = 2 * width + 2 * kv_width + 4 * spec.d_mlp
    return spec.n_layers * (activations * own + norms * 4 + 3 * spec.n_heads * positions * 4)


def check_memory(needed: int, device: torch.device, micro_batch: int) -> None:
    """Raise `CdeltaError`, naming a micro-batch that fits, if `needed` bytes are more than `device` has left."""
    free = free_memory(device)
    if free is None or needed <= free:
        return
    fitting = int(micro_batch * free / needed)
    remedy = (
        f"use micro_batch={fitting}" if fitting else "shorten the prompts or use a larger device"
    )
    raise CdeltaError(
        f"attribution with micro_batch={micro_batch} needs about {needed / 2**30:.1f} GiB beside the model, and {device} "
        f"has {free / 2**30:.1f} GiB left: {remedy}."
    )


def measured(call: Callable[[], Result], device: torch.device | str = "cpu") -> tuple[Result, Cost]:
    """``call()``'s result, its seconds, and the peak of the memory it took: allocated on a GPU; resident, sampled (Linux), on a CPU."""
    on_gpu = torch.device(device).type == "cuda"
    with GpuPeak() if on_gpu else ResidentPeak() as peak:
        start = time.perf_counter()
        result = call()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return result, Cost(seconds, peak.memory)
