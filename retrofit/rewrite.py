"""Put a module after each site of a model, replace it, take it out again.

Modules are found by identity, so that one registered under several names changes under each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.layers import dims, is_conv
from retrofit.plans import Plan, Site


def put_after_sites(
    model: nn.Module, plan: Plan, make: Callable[[Site, nn.Module], nn.Module]
) -> None:
    """Insert `make(site, conv)` after every site, in the layout of the plan, in place.

    Raises RetrofitError when the plan is not one of this model.
    """
    convs: dict[nn.Module, nn.Module] = {}
    for site in plan.inserted:
        conv = _find(model, site.path)
        shape = (site.channels, site.dims)
        if conv is None or not is_conv(conv) or _shape(conv) != shape:
            raise RetrofitError(
                f"the plan does not fit this {type(model).__name__}: {site.path} is not a "
                f"{site.kind} with {site.channels} output channels; plan this model anew"
            )
        convs[conv] = make(site, conv)
    growing = {_find(model, path) for path in plan.renumbered}
    if not all(isinstance(module, nn.Sequential) for module in growing):
        raise RetrofitError(
            f"the plan does not fit this {type(model).__name__}: not all of "
            f"{', '.join(plan.renumbered)} are nn.Sequentials; plan this model anew"
        )
    wrappers: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        if parent in growing:
            children: list[nn.Module] = []
            for child in parent._modules.values():
                if child is not None:
                    children += [child, convs[child]] if child in convs else [child]
            _set_children(parent, children)
        else:
            for name, child in parent._modules.items():
                if child in convs:
                    parent._modules[name] = wrappers.setdefault(child, _wrap(child, convs[child]))
    for site in plan.inserted:
        conv, norm = find_site(model, site)
        if convs.get(conv) is not norm:
            raise RetrofitError(
                f"the plan does not fit this {type(model).__name__}: {site.norm} is not the place "
                f"after {site.path}; plan this model anew"
            )


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they are registered, in place."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]


def take_out(model: nn.Module, plan: Plan) -> None:
    """Undo `put_after_sites`: remove what was inserted, leave the containers as they were."""
    norms = {find_site(model, site)[1] for site in plan.inserted}
    wrappers = {
        module: module.get_submodule("conv")
        for module in model.modules()
        if list(module._modules) == ["conv", "bn"] and module.bn in norms
    }
    for parent in list(model.modules()):
        children = [child for child in parent._modules.values() if child is not None]
        if parent not in wrappers and not norms.isdisjoint(children):
            _set_children(parent, [child for child in children if child not in norms])
    replace(model, wrappers)


def find_site(model: nn.Module, site: Site) -> tuple[nn.Module, nn.Module]:
    """The convolution of `site` in a converted model, and what was inserted after it.

    Raises RetrofitError when the model has lost them.
    """
    conv, norm = _find(model, site.conv), _find(model, site.norm)
    if norm is None or conv is None:
        raise RetrofitError(
            f"the plan does not fit this {type(model).__name__}: it has no "
            f"{site.norm if norm is None else site.conv}, the place of {site.path} "
            "(was the model changed after the conversion?)"
        )
    return conv, norm


def _shape(conv: nn.Module) -> tuple[int, int]:
    """Output channels and spatial axes."""
    return int(conv.out_channels), dims(conv)  # type: ignore[arg-type]


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _wrap(conv: nn.Module, norm: nn.Module) -> nn.Sequential:
    wrapper = nn.Sequential()
    wrapper.add_module("conv", conv)
    wrapper.add_module("bn", norm)
    wrapper.training = conv.training
    return wrapper


def _set_children(sequential: nn.Module, children: list[nn.Module]) -> None:
    sequential._modules.clear()
    sequential._modules.update({str(i): child for i, child in enumerate(children)})
