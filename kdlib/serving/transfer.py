"""New weights for a running vLLM server: through files that both sides see, or from GPU to GPU."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from kdlib.serving.client import ServerClient
from kdlib.serving.errors import ServerRefusedError

if TYPE_CHECKING:
    from trl.generation.vllm_client import VLLMClient

_GROUP_BYTES = 2**30  # tensors announced and sent together


class Transfer(Protocol):
    """A way for weights to reach a server."""

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the server's weights."""
        ...

    def close(self) -> None:
        """Removes what was left for the next time."""
        ...


class FileTransfer:
    """Safetensors in ``directory``, which the server (on CPU or GPU) sees too; it is started with VLLM_SERVER_DEV_MODE=1.

    The newest weights stay, because the server now has their path as its model's; older ones are removed.
    """

    def __init__(self, client: ServerClient, directory: str | os.PathLike[str]) -> None:
        self.client, self.directory = client, Path(directory).absolute()
        self._newest: Path | None = None

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Writes model.safetensors whole or not at all, then has every worker of the server read it."""
        path = self.directory / f"weights-{uuid.uuid4().hex}"
        partial = path.with_name(path.name + ".partial")
        partial.mkdir(parents=True)
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        os.replace(partial, path)
        _dev(self.client, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})
        forget_prefixes(self.client)
        if self._newest is not None:
            shutil.rmtree(self._newest)
        self._newest = path

    def close(self) -> None:
        """Keeps the newest weights."""


class NCCLTransfer:
    """Broadcast over NCCL by TRL's VLLMClient, for trainers and servers on GPUs of one network.

    The server is started with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "nccl"}', and vLLM is installed
    beside the trainer too. ValueError on machines without CUDA.
    """

    def __init__(self, client: ServerClient, *, group_port: int) -> None:
        if not torch.cuda.is_available():
            raise ValueError(
                "rollout.transfer nccl needs a CUDA device here: set rollout.transfer files, and rollout.transfer_dir to a "
                "directory that the server sees too"
            )
        self.client, self.group_port = client, group_port
        self._joined: VLLMClient | None = None

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Joins the server's group on first use, then sends the tensors in groups of about 1 GiB."""
        joined = self._join()
        with joined.weight_update():
            for group in _groups(weights):
                described = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in group]
                joined.update_named_params(described, iter(group))
        forget_prefixes(self.client)

    def _join(self) -> Any:
        if self._joined is None:
            from trl.generation.vllm_client import VLLMClient

            self._joined = VLLMClient(base_url=self.client.urls[0], group_port=self.group_port)
            self._joined.init_communicator(device=torch.cuda.current_device())
        return self._joined

    def close(self) -> None:
        """Leaves the group."""
        if self._joined is not None:
            self._joined.close_communicator()


def forget_prefixes(client: ServerClient) -> None:
    """Empties the server's prefix cache, whose keys and values come from the old weights."""
    if not _dev(client, "/reset_prefix_cache", {}).json()["success"]:
        raise RuntimeError(
            f"the server at {client.name} keeps cached prefixes of the old weights while it answers others: "
            "give the run a server of its own"
        )


def _dev(client: ServerClient, path: str, payload: dict[str, Any]) -> Any:
    """POST to an endpoint that vLLM has in development mode only."""
    try:
        return client.post(path, payload)
    except ServerRefusedError as error:
        if error.status != 404:
            raise
        raise ValueError(
            f"the server at {client.name} has no {path}, through which it gets new weights: restart it with "
            "VLLM_SERVER_DEV_MODE=1 in its environment (and keep it unreachable from outside)"
        ) from error


def _groups(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    group: list[tuple[str, Tensor]] = []
    for name, tensor in weights:
        group.append((name, tensor.contiguous()))
        if sum(x.nbytes for _, x in group) >= _GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group
