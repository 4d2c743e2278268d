"""Every entry of attention and MLP weights belongs to exactly one unit, in every family."""

from dataclasses import fields

import pytest
import torch
import transformers as hf
from toys import save_toy, toy

from cdelta.errors import CdeltaError
from cdelta.models import loading
from cdelta.models.loading import load_model
from cdelta.models.spec import FAMILIES, ModelSpec, Slice, UnsupportedArchitecture

UNITLESS = (
    "norm",
    "ln_",
    "embed",
    "wte",
    "wpe",
    "lm_head",
    "o_proj.bias",
    "c_proj.bias",
    "down_proj.bias",
)


def all_slices(spec: ModelSpec) -> list[Slice]:
    units = []
    for layer in range(spec.n_layers):
        units += [spec.head_slices(layer, h) for h in range(spec.n_heads)]
        units += [spec.kv_slices(layer, g) for g in range(spec.n_kv)]
        units += [spec.neuron_slices(layer, n) for n in range(spec.d_mlp)]
    return [piece for unit in units for piece in unit]


def test_units_cover_attention_and_mlp_exactly_once(family):
    model = toy(family)
    counts = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for s in all_slices(ModelSpec.from_model(model)):
        counts[s.name].narrow(s.dim, s.start, s.stop - s.start).add_(1)
    for name, count in counts.items():
        assert (count == (0 if any(mark in name for mark in UNITLESS) else 1)).all(), name


def test_head_slices_are_the_rows_and_columns_that_the_head_uses(family):
    model = toy(family)
    spec = ModelSpec.from_model(model)
    ids = torch.arange(2, 9)[None]
    for s in spec.head_slices(1, 2):
        model.get_parameter(s.name).narrow(s.dim, s.start, s.stop - s.start).zero_()
    seen = []
    handle = (
        spec.blocks(model)[1].qkv[0].register_forward_hook(lambda m, args, out: seen.append(out))
    )
    model(ids)
    handle.remove()
    q = seen[0][..., : spec.n_heads * spec.head_dim].unflatten(-1, (spec.n_heads, spec.head_dim))
    assert [bool((q[0, :, h] == 0).all()) for h in range(4)] == [False, False, True, False]


def test_sizes_of_qwen3_come_from_the_weights():
    spec = ModelSpec.from_model(toy("qwen3"))
    assert (spec.family, spec.n_layers, spec.n_heads, spec.n_kv) == ("qwen3", 3, 4, 2)
    assert (spec.head_dim, spec.d_model, spec.d_mlp) == (16, 32, 48)


def test_tied_embeddings_count_once():
    tied, untied = toy("llama", tie_word_embeddings=True), toy("llama")
    difference = ModelSpec.from_model(untied).n_params - ModelSpec.from_model(tied).n_params
    assert difference == 96 * 32


def test_spec_works_on_the_meta_device():
    config = toy("llama").config
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    assert ModelSpec.from_model(model).n_params == ModelSpec.from_model(toy("llama")).n_params


@pytest.mark.parametrize(
    "config, reason",
    [
        (hf.MixtralConfig(), "mixture of experts"),
        (hf.GPTNeoXConfig(), "parallel"),
        (hf.FalconConfig(), "parallel"),
        (hf.PhiConfig(), "no entry"),  # parallel blocks, which its configuration does not say
        (hf.GPTJConfig(), "no entry"),
        (hf.Qwen3NextConfig(), "mixture of experts"),
        (hf.Qwen3NextConfig(num_experts=0), "no entry"),  # gated queries
        (hf.DeepseekV3Config(), "mixture of experts"),
        (hf.OPTConfig(), "no entry"),
        (hf.GPT2Config(add_cross_attention=True), "cross-attention"),
    ],
)
def test_unsupported_architectures_name_the_reason_and_the_supported_ones(config, reason):
    with torch.device("meta"), pytest.raises(UnsupportedArchitecture, match=reason) as error:
        ModelSpec.from_model(hf.AutoModelForCausalLM.from_config(config))
    assert all(family in str(error.value) for family in FAMILIES)


def test_gated_queries_are_refused():
    model = toy("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(UnsupportedArchitecture, match="q_proj has 64 outputs instead of 32"):
        ModelSpec.from_model(model)


def test_load_model_is_frozen_and_in_eval_mode(tmp_path, family):
    model, _ = load_model(save_toy(tmp_path, family), dtype="float32", device="cpu")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    original = toy(family).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


def test_load_model_brings_the_checkpoints_tokenizer(checkpoint):
    _, tok = load_model(checkpoint, dtype="float32", device="cpu")
    assert tok.decode(tok("make a cake")["input_ids"]) == "make a cake"


def test_load_model_errors_name_the_path_or_the_word(tmp_path, checkpoint):
    with pytest.raises(CdeltaError, match="empty"):
        load_model(tmp_path / "empty")
    with pytest.raises(CdeltaError, match="float99"):
        load_model(checkpoint, dtype="float99")


def test_every_family_entry_names_only_strings_and_numbers():
    for layout in FAMILIES.values():
        for f in fields(layout):
            assert isinstance(getattr(layout, f.name), (str, float, tuple, list))


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_the_checkpoints_dtype_unless_this_cpu_multiplies_it_slower(
    fast, tmp_path, monkeypatch
):
    save_toy(tmp_path, "llama", dtype=torch.bfloat16)
    monkeypatch.setattr(loading, "bf16_is_faster", lambda device: fast)
    wanted = torch.bfloat16 if fast else torch.float32
    assert loading.load_model(tmp_path, "auto", "cpu")[0].dtype == wanted
    assert loading.load_model(tmp_path, "bfloat16", "cpu")[0].dtype == torch.bfloat16
