"""Engines of vLLM on the CPU, in the environment of ``make test-vllm``."""

import os

# The engine in the test's own process, where it can be watched; threads that spin on two cores take minutes.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
)


def pytest_configure(config):
    """Warnings of vLLM's and of what it imports are theirs."""
    config.addinivalue_line("filterwarnings", "default")
