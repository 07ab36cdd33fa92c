"""The layout of a conversion's files."""

from dataclasses import replace

import pytest

from magistral_mlx.convert.recipe.layout import divide, in_order, make_plan
from magistral_mlx.convert.recipe.options import ConvertOptions
from tests.support.tiny import make_config

WIDE = make_config(hidden_size=128, intermediate_size=384, head_dim=64, vocab_size=1500)


def test_magistral_small_in_4_bit_is_13_gb_in_a_file_for_each_layer() -> None:
    small = make_config(
        hidden_size=5120,
        intermediate_size=32768,
        num_layers=40,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=131072,
    )
    plan = make_plan(small, "bfloat16", ConvertOptions())
    assert plan.num_parameters == 23_572_403_200
    assert plan.tensor_bytes == pytest.approx(13.26e9, rel=1e-3)
    assert [shard.file for shard in plan.shards] == [
        f"model-{i:05}-of-00042.safetensors" for i in range(1, 43)
    ]
    assert [list(shard.sources) for shard in plan.shards] == in_order(small)
    assert [name for shard in plan.shards for name in shard.sources] == list(small.shapes)
    tied = replace(small, tie_word_embeddings=True)
    last = make_plan(tied, "bfloat16", ConvertOptions()).shards[-1]
    assert last.sources == ("model.norm.weight", "model.embed_tokens.weight")


def test_files_keep_the_order_and_the_limit() -> None:
    units = [("a", 3), ("b", 3), ("c", 9), ("d", 1), ("e", 6)]
    assert divide(units, limit=7) == [["a", "b"], ["c"], ["d", "e"]]
    plan = make_plan(WIDE, "bfloat16", ConvertOptions(), max_bytes=100_000)
    assert len(plan.shards) > 2
    for shard in plan.shards:
        assert (
            list(shard.sources) in in_order(WIDE)
            or sum(e.nbytes for e in shard.entries.values()) <= 100_000
        )
        assert all(
            {f"{s.removesuffix('.weight')}.weight"} <= set(shard.entries) for s in shard.sources
        )
    assert set(plan.index()["weight_map"].values()) == {shard.file for shard in plan.shards}
