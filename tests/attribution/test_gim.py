"""GIM: the model computes what it does, its backward pass is the modified one, and both come
back."""

import pytest
import torch
from toys import toy, toy_pairs

from cdelta.attribution import gim
from cdelta.attribution.gim import WarmSoftmax, modified_gradients, scaled
from cdelta.attribution.linear import Wiring
from cdelta.attribution.scores import attribute
from cdelta.models.spec import ModelSpec


def metric(logits):
    return logits[:, 5] - logits[:, 9]


def logits(model):
    return model(torch.tensor(toy_pairs().clean)).logits


def test_the_model_computes_what_it_does_and_is_itself_again_afterwards(family):
    model = toy(family)
    plain, implementation = logits(model), model.config._attn_implementation
    with modified_gradients(model, ModelSpec.from_model(model)):
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), plain)
    assert model.config._attn_implementation == implementation
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_softmax_has_the_softer_distributions_jacobian():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(WarmSoftmax.apply, x)
    p = (x / gim.TEMPERATURE).softmax(-1)
    torch.testing.assert_close(jacobian, torch.diag(p) - torch.outer(p, p))
    torch.testing.assert_close(WarmSoftmax.apply(x), x.softmax(-1))


def test_scaled_scales_the_gradient_alone():
    x = torch.randn(3, requires_grad=True)
    y = scaled(x, 0.25)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 0.25))


def test_reader_gradients_are_those_of_the_modified_pass(family):
    """Frozen norms are linear, so that edges still sum to what their source's output is worth."""
    scores = attribute(toy(family), toy_pairs(uneven=True), metric, method="gim")
    wiring = Wiring(scores.spec)
    for layer in range(scores.spec.n_layers):
        rows = scores.edges[wiring.heads(layer)].sum(1)
        torch.testing.assert_close(rows, scores.heads[layer], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores.neurons.sum(1), scores.mlps, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(
        scores.heads, attribute(toy(family), toy_pairs(uneven=True), metric, method="eap").heads
    )


def gradients_of_projections(model) -> list[torch.Tensor]:
    """Gradients at the outputs of q, k and v of the only layer."""
    outputs = []
    attention = model.model.layers[0].self_attn
    handles = [
        module.register_forward_hook(lambda m, args, out: outputs.append(out))
        for module in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    start = model.get_input_embeddings()(torch.tensor(toy_pairs().clean)).requires_grad_()
    value = metric(model(inputs_embeds=start).logits[:, -1]).sum()
    for handle in handles:
        handle.remove()
    return list(torch.autograd.grad(value, outputs))


def test_factors_of_products_share_their_gradient(monkeypatch):
    """At temperature 1 and with norms as they are, only the halving of factors is left."""
    monkeypatch.setattr(gim, "TEMPERATURE", 1.0)
    monkeypatch.setattr(gim, "norms", lambda model: [])
    model = toy("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    plain = gradients_of_projections(model)
    with modified_gradients(model, ModelSpec.from_model(model)):
        modified = gradients_of_projections(model)
    for factor, one, other in zip((0.25, 0.25, 0.5), plain, modified):
        torch.testing.assert_close(other, factor * one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_undone_after_errors(llama, error):
    def failing(_):
        raise error("stop")

    with pytest.raises(error):
        attribute(llama, toy_pairs(), failing, method="gim")
    assert llama.config._attn_implementation == "eager"
    assert not any(m._forward_hooks or "forward" in vars(m) for m in llama.modules())
