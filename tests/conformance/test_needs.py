"""Estimates of every command: it goes through on tensors without values, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from worlds import COMMANDS, given, opened, usual

from lamella.runner import needs_of
from lamella.stack import Stack

ENDS_EARLY = {  # what a placeholder stops, which docs/estimates.md names or a nano model causes
    "cola": "its search finds no correct answer",
    "cstrl": "importances are written and read again",
    "cstrl gaps": "importances are written and read again",
    "gamma-mod": "routing is read from the model",
    "iformer heal": "a network is compared with its original",
    "pre-rmsnorm": "norms are inspected",
    "skippipe profile": "stages are timed one by one",
    "ssd": "importances are written and read again",
}


@pytest.mark.parametrize("command", [pytest.param(each, marks=pytest.mark.repeated) for each in COMMANDS])
def test_a_command_is_recorded_to_its_end(command: str) -> None:
    entry, model = COMMANDS[command], opened(usual(command))
    before = {name: each.clone() for name, each in model.model.state_dict().items()}
    needs = needs_of(entry.slug, command=entry.name, allow_pickle=True, **given(command, usual(command)))
    assert bool(needs.cut) == (command in ENDS_EARLY), needs.cut
    takes_a_stack = next((Stack in each.kinds for each in entry.signature.inputs.values()), False)
    if takes_a_stack and command not in ENDS_EARLY:
        assert needs.weights > 0 and needs.peak >= needs.weights and needs.seconds > 0
    assert all(torch.equal(before[name], each) for name, each in model.model.state_dict().items())
