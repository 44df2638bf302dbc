"""Named calls of `pooled_attention`, for its tests and its benchmarks."""

from seerattention.ops._shapes import Shape

CASES = (
    Shape(name="one-token", heads=4, kv_heads=2, queries=1, keys=1, head_dim=64),
    Shape(name="below-block", heads=4, kv_heads=2, queries=63, keys=63, head_dim=64),
    Shape(name="one-block", heads=4, kv_heads=2, queries=64, keys=64, head_dim=64),
    Shape(name="block-plus-one", heads=4, kv_heads=2, queries=65, keys=65, head_dim=64),
    Shape(name="thousand", heads=4, kv_heads=2, queries=1000, keys=1000, head_dim=64),
    Shape(name="batch", heads=6, kv_heads=2, queries=200, keys=200, head_dim=80, batch=3),
    Shape(name="no-groups", heads=3, kv_heads=3, queries=200, keys=200, head_dim=96),
    Shape(name="wide-128", heads=4, kv_heads=1, queries=190, keys=190, head_dim=128),
    Shape(name="wide-256", heads=2, kv_heads=1, queries=150, keys=150, head_dim=256),
    Shape(name="later-chunk", heads=4, kv_heads=2, queries=100, keys=420, head_dim=64),
    Shape(name="last-token", heads=4, kv_heads=2, queries=1, keys=500, head_dim=64),
    Shape(name="wide-rows", heads=4, kv_heads=2, queries=300, keys=300, head_dim=64, block_size=(128, 64)),
    Shape(name="small-blocks", heads=4, kv_heads=2, queries=90, keys=90, head_dim=64, block_size=(8, 16)),
    Shape(name="teacher-8k", heads=6, kv_heads=2, queries=8192, keys=8192, head_dim=64, large=True),
    Shape(name="teacher-16k", heads=6, kv_heads=2, queries=16384, keys=16384, head_dim=64, large=True),
    Shape(name="llama-8b-32k", heads=32, kv_heads=8, queries=32768, keys=32768, head_dim=128, large=True),
)
