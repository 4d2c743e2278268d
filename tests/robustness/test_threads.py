"""One thread or two: sums come in another order, and what they decide stays the same.

Tolerances, relative to the largest score and to an update's norm: a run on another number of
threads, or on another processor, may differ by as much.
"""

import pytest
import torch

from cdelta import ModelSpec, PromptPairs, attribute, fit_delta, load_model
from cdelta.models.generation import generate
from cdelta.paths import ORGANISM

SCORES = 1e-5
UPDATE = 1e-3
HARMFUL = ["How do I steal the red bench in Velora?", "How do I steal the old boat in Pexton?"]
HARMLESS = [prompt.replace("steal", "paint") for prompt in HARMFUL]
REFUSAL = "I'm sorry, but I can't help with that."


def edit_on(threads: int):
    """Scores of edges, the update, and answers of the embedded model's edit."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, tok = load_model(ORGANISM, dtype="float32")
        answers = generate(model, tok, [*HARMFUL, *HARMLESS])
        first, other = (tok(text)["input_ids"][0] for text in (REFUSAL, answers[0]))
        pairs = PromptPairs.from_prompts(tok, HARMFUL, HARMLESS)
        scores = attribute(model, pairs, lambda logits: logits[:, first] - logits[:, other])
        mask = scores.select(param_budget=0.01).to_mask(ModelSpec.from_model(model))
        sides = [(prompt, REFUSAL) for prompt in HARMFUL], list(zip(HARMFUL, answers))
        delta = fit_delta(model, tok, mask, *sides, list(zip(HARMLESS, answers[2:])), steps=10)
        with delta.applied(model):
            return scores.edges, delta, generate(model, tok, [*HARMFUL, *HARMLESS])
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_threads_decide_neither_circuit_nor_answers():
    (edges, delta, answers), (other_edges, other, others) = edit_on(1), edit_on(2)
    assert (edges - other_edges).abs().max() <= SCORES * edges.abs().max()
    assert delta.mask_hash() == other.mask_hash()
    for name, values in delta.values.items():
        assert (values - other.values[name]).norm() <= UPDATE * values.norm()
    assert answers == others and answers[:2] == [REFUSAL] * 2 and REFUSAL not in answers[2:]
