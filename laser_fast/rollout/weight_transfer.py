"""How weights reach a vLLM server: by NCCL between GPUs, or by files where there are none.

Both send pieces of at most `buffer_bytes` (or one larger tensor), so the sender never holds more
than one piece. NCCL is vLLM's own weight-transfer API: the server learns names and shapes over
HTTP while the tensors arrive by broadcast. vLLM moves no tensors between CPU processes; there its
workers reload a folder of safetensors.
"""

import os
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from laser_fast.config import ConfigError
from laser_fast.rollout.server_http import Http
from laser_fast.rollout.vllm import import_vllm

Weights = Iterable[tuple[str, Tensor]]


def pieces(weights: Weights, buffer_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive weights in lists of at most `buffer_bytes`, or of one larger tensor."""
    piece: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if piece and size + tensor.nbytes > buffer_bytes:
            yield piece
            piece, size = [], 0
        piece.append((name, tensor))
        size += tensor.nbytes
    if piece:
        yield piece


class FileTransfer:
    """Weights through a temporary folder that the server can read."""

    def __init__(self, http: Http, buffer_bytes: int) -> None:
        self._http, self._buffer_bytes = http, buffer_bytes

    def send(self, weights: Weights) -> None:
        """Write every piece to a file and let the server's workers load the folder."""
        with tempfile.TemporaryDirectory(prefix="laser-weights-") as folder:
            for number, piece in enumerate(pieces(weights, self._buffer_bytes)):
                # Copies, since a tied head shares its memory and safetensors refuses that.
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in piece}
                save_file(tensors, f"{folder}/model-{number:05d}.safetensors")
            call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            self._http.post("/collective_rpc", call)


class NcclTransfer:
    """Weights by NCCL broadcast from this process, rank 0, to every worker of the server."""

    def __init__(self, http: Http, buffer_bytes: int) -> None:
        # Without it, opening the group would wait minutes for workers that never come.
        server = http.get("/server_info?config_format=json")["vllm_config"]
        if not server["weight_transfer_config"]:
            raise ConfigError(
                "the server at rollout.server_url takes no weights by NCCL; start it with "
                """--weight-transfer-config '{"backend": "nccl"}'"""
            )
        self._http, self._buffer_bytes = http, buffer_bytes
        self._group: Any = None

    def send(self, weights: Weights) -> None:
        """Announce each piece over HTTP and broadcast it while the server receives."""
        if self._group is None:
            self._group = self._connect()
        self._http.post("/start_weight_update", attempts=1)
        for piece in pieces(weights, self._buffer_bytes):
            names, tensors = zip(*piece, strict=True)
            described = {
                "names": names,
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
            }
            with self._meanwhile("/update_weights", {"update_info": described}) as request:
                stream = torch.cuda.current_stream()
                for tensor in tensors:
                    self._group.broadcast(tensor.contiguous(), src=0, stream=stream)
                sent = torch.cuda.Event()
                sent.record(stream)
                while not sent.query():
                    if request.done():
                        request.result()  # after a failure there nobody receives: never wait here
                    time.sleep(1e-3)
        self._http.post("/finish_weight_update", attempts=1)

    def _connect(self) -> Any:
        """Open a group of this process and the server's workers, which wait for each other."""
        import_vllm()
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        with socket.socket() as probe:
            probe.bind(("", 0))
            meeting = {
                "master_address": os.environ.get("MASTER_ADDR", "127.0.0.1"),
                "master_port": probe.getsockname()[1],
                "world_size": 1 + self._http.get("/get_world_size")["world_size"],
            }
        theirs = meeting | {"rank_offset": 1, "packed": False}
        with self._meanwhile("/init_weight_transfer_engine", {"init_info": theirs}):
            return trainer_init(meeting)

    @contextmanager
    def _meanwhile(self, path: str, fields: dict[str, Any]) -> Iterator[Future[Any]]:
        """Post in the background: both sides meet inside the same NCCL calls."""
        pool = ThreadPoolExecutor(1)
        request = pool.submit(self._http.post, path, fields, attempts=1)
        pool.shutdown(wait=False)  # after a failure here the other side would wait forever
        try:
            yield request
        except Exception:
            if request.done():
                request.result()  # if the server failed, it says why
            raise
        request.result()
