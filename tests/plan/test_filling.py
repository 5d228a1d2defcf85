"""Networks with the weights of a file: refused before they take memory that the file does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lamella.errors import CheckpointError
from lamella.plan.filling import load_network


def network(width: int = 4) -> nn.Module:
    made = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    made.register_buffer("scale", torch.full((width,), 2.0), persistent=False)
    return made


def test_it_has_the_weights_of_the_file_and_what_no_file_holds(tmp_path: Path) -> None:
    whole = network()
    whole(torch.randn(8, 3))  # so that its norm has counted
    save_file(whole.state_dict(), tmp_path / "weights")
    read = load_network(network, tmp_path / "weights")
    assert not read.training and torch.equal(read.get_buffer("scale"), torch.full((4,), 2.0))
    assert all(torch.equal(each, read.state_dict()[name]) for name, each in whole.state_dict().items())


def test_other_sizes_are_refused_before_they_are_made(tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"0\.weight is \[4, 3\] where the network has \[1000000000000, 3\]"):
        load_network(lambda: network(10**12), tmp_path / "weights")


@pytest.mark.parametrize(("change", "message"), [("more", "has nothing"), ("less", "is missing")])
def test_tensors_that_are_missing_or_too_many_are_named(tmp_path: Path, change: str, message: str) -> None:
    state = network().state_dict()
    if change == "more":
        state["other"] = torch.zeros(1)
    else:
        del state["0.bias"]
    save_file(state, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=message):
        load_network(network, tmp_path / "weights")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        load_network(network, tmp_path / "weights")


def test_of_tied_parameters_one_is_enough(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        made[1].weight = made[0].weight
        return made

    state = tied().state_dict()
    del state["1.weight"]
    save_file(state, tmp_path / "weights")
    read = load_network(tied, tmp_path / "weights")
    assert torch.equal(read[1].weight, state["0.weight"]) and read[1].weight is read[0].weight  # type: ignore[index]
    del state["0.weight"]
    save_file(state, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"0\.weight is missing, and 1 more"):
        load_network(tied, tmp_path / "weights")


def test_a_batch_norm_needs_its_statistics_and_not_the_count_that_older_files_lack(tmp_path: Path) -> None:
    state = network().state_dict()
    del state["1.num_batches_tracked"]
    save_file(state, tmp_path / "weights")
    assert load_network(network, tmp_path / "weights")[1].num_batches_tracked == 0  # type: ignore[index]
    del state["1.running_mean"]
    save_file(state, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"1\.running_mean is missing"):
        load_network(network, tmp_path / "weights")
