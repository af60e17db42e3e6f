"""How many operations of torch something takes: counts, which no machine changes."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts what torch is asked for in the block."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function] += 1
        return function(*args, **(kwargs or {}))


def operations(run, *args):
    with Operations() as counted:
        run(*args)
    return counted.found.total()
