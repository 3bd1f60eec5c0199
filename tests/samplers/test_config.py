"""Options that make no sense are refused where they are given."""

from __future__ import annotations

from typing import Any

import pytest

from kdlib.samplers import RolloutConfig
from kdlib.types import SamplingParams


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "trt"}, "choose hf, vllm or server"),
        ({"engine": "server"}, "needs rollout.url"),
        ({"url": "http://127.0.0.1:1"}, "rollout.url is for rollout.engine server, not hf"),
        ({"engine": "server", "url": "http://127.0.0.1:1", "transfer": "files"}, "needs rollout.transfer_dir"),
        ({"transfer": "mpi"}, "choose nccl or files"),
        ({"sleep": True}, "rollout.sleep is for rollout.engine vllm"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"max_model_len": -1}, "max_model_len must be at least 1"),
        ({"sync_tolerance": 0.0}, "sync_tolerance must be above 0"),
        ({"timeout": -1.0}, "timeout must be above 0"),
        ({"gpu_memory_utilization": 1.5}, "is a part of 1"),
        ({"group_port": 70000}, "not a port"),
        ({"top_p": 0.0}, "top_p is above 0"),
        ({"temperature": -1.0}, "temperature and top_k are 0 or more"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**options)


def test_params_carry_what_was_chosen() -> None:
    config = RolloutConfig(temperature=0.7, top_k=20, top_p=0.9)
    expected = SamplingParams(max_tokens=5, temperature=0.7, top_k=20, top_p=0.9, stop_ids=(2, 3))
    assert config.params(5, [2, 3]) == expected
    assert RolloutConfig().params(5) == SamplingParams(max_tokens=5)


def test_every_option_is_documented() -> None:
    assert RolloutConfig.__doc__ is not None
    for name in RolloutConfig.__dataclass_fields__:
        assert f"\n        {name}: " in RolloutConfig.__doc__
