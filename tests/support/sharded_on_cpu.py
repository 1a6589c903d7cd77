"""The command line in a process of `accelerate launch` that cuts models up on the CPU.

accelerate does that on GPUs only. PyTorch's FSDP2 and gloo do it on a CPU as well, so the process is told
what accelerate would find on a GPU; everything after that is the shipped configuration's own way.
"""

import sys

from accelerate import state
from accelerate.utils import FullyShardedDataParallelPlugin
from dualedit.cli import main

_plain = state.AcceleratorState.__init__


def _sharded(self, *args, **kwargs):
    _plain(self, *args, **kwargs)
    if self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.FSDP
        self.fsdp_plugin = FullyShardedDataParallelPlugin()  # as fsdp.yaml has it, by the environment


if __name__ == "__main__":
    state.AcceleratorState.__init__ = _sharded
    sys.exit(main(sys.argv[1:]))
