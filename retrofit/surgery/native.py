"""Put a module after each site of a model, replace it, take it out again; where things are then.

In the native layout modules are found by identity, so that one registered under several names
changes under each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace as changed

from torch import fx, nn

from retrofit.errors import RetrofitError
from retrofit.plans import Plan, Site
from retrofit.surgery import graph
from retrofit.tracing.operations import channels, child_name, dims, is_activation, is_affine

Make = Callable[[Site, nn.Module | None], nn.Module]


def put_after_sites(model: nn.Module, plan: Plan, make: Make) -> nn.Module:
    """Insert `make(site, layer)` after every site, in the layout of the plan.

    It is in train mode if both the layer and the module around it are. (The mode of a convolution
    alone says little.)

    Returns the model, which the native layout changes in place; the graph layout makes a
    GraphModule over the same modules, in which the layer of a site is None for a function.

    Raises RetrofitError when the plan is not one of this model.
    """
    if plan.layout == "graph":
        module = graph.graph_module(model)
        graph.put_after_sites(module, plan, make)
        return module
    _put_after_modules(model, plan, make)
    return model


def _put_after_modules(model: nn.Module, plan: Plan, make: Make) -> None:
    hosts = [_host(model, site) for site in plan.inserted]
    growing = {_find(model, path) for path in plan.renumbered}
    if not all(isinstance(module, nn.Sequential) for module in growing):
        raise _misfit(
            model, f"not all of {', '.join(plan.renumbered)} are nn.Sequentials; plan it anew"
        )
    sites = dict(zip(hosts, plan.inserted, strict=True))
    made = {host: make(site, _find(model, site.path)) for host, site in sites.items()}
    seated = {_seat(model, site): made[host] for host, site in sites.items() if site.seat}
    beside = {host: norm for host, norm in made.items() if not sites[host].seat}
    wrappers: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for inner in parent.children():
            if inner in made:
                made[inner].train(parent.training and inner.training)
        if parent in growing:
            children: list[nn.Module] = []
            for child in parent._modules.values():
                if child is not None:
                    children += [child, beside[child]] if child in beside else [child]
            _set_children(parent, children)
        else:
            for name, child in parent._modules.items():
                if child in beside:
                    wrapper = wrappers.setdefault(child, _wrap(child, beside[child], sites[child]))
                    parent._modules[name] = wrapper
    replace(model, seated)
    for host, site in sites.items():
        layer, norm = find_site(model, site)
        if norm is not made[host] or _shape(layer) != (site.channels, site.dims):
            raise _misfit(
                model, f"{site.norm} is not the place after {site.path}; plan this model anew"
            )


def _host(model: nn.Module, site: Site) -> nn.Module:
    """Find what the BatchNorm of `site` comes after: the layer or its activation."""
    layer, host = _find(model, site.path), _find(model, site.host)
    if layer is None or _shape(layer) != (site.channels, site.dims):
        raise _misfit(
            model,
            f"{site.path} is not a {site.kind} with {site.channels} output channels; plan this "
            "model anew",
        )
    if not site.host or host is None or not (host is layer or is_activation(host)):
        raise _misfit(
            model,
            f"there is no place after {site.path}; to ask for one, plan with include= rather "
            "than editing the plan",
        )
    return host


def _seat(model: nn.Module, site: Site) -> nn.Module:
    """Find the nn.Identity whose place the BatchNorm of `site` takes."""
    seat = _find(model, site.seat)
    if type(seat) is not nn.Identity:
        raise _misfit(model, f"{site.seat} is no nn.Identity; plan this model anew")
    return seat


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they are registered, in place."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]


def take_out(model: nn.Module, plan: Plan) -> dict[nn.Module, nn.Module]:
    """Undo `put_after_sites`, in place: what was inserted is gone, the containers as they were.

    Returns what stands for each module that is gone, where the model holds it in a list, say.
    """
    if isinstance(model, fx.GraphModule) and plan.layout == "graph":
        graph.take_out(model, plan)
        return {}
    found = {site: find_site(model, site)[1] for site in plan.inserted}
    norms = {norm for site, norm in found.items() if not site.seat}
    wrappers: dict[nn.Module, nn.Module] = {
        module: next(module.children())
        for module in model.modules()
        if isinstance(module, nn.Sequential)
        and list(module._modules)[1:] == ["bn"]
        and module.bn in norms
    }
    for parent in list(model.modules()):
        children = [child for child in parent._modules.values() if child is not None]
        if parent not in wrappers and not norms.isdisjoint(children):
            _set_children(parent, [child for child in children if child not in norms])
    seats = {n: nn.Identity().train(n.training) for site, n in found.items() if site.seat}
    replace(model, wrappers | seats)
    return {norm: nn.Identity() for norm in norms} | seats | wrappers


def find_site(model: nn.Module, site: Site) -> tuple[nn.Module | None, nn.Module]:
    """Find the layer of `site` in a converted model, None for a function, and what was inserted.

    Raises RetrofitError when the model has lost them.
    """
    layer, norm = _find(model, site.layer), _find(model, site.norm)
    if norm is None or layer is None or not site.norm:
        raise _misfit(
            model,
            f"it has no {site.norm if norm is None else site.layer}, the place of {site.path} "
            "(was the model changed after the conversion?)",
        )
    return layer if site.layer else None, norm


def _misfit(model: nn.Module, reason: str) -> RetrofitError:
    return RetrofitError(f"the plan does not fit this {type(model).__name__}: {reason}")


def _shape(layer: nn.Module | None) -> tuple[int, int] | None:
    """Give output channels and spatial axes; None for what is no layer with channels."""
    if layer is None or not is_affine(layer):
        return None
    return channels(layer), dims(layer)


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _wrap(host: nn.Module, norm: nn.Module, site: Site) -> nn.Sequential:
    wrapper = nn.Sequential()
    for name in site.forwarded:
        if hasattr(host, name):
            setattr(wrapper, name, getattr(host, name))
    wrapper.add_module(child_name(host), host)
    wrapper.add_module("bn", norm)
    wrapper.training = norm.training
    return wrapper


def _set_children(sequential: nn.Module, children: list[nn.Module]) -> None:
    sequential._modules.clear()
    sequential._modules.update({str(i): child for i, child in enumerate(children)})


class Places:
    """Where modules and tensors of the original model are in the converted one."""

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
        """Give the path in the converted model of the module that was at `old`."""
        new, parent = [], ""
        for name in old.split("."):
            path = f"{parent}.{name}" if parent else name
            new.append(self.moves.get(parent, {}).get(name, name))
            if path in self.hosts and parent not in self.moves:
                new.append(self.hosts[path])
            parent = path
        return ".".join(new)

    def placed(self, site: Site) -> Site:
        """Give `site` with the paths of its layer and its BatchNorm."""
        norm = self.new_path(site.seat) if site.seat else self._norm_path(site.host)
        return changed(site, layer=self.new_path(site.path), norm=norm)

    def _norm_path(self, host: str) -> str:
        """Give the path of the BatchNorm after the module that was at `host`."""
        parent, _, name = self.new_path(host).rpartition(".")
        own = str(int(name) + 1) if host.rpartition(".")[0] in self.moves else "bn"
        return f"{parent}.{own}".lstrip(".")

    def new_key(self, key: str) -> str:
        """Give the state dict key of the tensor that was at `key`."""
        module, _, tensor = key.rpartition(".")
        return f"{self.new_path(module)}.{tensor}".lstrip(".")
