"""Checkpoints damaged by hand: each damage to a sound one, and the words of its refusal."""

import os
from pathlib import Path

import mlx.core as mx

from tests.support.faults.damage import (
    DIGITS,
    HEAD,
    LONG,
    NATIVE,
    NESTED,
    PARAMS,
    WHOLE,
    entry,
    heads_of,
    instead,
    link,
    many,
    renamed,
    sparse,
    tensors,
    text,
    then,
    values,
)
from tests.support.faults.malformed_weights import FILES, HEADERS, INDEXES, Case, hf, native, packed

CONFIGS = {
    "heads of nothing": hf(heads_of(0), "config.json: head_dim is 0, but RoPE turns pairs"),
    "heads of an odd size": hf(heads_of(63), "config.json: head_dim is 63, but RoPE turns pairs"),
    "heads of a size to be found": hf(
        then(heads_of(0), values("config.json", head_dim=None)),
        "head_dim is 0, but RoPE turns pairs",
    ),
    "layers of 4000 digits": hf(
        values("config.json", num_hidden_layers=DIGITS), "num_hidden_layers is 1"
    ),
    "hidden size of 300 digits": hf(
        values("config.json", hidden_size=10**300), "is BF16 [1300, 128], config.json implies"
    ),
    "heads swapped": hf(
        values("config.json", num_attention_heads=2, num_key_value_heads=4),
        "do not share 4 key/value",
    ),
    "model_type is nested": hf(
        values("config.json", model_type=NESTED), "config.json: model_type is [[["
    ),
    "model_type moves the cursor": hf(
        values("config.json", model_type="\x1b[2J\n"), r"'\x1b[2J\n'"
    ),
    "sliding_window is a megabyte": hf(
        values("config.json", sliding_window=LONG), "sliding_window is 'xx"
    ),
    "hidden_act is nested": hf(values("config.json", hidden_act=NESTED), "hidden_act is [[["),
    "mlp_bias is nested": hf(values("config.json", mlp_bias=NESTED), "mlp_bias is [[["),
    "rope_parameters is nested": hf(
        values("config.json", rope_parameters=NESTED), "rope_parameters is [[["
    ),
    "rope_theta is nested": hf(values("config.json", rope_theta=NESTED), "rope_theta is [[["),
    "tie_word_embeddings is nested": hf(
        values("config.json", tie_word_embeddings=NESTED), "is [[["
    ),
    "quantization of a megabyte": hf(
        values("config.json", quantization={"bits": 4, "group_size": 32, LONG: 1}),
        "an unknown key 'xxx",
    ),
    "quantization mode is nested": hf(
        values("config.json", quantization={"bits": 4, "group_size": 32, "mode": NESTED}),
        "quantization mode is [[[",
    ),
    "quant_method is nested": hf(
        values("config.json", quantization_config={"quant_method": NESTED}), "quantized with [[["
    ),
    "torch_dtype is a list": Case(
        "hf", ("convert",), values("config.json", torch_dtype=["bfloat16"]), "is ['bfloat16'], ex"
    ),
    "torch_dtype is nested": Case(
        "hf", ("convert",), values("config.json", torch_dtype=NESTED), "torch_dtype is [[["
    ),
    "torch_dtype and dtype differ": Case(
        "hf", ("convert",), values("config.json", dtype="float16"), "'bfloat16' and 'flo"
    ),
}

PACKED = {
    "scales of infinity": Case(
        "community",
        ("load",),
        tensors(WHOLE, lambda t: t.update({"lm_head.scales": t["lm_head.scales"] * mx.inf})),
        "tensor 'lm_head.scales' holds NaN or infinity",
    ),
    "biases of NaN": Case(
        "community",
        ("load",),
        tensors(WHOLE, lambda t: t.update({"lm_head.biases": t["lm_head.biases"] * mx.nan})),
        "tensor 'lm_head.biases' holds NaN or infinity",
    ),
    "scales named as biases": packed(
        renamed("lm_head.biases", "lm_head.bias", WHOLE), "missing, first 'lm_head.biases'"
    ),
    "packed rows as signed": packed(
        entry(HEAD, WHOLE, dtype="I32"),
        f"tensor '{HEAD}' is I32 [1300, 16], config.json implies U32",
    ),
    "packed as twice as many": packed(
        entry(HEAD, WHOLE, dtype="U16", shape=[1300, 32]), f"tensor '{HEAD}' is U16 [1300, 32]"
    ),
    "an embedding of no rows": packed(
        tensors(
            WHOLE,
            lambda t: t.update({"model.embed_tokens.scales": t["model.embed_tokens.scales"][:0]}),
        ),
        "tensor 'model.embed_tokens.scales' is BF16 [0, 4], config.json implies",
    ),
    "other software's file": packed(
        lambda f: (f / WHOLE).rename(f / "weights.safetensors"), "but no model*.safetensors; fetch"
    ),
}

MISTRALS = {
    "params.json is a pipe": native(instead(PARAMS, os.mkfifo), "has no params.json"),
    "params.json is a folder": native(instead(PARAMS, Path.mkdir), "has no params.json"),
    "params.json has no end": native(
        instead(PARAMS, sparse(10**11)), "params.json has 100000000000 by"
    ),
    "params.json of 300,000": native(
        text(PARAMS, f'{{"a":[{many(300_000, "%d")}]}}'), "250000 are all"
    ),
    "config.json beside is a pipe": native(
        instead("config.json", os.mkfifo), "config.json cannot be read (it is no plain file)"
    ),
    "config.json beside has no end": native(
        instead("config.json", sparse(10**11)), "config.json has 100000000000 bytes"
    ),
    "config.json beside links to nothing": native(
        instead("config.json", link("gone")), "config.json cannot be read ("
    ),
    "config.json beside is empty": native(
        text("config.json", "{}"), "config.json: model_type is None"
    ),
    "consolidated file is a pipe": native(instead(NATIVE, os.mkfifo), f"has no {NATIVE}"),
    "consolidated file is a device": native(instead(NATIVE, link("/dev/zero")), f"has no {NATIVE}"),
    "layers of 4000 digits in params.json": native(
        values(PARAMS, n_layers=DIGITS), "num_hidden_layers"
    ),
    "dim is nested": native(values(PARAMS, dim=NESTED), "params.json: hidden_size is [[["),
    "no key/value heads": native(
        values(PARAMS, n_kv_heads=0), "params.json: num_key_value_heads is 0"
    ),
    "rope_theta as text": native(
        values(PARAMS, rope_theta="1e9"), "params.json: rope_theta is '1e9'"
    ),
    "quantized": native(
        values(PARAMS, quantization={"qformat_weight": "fp8_e4m3"}), "quantization"
    ),
    "Hugging Face's name": native(
        renamed("output.weight", HEAD, NATIVE), "lm_head.weight is missing"
    ),
    "a transposed matrix": native(
        entry("layers.0.feed_forward.w1.weight", NATIVE, shape=[128, 192]),
        "tensor 'layers.0.feed_forward.w1.weight' is BF16 [128, 192], params.json implies",
    ),
    "whole numbers": native(
        entry("norm.weight", NATIVE, dtype="I16"), "tensor 'norm.weight' is I16 [128], params.json"
    ),
}

CASES = FILES | HEADERS | INDEXES | CONFIGS | PACKED | MISTRALS
