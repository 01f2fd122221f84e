"""A rule that could be stored with a tiny model."""

from megatron.early_exit.checkpoint.stored_rule import Promise, StoredRule

PROMISE = Promise(
    agreement=0.99,
    task_loss=0.5,
    score="f1",
    confidence=0.95,
    tasks=("held_out",),
    texts=512,
    texts_sha256="0" * 64,
    max_tokens=64,
    speedup=1.25,
    speedup_interval=(1.125, 1.375),
    mean_exit_layer=2.5,
    dtype="fp32",
    weight_dtype=None,
    quantize_heads=None,
    date="2026-01-31",
    commit="c0ffee",
)


def make_rule(iteration: str = "iter_0000007", **fields: object) -> StoredRule:
    """A rule for a model with an exit after layer 1."""
    values = {
        "early_exit_threshold": 0.25,
        "exit_measure": "margin",
        "exit_layers": (1,),
        "kv_policy": "propagate",
        "iteration": iteration,
        "promise": PROMISE,
    }
    return StoredRule(**{**values, **fields})
