"""Where things are in the converted model, in the native layout."""

from __future__ import annotations

from torch import nn

from retrofit.layers import child_name


class Layout:
    """Module paths and state dict keys of the original model to those of the converted one."""

    def __init__(self, model: nn.Module, hosts: set[str], renumbered: tuple[str, ...]) -> None:
        every = list(model.named_modules(remove_duplicate=False))
        followed = {id(model.get_submodule(path)) for path in hosts}
        growing = {id(model.get_submodule(path)) for path in renumbered}
        # For each path of a host: its name in the Sequential that may take its place.
        self.hosts = {p: child_name(module) for p, module in every if id(module) in followed}
        # For each path of a renumbered Sequential: old names of its children to new ones.
        self.moves: dict[str, dict[str, str]] = {}
        for path, module in every:
            if id(module) in growing:
                shift, self.moves[path] = 0, {}
                for name, child in module._modules.items():
                    self.moves[path][name] = str(int(name) + shift)
                    shift += id(child) in followed

    def new_path(self, old: str) -> str:
        new, parent = [], ""
        for name in old.split("."):
            path = f"{parent}.{name}" if parent else name
            new.append(self.moves.get(parent, {}).get(name, name))
            if path in self.hosts and parent not in self.moves:
                new.append(self.hosts[path])
            parent = path
        return ".".join(new)

    def norm_path(self, host: str) -> str:
        parent, _, name = self.new_path(host).rpartition(".")
        own = str(int(name) + 1) if host.rpartition(".")[0] in self.moves else "bn"
        return f"{parent}.{own}".lstrip(".")

    def new_key(self, key: str) -> str:
        module, _, tensor = key.rpartition(".")
        return f"{self.new_path(module)}.{tensor}".lstrip(".")
