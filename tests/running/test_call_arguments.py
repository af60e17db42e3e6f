"""How a model is called with a batch, and which tensors come out of one."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, List, NamedTuple, Optional, TypeVar  # noqa: UP035

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from retrofit import RetrofitError
from retrofit.running.call_arguments import (
    Arguments,
    arguments_of,
    call_model,
)
from retrofit.running.nested import first_tensor, tensors

X, Y, LABELS = torch.randn(6, 3, 4, 4), torch.randn(6, 2), torch.arange(6)


def model(forward):
    """A module with this forward."""
    return type("Model", (nn.Module,), {"forward": forward})()


def one(self, x): ...


def optional(self, x, mask=None): ...


def two(self, x, y): ...


def keywords(self, *, pixels, mask=None, **others): ...


def placed(self, x, y, /, *, scale): ...


def detector(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None): ...


def commented(self, images, targets=None):
    # type: (List[Tensor], Optional[List[Dict[str, Tensor]]]) -> List[Dict[str, Tensor]]
    """Annotated as torchvision's RetinaNet is."""


def all_optional(self, pixel_values=None, labels=None): ...


@pytest.mark.parametrize(
    ("forward", "batch", "args", "kwargs"),
    [
        (one, X, (X,), {}),
        (placed, (X, X, Y, LABELS), (X, X), {"scale": Y}),
        (placed, {"scale": Y, "y": X, "x": X, "label": 1}, (X, X), {"scale": Y}),
        (one, (X, LABELS), (X,), {}),
        (one, {"label": "a", "image": X}, (X,), {}),
        (one, {"x": X, "label": 1}, (), {"x": X}),
        (one, ["name", {"deep": [X]}], (X,), {}),
        (optional, (X, LABELS), (X,), {}),
        (optional, {"x": X, "mask": Y, "label": 1}, (), {"x": X, "mask": Y}),
        (two, (X, Y, LABELS), (X, Y), {}),
        (two, {"label": 1, "y": Y, "x": X}, (), {"x": X, "y": Y}),
        (keywords, {"pixels": X, "label": 1}, (), {"pixels": X}),
        (all_optional, {"pixel_values": X, "path": "a"}, (), {"pixel_values": X}),
        (all_optional, (X, LABELS), (X,), {}),
        (detector, ([X[0], X[1]], [{}, {}]), ([X[0], X[1]],), {}),
        (detector, [X[0], X[1]], ([X[0], X[1]],), {}),
        (detector, (X[:2], LABELS), ([X[0], X[1]],), {}),
        (commented, [X[0], X[1]], ([X[0], X[1]],), {}),
    ],
)
def test_a_model_is_called_as_its_signature_says(forward, batch, args, kwargs):
    found = arguments_of(model(forward), batch)
    torch.testing.assert_close(found.args, args, rtol=0, atol=0)
    torch.testing.assert_close(found.kwargs, kwargs, rtol=0, atol=0)


MAPS = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16)]
PICTURES = [torch.randn(3, 8, 8), torch.randn(3, 9, 5)]
TARGETS = [{"boxes": torch.randn(4, 4)}, {"boxes": torch.randn(1, 4)}]
KEYS = {"0": MAPS[0], "1": MAPS[1]}


def annotated(hint):
    """A convolutional model whose forward is annotated with `hint`, alone."""

    def forward(self, maps): ...

    forward.__annotations__ = {"maps": hint}
    made = model(forward)
    made.conv = nn.Conv2d(3, 4, 3)
    return made


LISTS = [
    list[Tensor],
    List[Tensor],  # noqa: UP006
    Sequence[Tensor],
    Iterable[Tensor],
    Optional[list[Tensor]],  # noqa: UP045
    list[Tensor] | None,
    Annotated[list[Tensor], "feature maps"],
    "list[Tensor]",
    "Optional[typing.List[Unknown]]",
    "'Sequence[Unknown] | None'",
    "Union[List[Unknown], Tuple[Unknown, ...]]",
    list,
]


@pytest.mark.parametrize("hint", LISTS, ids=str)
def test_a_model_annotated_to_take_a_list_gets_the_list(hint):
    for batch, expected in (
        (MAPS, MAPS),
        (tuple(MAPS), MAPS),
        ((MAPS, LABELS[:2]), MAPS),
        ([tuple(MAPS), LABELS[:2], "name"], MAPS),
        ({"maps": MAPS, "label": LABELS}, MAPS),
        ({"features": MAPS, "label": LABELS}, MAPS),
        (([MAPS[0]], LABELS[:2]), MAPS[:1]),
        (PICTURES, PICTURES),
        ((PICTURES, TARGETS), PICTURES),
        ([tuple(PICTURES), tuple(TARGETS)], PICTURES),
        (tuple(TARGETS), list(TARGETS)),
        (X, list(X)),
        ((X, LABELS), list(X)),
        ((X, TARGETS), list(X)),
    ):
        found = arguments_of(annotated(hint), batch)
        (value,) = found.args or found.kwargs.values()
        assert type(value) in (list, type(expected))
        assert len(value) == len(expected)
        torch.testing.assert_close(list(value), list(expected), rtol=0, atol=0)


