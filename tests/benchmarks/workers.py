"""One measured run in its own process: ``python workers.py WORKER PAIRS MICRO_BATCH
REFERENCE_SOURCE``; prints JSON.

Workers: ours-ig, ours-eap (this package), bridge (TransformerLens's edge EAP), reference
(hannamw/EAP-IG; in an environment with transformer-lens < 4, its source folder given).
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cdelta.attribution.cost import measured  # noqa: E402

LENGTH, STEPS, TOKENS = 24, 5, (5, 9)


def measure(call) -> dict:
    """Wall and processor seconds of ``call()``, and its peak of added memory in MB."""
    cpu = time.process_time()
    _, cost = measured(call)
    cpu = time.process_time() - cpu
    return {
        "seconds": round(cost.seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "added_mb": round(cost.memory / 1e6, 1),
    }


def gpt2_small():
    """GPT-2 small with random weights, the same in every process."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def token_rows(n: int) -> tuple[list, list]:
    """Clean rows, and the same with two tokens changed."""
    rows = torch.randint(1, 50000, (2, n, LENGTH), generator=torch.Generator().manual_seed(0))
    rows[1, :, :10], rows[1, :, 12:] = rows[0, :, :10], rows[0, :, 12:]
    return rows[0].tolist(), rows[1].tolist()


def metric(logits):
    return logits[:, TOKENS[0]] - logits[:, TOKENS[1]]


def ours(method: str, n: int, micro_batch: int) -> dict:
    from cdelta.attribution.scores import attribute, estimate_cost
    from cdelta.policy.pairs import PromptPairs

    model, pairs = gpt2_small(), PromptPairs.from_tokens(*token_rows(n))
    attribute(model, pairs[:1], metric, method=method, steps=1, rule="left")
    cost = estimate_cost(model, pairs, metric, method=method, steps=STEPS, micro_batch=micro_batch)
    kw = dict(method=method, steps=STEPS, rule="left", micro_batch=micro_batch)
    result = measure(lambda: attribute(model, pairs, metric, **kw))
    return result | {
        "estimated_seconds": round(cost.seconds, 2),
        "estimated_mb": round(cost.memory / 1e6, 1),
    }


def bridge(n: int) -> dict:
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis import attribution_patching as tools

    tok = transformers.AutoTokenizer.from_pretrained(sys.argv[4])
    model = gpt2_small().requires_grad_(True)
    wrapped = TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tok)
    sides = [torch.tensor(side) for side in token_rows(n)]
    config = tools.EdgeAttributionConfig(granularity="edge")
    return measure(
        lambda: tools.attribution_patch(
            wrapped, *sides, lambda logits: metric(logits[:, -1]).sum(), config
        )
    )


def reference(n: int) -> dict:
    sys.path.insert(0, sys.argv[4])
    make = torch.zeros  # the reference asks for "cuda" by name
    torch.zeros = lambda *shape, **kw: make(*shape, **{**kw, "device": "cpu"})
    import eap.attribute
    from eap.graph import Graph
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    sides = dict(zip(("clean", "corrupted"), map(torch.tensor, token_rows(n))))
    config = HookedTransformerConfig(
        n_layers=12,
        d_model=768,
        n_heads=12,
        d_head=64,
        d_mlp=3072,
        d_vocab=50257,
        n_ctx=1024,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=1e-5,
        device="cpu",
    )
    model = HookedTransformer(config)
    kept = dict(
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.load_and_process_state_dict(convert_gpt2_weights(gpt2_small(), config), **kept)
    config.use_attn_result = config.use_split_qkv_input = config.use_hook_mlp_in = True

    def tokenized(model, side, max_length=None):
        ids = sides[side[0]]
        return ids, torch.ones_like(ids), torch.full((len(ids),), LENGTH), LENGTH

    eap.attribute.tokenize_plus = tokenized  # rows of ids instead of texts

    def score(logits, *_):
        return metric(logits[:, -1]).sum()

    loader = [(["clean"] * n, ["corrupted"] * n, None)]
    graph = Graph.from_model(model)

    def run():
        return eap.attribute.get_scores_eap_ig(model, graph, loader, score, steps=STEPS, quiet=True)

    return measure(run)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker, n, micro_batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if worker.startswith("ours"):
        result = ours({"ours-ig": "eap-ig", "ours-eap": "eap"}[worker], n, micro_batch)
    else:
        result = {"bridge": bridge, "reference": reference}[worker](n)
    print(json.dumps(result))
