"""Weights on their way to a server: their pieces, and a broadcast that nobody receives."""

import threading
from types import SimpleNamespace

import pytest
import torch

from laser_fast.config import ConfigError
from laser_fast.rollout.server_http import ServerError
from laser_fast.rollout.vllm_server import NcclTransfer, pieces


def nccl_transfer(server, client):
    server.pages["/server_info?config_format=json"] = (
        200,
        '{"vllm_config": {"weight_transfer_config": {"backend": "nccl"}}}',
    )
    return NcclTransfer(client, 1024)


def test_a_server_without_weight_transfer_is_refused_at_once(scripted):
    server, client = scripted
    server.pages["/server_info?config_format=json"] = (
        200,
        '{"vllm_config": {"weight_transfer_config": null}}',
    )
    with pytest.raises(ConfigError, match="start it with --weight-transfer-config"):
        NcclTransfer(client, 1024)


def test_a_broadcast_that_nobody_receives_ends_with_the_servers_error(scripted, monkeypatch):
    server, client = scripted
    transfer = nccl_transfer(server, client)
    broadcast = []
    transfer._group = SimpleNamespace(broadcast=lambda tensor, **_: broadcast.append(tensor))
    stream = SimpleNamespace(synchronize=threading.Event().wait)  # never comes
    event = SimpleNamespace(record=lambda stream: None, query=lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    server.replies = [(200, "{}"), (500, "no such parameter")]
    with pytest.raises(ServerError, match="update_weights did not answer.*no such parameter"):
        transfer.send([("w", torch.zeros(1))])
    assert len(broadcast) == 1


def test_a_group_that_cannot_be_opened_ends_with_the_servers_error(scripted):
    server, client = scripted
    transfer = nccl_transfer(server, client)
    server.replies = [(500, "no NCCL")]
    with (
        pytest.raises(ServerError, match="no NCCL"),
        transfer._meanwhile("/init_weight_transfer_engine", {}) as request,
    ):
        request.exception(5)
        raise TimeoutError("the store waited for workers")
    server.replies = [("late", "")]
    with (
        pytest.raises(TimeoutError, match="the store"),
        transfer._meanwhile("/init_weight_transfer_engine", {}),
    ):
        raise TimeoutError("the store waited for workers")


def test_pieces_hold_at_most_the_buffer_or_one_large_tensor():
    sizes = [3, 4, 9, 1, 1, 1]
    weights = [(str(i), torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    found = [[name for name, _ in piece] for piece in pieces(weights, 8)]
    assert found == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert list(pieces([], 8)) == []