def test_so_does_one_annotated_to_take_a_tuple_or_a_mapping():
    for hint in (tuple[Tensor, Tensor], "Tuple[Unknown, ...]"):
        assert arguments_of(annotated(hint), MAPS).args == (tuple(MAPS),)
        assert arguments_of(annotated(hint), (MAPS, LABELS)).args == (tuple(MAPS),)
    for hint in (dict[str, Tensor], Mapping[str, Tensor], "Dict[str, Unknown]", OrderedDict):
        for batch in (KEYS, (KEYS, LABELS), {"maps": KEYS, "label": 1}):
            found = arguments_of(annotated(hint), batch)
            assert (*found.args, *found.kwargs.values()) == (KEYS,)
    assert arguments_of(annotated(dict[str, Tensor]), {"maps": X}).args == ({"maps": X},)


class Maps(NamedTuple):
    near: Tensor
    far: Tensor


def test_an_annotation_that_is_none_of_these_tells_nothing():
    for hint in (Maps, TypeVar("T")):
        assert arguments_of(annotated(hint), (X, LABELS)).args == (X,)


def test_a_graph_that_was_made_for_nested_arguments_takes_the_first_tensor():
    def summed(self, given):  # noqa: ARG001
        return given["a"] + given["b"]

    placed = {"given": {"a": torch.fx.PH, "b": torch.fx.PH}}
    graph = torch.fx.symbolic_trace(model(summed), placed)
    assert arguments_of(graph, (X, LABELS)).args == (X,)
    assert torch.equal(call_model(graph, {"given": {"a": X, "b": X}}, None), 2 * X)


def test_one_that_takes_a_tensor_or_a_list_gets_what_can_only_be_meant():
    either = annotated(Tensor | list[Tensor])
    assert arguments_of(either, X).args == (X,)
    assert arguments_of(either, (X, LABELS)).args == (X,)
    assert arguments_of(either, (MAPS, LABELS)).args == (MAPS,)


@pytest.mark.parametrize(
    ("hint", "batch", "words"),
    [
        (list[Tensor], [*MAPS, LABELS], "take a list, and which that is in a batch of [float32 (2"),
        (list[Tensor], [MAPS[0]], "give batches of (inputs, labels), with the inputs in one item"),
        (list[Tensor], [MAPS[0], torch.randn(2, 5)], "or pass forward_fn="),
        (Tensor | list[Tensor], MAPS, "Model is annotated to take a list or a tensor, and which"),
        (Tensor | dict[str, Tensor], KEYS, "take a mapping or a tensor"),
        (tuple[Tensor, Tensor], X, "take a tuple, and which that is in a batch of float32 (6, 3,"),
        (dict[str, Tensor], MAPS, "take a mapping"),
        (list[Tensor], (torch.ones(1, 8, 8), {"boxes": X}), "[float32 (1, 8, 8), a dict] cannot"),
        (list[Tensor], (PICTURES[0], {"boxes": X}), "a single picture of shape (3, 8, 8)"),
        (list[Tensor], (PICTURES[0], 3), "a single picture of shape (3, 8, 8)"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused_with_the_way_out(hint, batch, words):
    with pytest.raises(RetrofitError) as refused:
        arguments_of(annotated(hint), batch)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("layer", "shapes", "images"),
    [
        (nn.Conv1d(3, 4, 3), [(2, 3, 9), (2, 3, 5), (2, 3, 7)], 2),
        (nn.Conv1d(3, 4, 3), [(3, 9), (3, 5), (3, 7)], 3),
        (nn.Conv2d(3, 4, 3), [(3, 9, 9), (3, 5, 5), (3, 7, 7)], 3),
        (nn.Conv3d(3, 4, 3), [(3, 9, 9, 9), (3, 5, 5, 5), (3, 7, 7, 7)], 3),
        (nn.Conv3d(3, 4, 3), [(2, 3, 9, 9, 9), (2, 3, 5, 5, 5)], 2),
        (nn.Linear(3, 4), [(2, 3), (2, 3), (2, 3)], 2),
    ],
)
def test_samples_in_a_list_are_counted_by_what_the_layers_take(layer, shapes, images):
    taking = model(detector)
    taking.layer = layer
    found = arguments_of(taking, [torch.randn(shape) for shape in shapes])
    assert found.images == images
    (half,) = found.head(1).args
    assert [tuple(x.shape) for x in half] == (
        [(1, *shape[1:]) for shape in shapes] if images == 2 else shapes[:1]
    )


def test_tokens_go_to_a_model_that_embeds_them():
    reader = nn.Sequential(nn.Embedding(9, 3), nn.Conv1d(3, 4, 3))
    assert arguments_of(reader, (torch.ones(2, 5, dtype=torch.int64), LABELS)).images == 2


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.DataParallel(AveragedModel(m)),
    ],
    ids=["DataParallel", "AveragedModel", "compiled", "twice"],
)
def test_a_wrapper_is_called_as_what_it_holds(wrap):
    assert arguments_of(wrap(model(two)), (X, Y, LABELS)).args == (X, Y)
    assert len(arguments_of(wrap(model(detector)), X).args[0]) == 6


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_traced_model_takes_the_first_tensor():
    traced = torch.jit.trace(nn.ReLU(), X)
    assert torch.equal(call_model(traced, (X, LABELS), None), X.relu())


