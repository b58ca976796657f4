"""How a stage starts and runs: its settings, its launch, the processes beside it.

config: one dataclass a stage. flags: what a flag is, and those that stages share. refused: flags that are not. cli: how
they are read. launch: device, precision, process group. distributed: what ranks do together. watchdog: names a process
that hangs. parcel: tensors that travel together. log: metrics.jsonl and memory.
"""
