"""What changes in vLLM: an attention backend's class, and a look at settings before an engine starts."""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from typing import Any

from seerattention.hosts.vllm.settings import KEY, Settings
from seerattention.hosts.vllm.support import BACKENDS, VERSIONS, refusals

#: By whether the engine plans a pass before it knows the last one's tokens.
ALIGNED = {
    False: "seerattention.hosts.vllm.scheduler.AlignedScheduler",
    True: "seerattention.hosts.vllm.scheduler.AlignedAsyncScheduler",
}


def register() -> None:
    """Take the place of vLLM's backends, and refuse settings that cannot be served."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.version import __version__

    device, create = current_platform.device_type, EngineArgs.create_engine_config
    if hasattr(create, KEY):
        return

    @functools.wraps(create)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        settings = Settings.of(config)
        if settings is not None:
            if reasons := refusals(config, settings, __version__, device):
                raise NotImplementedError("; ".join(reasons))
            from seerattention.hosts.vllm.choice import choice_of

            # Where it ran a model of transformers' before, in this process, the model's class asks for it.
            with set_current_vllm_config(config):
                choice_of(config, settings, check_base=settings.check_base)
            if settings.aligned:
                scheduler = config.scheduler_config
                scheduler.scheduler_cls = ALIGNED[bool(scheduler.async_scheduling)]
        return config

    setattr(checked, KEY, True)
    EngineArgs.create_engine_config = checked
    if __version__ in VERSIONS.get(device, ()):
        # By their own names: the CPU's platform takes no other, and CUDA's chooses among these.
        for name, backend in BACKENDS[device].items():
            register_backend(AttentionBackendEnum[name], backend)
