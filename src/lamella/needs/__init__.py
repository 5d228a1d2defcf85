"""What a command needs, memory and time, before any work.

The command itself runs, on tensors that have a shape and no values: nothing is computed, and no weights are loaded.
What the tensors would take is counted as they come and go, and the time of each operation is predicted from its
arithmetic, the bytes that it moves, and the speed of this machine.

    with recording() as needs:
        model = without_values(model)
        model(torch.zeros(1, 512, dtype=torch.long))
    needs.peak, needs.seconds

Numbers that are read from such a tensor, such as a loss, are placeholders: 1, and true. A search takes some path and a
sampled answer has its full length, so the result is what the command needs in a typical run and not what it decides.
"""

from lamella.needs.disk import memory_map
from lamella.needs.machine import MachineSpeed, free_memory, peak_used_memory, used_memory
from lamella.needs.recorder import Recorder, TimeLimit, current_recorder, extrapolate, now, recording
from lamella.needs.result import Needs, StageNeeds, gigabytes
from lamella.needs.tensors import has_values, without_values

__all__ = [
    "MachineSpeed",
    "Needs",
    "Recorder",
    "StageNeeds",
    "TimeLimit",
    "current_recorder",
    "extrapolate",
    "free_memory",
    "gigabytes",
    "has_values",
    "memory_map",
    "now",
    "peak_used_memory",
    "recording",
    "used_memory",
    "without_values",
]
