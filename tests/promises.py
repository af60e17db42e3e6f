"""Everything that is promised, checked of one network; see `networks`."""

import copy
import warnings

import pytest
import torch
from networks import SUBCLASSES, Drawn, is_convolution
from normed_networks import shuffled, trained
from torch import nn
from torch.utils._pytree import tree_leaves

import retrofit
from retrofit.surgery.affine_map import batchnorms
from retrofit.surgery.record import attach

OPTIONS = [
    {"renumber": None},
    {"renumber": ""},
    {"linear": True},
    {"placement": "post_activation"},
    {"include": "*"},
    {"layout": "graph"},
    {"layout": "graph", "placement": "post_activation", "linear": True},
]


def check(drawn: Drawn, options):
    """Everything that is promised, of one network."""
    model, shape, training = drawn
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)

    def batch(n):
        return torch.randn(n, *shape, generator=generator, dtype=dtype)

    data = [batch(5), batch(3)]
    before, state = everything(model), copy.deepcopy(model.state_dict())

    plan, prepared, options = calibrated(model, data, options)
    consistent(plan, model)
    converted = retrofit.convert(prepared)
    assert everything(model) == before

    # The outputs are those of the original, also for batches that were not seen.
    original, plain = copy.deepcopy(model).eval(), copy.deepcopy(converted).eval()
    with torch.no_grad():
        for x in (*data, batch(1)):
            ours, theirs = tree_leaves(plain(x)), tree_leaves(original(x))
            assert len(ours) == len(theirs)
            assert all(map(torch.equal, ours, theirs))
    assert retrofit.verify(model, converted, data).exact

    # A checkpoint of the original loads through the key map.
    new = converted.state_dict()
    assert all(torch.equal(state[old], new[key]) for old, key in plan.key_map.items())
    empty = heard(retrofit.insert, model, plan)
    mapped = {key: torch.zeros_like(state[old]) for old, key in plan.key_map.items()}
    missing, unexpected = empty.load_state_dict(mapped, strict=False)
    assert not unexpected
    owners = {id(empty.get_submodule(key.rpartition(".")[0])) for key in missing}
    assert owners <= {id(empty.get_submodule(site.norm)) for site in plan.inserted}

    folded = heard(retrofit.fold, converted, plan).state_dict()
    assert folded.keys() == plan.key_map.keys()
    assert all(torch.equal(state[key], value) for key, value in folded.items())
    if "include" not in options:  # which asks for what is normalised already, too
        assert retrofit.plan(converted, example=data[0], **options).inserted == ()

    assert converted.training == training
    trains(converted, data[0])


def check_round_trip(drawn: Drawn) -> int:
    """Folded, a network comes back in its own class; tells how many BatchNorms did."""
    _, shape, as_module = drawn
    dtype = next(drawn.model.parameters()).dtype
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    model = with_batchnorms(drawn.model, x)
    there = batchnorms(model)
    if not there:
        return 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*BatchNorms stay|nothing was folded")
        folded = retrofit.fold(copy.deepcopy(model).eval(), example=x)
    left = batchnorms(folded)
    if len(left) == len(there):
        return 0
    architecture = shuffled(model)
    if any(isinstance(norm, SUBCLASSES) and path not in left for path, norm in there.items()):
        with pytest.raises(retrofit.RetrofitError, match="does not compute"):
            retrofit.restore(architecture, folded, [x], example=x, progress=False)
        return 0
    before = everything(architecture)
    given = folded if as_module else folded.state_dict()
    result = retrofit.restore(architecture, given, [x], example=x, progress=False)
    assert everything(architecture) == before
    found = retrofit.restoration_of(result)
    fresh = shuffled(model)
    fresh.load_state_dict(result.state_dict(), strict=True)
    with torch.no_grad():
        pairs = zip(tree_leaves(fresh.eval()(x)), tree_leaves(folded(x)), strict=True)
        close = [bool((a - b).abs().max() <= 1e-5 * b.abs().max()) for a, b in pairs]
    # Where a norm divides by next to nothing, the folded network's own rounding is larger.
    assert found.worst.relative <= 1e-5 if found.outputs_jump else all(close)
    assert found.kept == tuple(left)
    assert len(found.seats) == len(there) - len(left)
    trains(result, x)
    return len(found.seats)


def with_batchnorms(model, x):
    """A network of trained BatchNorms after all convolutions that can have one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no BatchNorm is added|.*frozen")
        model = retrofit.insert(model, retrofit.plan(model, example=x))
    attach(model, None)
    return trained(model)


def planned(model, x, options):
    """The plan; without a layout or renumbering that this network cannot have, and that is then
    refused by name."""
    try:
        return retrofit.plan(model, example=x, **options), options
    except retrofit.RetrofitError as error:
        layout, text = options.get("layout"), str(error)
        assert text.startswith("torch.fx cannot trace") if layout else "renumber" in text, text
        return retrofit.plan(model, example=x), {}


def calibrated(model, data, options):
    """Plan and prepared model; without the layers that calibration refuses by name, as it asks."""
    plan, options = planned(model, data[0], options)
    while True:
        prepared = heard(retrofit.prepare, model, plan)
        try:
            retrofit.calibrate(prepared, data, progress=False)
        except retrofit.RetrofitError as error:
            path, _, text = str(error).partition(" ")
            excluded = options.get("exclude", [])
            if path in excluded or not text.startswith("returns a tensor that is neither"):
                raise
            options = options | {"exclude": [*excluded, path]}
            plan = retrofit.plan(model, example=data[0], **options)
        else:
            return plan, prepared, options


def heard(act, model, plan):
    """What `act` makes by the plan; it warns where it does nothing, or adds what cannot learn."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = act(model, plan)
    said = " ".join(str(warning.message) for warning in seen)
    nothing = any(text in said for text in ("no BatchNorm is added", "nothing was folded", " stay"))
    assert nothing == (not plan.inserted), said
    frozen = any(site.frozen for site in plan.inserted) and act is not retrofit.fold
    assert ("frozen" in said) == frozen, said
    return made


def consistent(plan, model):
    """Every convolution has one decision, a reason, and keys of its own."""
    sites = {site.path: site for site in plan.sites}
    assert len(sites) == len(plan.sites)
    modules = {id(m) for m in model.modules() if is_convolution(m)}
    planned = [model.get_submodule(p) for p in sites if "@" not in p and is_module(model, p)]
    assert {id(m) for m in planned if is_convolution(m)} == modules
    assert all(site.reason for site in plan.sites)
    norms = [site.norm for site in plan.inserted]
    assert len(set(norms)) == len(norms)
    state = model.state_dict()
    assert plan.key_map.keys() == state.keys() or plan.layout == "graph"
    assert plan.key_map.keys() <= state.keys()
    assert len(set(plan.key_map.values())) == len(plan.key_map)
    for site in plan.inserted:
        if is_module(model, site.path):
            layer = model.get_submodule(site.path)
            width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            assert site.channels == width


def is_module(model, path):
    return path in dict(model.named_modules(remove_duplicate=False))


def everything(model):
    """What must not change of a model, so that it can be compared."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(n, id(t), t.data_ptr(), t._version, t.requires_grad, t.stride()) for n, t in tensors],
        [(name, t.detach().numpy().tobytes()) for name, t in tensors],
        [(n, id(m), m.training, list(m._forward_hooks)) for n, m in model.named_modules()],
        [list(m._forward_pre_hooks) + list(m._backward_hooks) for m in model.modules()],
    )


def trains(model, x):
    """In train mode every gradient is there and finite."""
    model.train()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return
    sum(y.square().mean() for y in tree_leaves(model(x))).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