@pytest.mark.parametrize(
    ("forward", "batch", "message"),
    [
        (two, X, "Model takes x and y: give batches that are tuples"),
        (two, (X,), "Model takes x and y"),
        (two, {"x": X, "z": Y}, r"pass forward_fn="),
        (one, ["a", 1], "a batch of type list holds no tensor, but the name of a file"),
        (one, [3, 1], "a batch of type list holds no tensor: pass forward_fn= to say how"),
        (
            one,
            (LABELS, X),
            r"begins with int64 \(6,\), labels it seems, and float32 \(6, 3, 4, 4\)",
        ),
        (one, LABELS, r"the batches are torch.int64 of shape \(6,\): convert them to float"),
    ],
)
def test_a_batch_that_lacks_what_the_model_takes_is_refused(forward, batch, message):
    with pytest.raises(RetrofitError, match=message):
        arguments_of(model(forward), batch)


def test_samples_are_counted_and_cut_wherever_they_lie():
    pictures = [torch.randn(3, 8, 8), torch.randn(3, 9, 5), torch.randn(3, 7, 7)]
    targets = [{"boxes": torch.randn(4, 4)} for _ in pictures]
    scale = torch.tensor(2.0)
    for arguments, images, head in (
        (Arguments((X, scale), {"y": {"z": Y}}), 6, Arguments((X[:2], scale), {"y": {"z": Y[:2]}})),
        (Arguments((), {"x": X, "n": 3}), 6, Arguments((), {"x": X[:2], "n": 3})),
        (Arguments((pictures, targets), {}), 3, Arguments((pictures[:2], targets[:2]), {})),
    ):
        assert arguments.images == images
        torch.testing.assert_close(tuple(arguments.head(2)), tuple(head), rtol=0, atol=0)
        assert arguments.head(None) is arguments
        assert arguments.head(images) is arguments


def test_a_list_of_feature_maps_is_no_list_of_pictures():
    maps = [torch.randn(3, 8, size, size) for size in (8, 4, 2)]
    assert Arguments(([m[:2] for m in maps],), {}).images == 2
    (levels,) = Arguments((maps,), {}).head(2).args
    assert [tuple(m.shape) for m in levels] == [(2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 2, 2)]


def test_the_model_gets_copies_to_write_to():
    batch = {"input": X.clone()}
    assert (call_model(nn.ReLU(inplace=True), batch, None) >= 0).all()
    assert torch.equal(batch["input"], X)


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    loss: Tensor | None = None


def test_tensors_are_found_by_name_in_every_kind_of_output():
    value = [Output(X, [Y, Y]), {"out": SimpleNamespace(boxes=LABELS, name="a")}, (X, None, 3)]
    assert {name: id(tensor) for name, tensor in tensors(value, "output").items()} == {
        "output[0].logits": id(X),
        "output[0].hidden[0]": id(Y),
        "output[0].hidden[1]": id(Y),
        "output[1]['out'].boxes": id(LABELS),
        "output[2][0]": id(X),
    }


def test_an_object_that_holds_itself_is_walked_once():
    node = SimpleNamespace(x=X)
    node.parent, node.list = node, [node]
    assert list(tensors(node, "output")) == ["output.x"]


def test_a_model_or_a_class_is_no_place_to_look_for_tensors():
    assert first_tensor([nn.Linear(2, 2), Output, "a", 1.0]) is None


def test_an_annotation_may_be_any_text():
    class Described(nn.Module):
        def forward(self, x: "a batch of pictures"):  # noqa: F722
            return x

    assert arguments_of(Described(), X).args[0] is X


@pytest.mark.parametrize(
    ("layers", "batch", "message"),
    [
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], X[0], r"of shape \(3, 4, 4\) has no batch axis"),
        ([nn.Conv2d(3, 4, 3)], X.permute(0, 2, 3, 1), r"has its channels last: permute it"),
    ],
)
def test_a_batch_that_a_forward_fn_passes_on_is_explained(layers, batch, message):
    with pytest.raises(RetrofitError, match=message):
        call_model(nn.Sequential(*layers).eval(), batch, lambda net, x: net(x))


@pytest.mark.parametrize(
    ("net", "batch"),
    [(nn.Sequential(nn.Conv2d(3, 4, 3)), ["a.png"]), (nn.Flatten(3), LABELS)],
    ids=["no tensor", "no weights"],
)
def test_what_fails_for_reasons_of_its_own_keeps_its_error(net, batch):
    def failing(net, batch):
        net(batch)

    with pytest.raises((TypeError, IndexError)) as raised:
        call_model(net, batch, failing)
    assert not isinstance(raised.value, RetrofitError)
