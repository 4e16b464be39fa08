"""Torchrun's variables, and what a device computes in."""

import pytest
import torch

import model
from evaluate import UserError
from support import distributed
from support.distributed import Ranks, compute_dtype, pick_device

TWO = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1234")


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables): set these of torchrun's variables, and no other."""

    def set_variables(**variables):
        for name in distributed.TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "1234"},
        TWO | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    ],
)
def test_one_process(environment, variables):
    environment(**variables)
    ranks = Ranks("cpu")
    assert (ranks.rank, ranks.world_size, ranks.distributed) == (0, 1, False)


def test_torchruns_variables(environment):
    environment(**TWO)
    assert distributed.torchrun_ranks() == (1, 2, 1)
    environment(**TWO | {"RANK": "9", "WORLD_SIZE": "16"})  # on the second of two machines
    assert distributed.torchrun_ranks() == (9, 16, 1)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {name: value for name, value in TWO.items() if name != "MASTER_ADDR"},
        TWO | {"WORLD_SIZE": ""},
    ],
)
def test_variables_that_torchrun_would_not_set(environment, variables):
    environment(**variables)
    with pytest.raises(
        UserError, match="in the environment: can't be read.*torchrun, or unset them"
    ):
        Ranks("cpu")


@pytest.mark.parametrize("capability, bf16", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_without_bfloat16_computes_in_float32(monkeypatch, capability, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    device = pick_device("auto")
    assert device.type == "cuda"
    assert compute_dtype(device) == (torch.bfloat16 if bf16 else torch.float32)
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *_, enabled: asked.append(enabled))
    model.bf16_on_cuda(device)
    assert asked == [bf16]


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_cpu_computes_in_float32_and_another_device_is_refused(name):
    assert compute_dtype(pick_device("cpu")) == torch.float32
    with pytest.raises(UserError, match=f"--device {name}: can't be read .*; try auto or cpu"):
        pick_device(name)
