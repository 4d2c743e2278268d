"""Rows that begin alike are read as one: the same answers, gradients and scores as whole rows."""

import copy

import pytest
import torch
from toys import CONFIGS, VOCAB, toy, toy_pairs

from cdelta.attribution.scores import attribute
from cdelta.edit.forward import predictions, prompt_logits
from cdelta.models import prefix
from cdelta.models.chat import collate, left_pad
from cdelta.models.generation import decode
from cdelta.models.hooks import requires_grad
from cdelta.policy.pairs import PromptPairs

BEGIN = torch.randint(2, VOCAB, (20,), generator=torch.Generator().manual_seed(3)).tolist()
RESTS = [[5, 9, 4], [7, 3, 8, 6, 2], [4, 11], [9, 9, 3, 5]]
ROWS = [BEGIN + rest for rest in RESTS]
ANSWERS = [[3, 4], [8, 2, 5], [6], [12, 3]]


def wide(family, **kw):
    """A toy whose window, if it has one, is wider than any row."""
    windowed = "sliding_window" in CONFIGS[family][1]
    return toy(family, **kw, **({"sliding_window": 64} if windowed else {}))


@pytest.fixture
def whole(monkeypatch):
    """Rows are read whole inside, as where nothing is shared."""

    def call(function, *args, **kw):
        with monkeypatch.context() as patch:
            patch.setattr(prefix, "SHORTEST", 10**6)
            return function(*args, **kw)

    return call


def shares(model, rows=tuple(ROWS), kept=1):
    return prefix.without_prefix(model, *left_pad(rows, pad=1), kept)


def test_rows_are_cut_behind_what_they_share(family):
    shared = shares(wide(family))
    assert shared.cache.get_seq_length() == len(BEGIN)
    assert [row[-len(rest) :].tolist() for row, rest in zip(shared.ids, RESTS)] == RESTS
    assert shared.positions[:, -1].tolist() == [len(row) - 1 for row in ROWS]
    assert shared.mask.sum(1).tolist() == [len(row) for row in ROWS]


def test_nothing_is_shared_where_it_would_not_pay_or_not_be_exact():
    model = toy("llama")
    assert shares(model, [row[:15] for row in ROWS]).cache is None
    assert shares(model, ROWS[:1]).cache is None
    assert shares(model, [[7 + i, *row] for i, row in enumerate(ROWS)]).cache is None
    windowed = toy("mistral", sliding_window=24)
    assert shares(windowed).cache is None
    assert shares(windowed, [row[:23] for row in ROWS]).cache is not None


def test_kept_columns_stay_with_the_rows():
    same = [BEGIN + [5, 6]] * 3
    assert shares(toy("llama"), same, kept=4).ids.shape[1] == 4


def test_answers_are_those_of_whole_rows(family, whole):
    model = wide(family, seed=1)
    given = (*left_pad(ROWS, pad=1), torch.tensor([1]), 8)
    ours, first = decode(model, *given)
    theirs, first_whole = whole(decode, model, *given)
    assert ours == theirs
    torch.testing.assert_close(first, first_whole, atol=2e-5, rtol=1e-4)


def gradients(model, read, batch):
    with requires_grad(model, on=True) as parameters, torch.enable_grad():
        loss = read(model, batch).pow(2).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize(
    "read", [lambda model, batch: predictions(model, batch).logits, prompt_logits]
)
def test_gradients_are_those_of_whole_rows(family, whole, read):
    model = wide(family, seed=2)
    batch = collate(list(zip(ROWS, ANSWERS)), pad=1)
    ours, theirs = gradients(model, read, batch), whole(gradients, model, read, batch)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("method", ["eap-ig", "gim", "exact"])
def test_scores_are_those_of_whole_pairs(family, whole, method):
    pairs = toy_pairs(n=3)
    pairs = PromptPairs.from_tokens(
        *([BEGIN + list(row) for row in side] for side in (pairs.clean, pairs.corrupted))
    )
    model = wide(family, seed=4, dtype=torch.float64)
    metric = lambda logits: logits[:, 3] - logits[:, 5]  # noqa: E731
    ours = attribute(model, pairs, metric, method=method)
    theirs = whole(attribute, model, pairs, metric, method=method)
    for name in ("edges", "heads", "neurons"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-8, atol=1e-9)
    assert ours.metric_clean == pytest.approx(theirs.metric_clean)


def test_a_repeated_cache_leaves_the_first_as_it_was():
    model, shared = toy("llama"), shares(toy("llama"))
    kept = shared.cache
    before = copy.deepcopy(kept.layers[0].keys)
    rows = prefix.repeated(kept, 4)
    model(
        input_ids=shared.ids,
        attention_mask=shared.mask,
        position_ids=shared.positions,
        past_key_values=rows,
    )
    assert torch.equal(kept.layers[0].keys, before)
    assert rows.layers[0].keys.shape[0] == 4
