"""How a model is called with a batch, and which tensors come out of one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from retrofit import RetrofitError
from retrofit.running.call_arguments import (
    Arguments,
    arguments_of,
    call_model,
    first_tensor,
    tensors,
)

X, Y, LABELS = torch.randn(6, 3, 4, 4), torch.randn(6, 2), torch.arange(6)


def model(forward):
    """A module with this forward."""
    return type("Model", (nn.Module,), {"forward": forward})()


def one(self, x): ...


def optional(self, x, mask=None): ...


def two(self, x, y): ...


def keywords(self, *, pixels, mask=None, **others): ...


def detector(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None): ...


def commented(self, images, targets=None):
    # type: (List[Tensor], Optional[List[Dict[str, Tensor]]]) -> List[Dict[str, Tensor]]
    """Annotated as torchvision's RetinaNet is."""


def all_optional(self, pixel_values=None, labels=None): ...


@pytest.mark.parametrize(
    ("forward", "batch", "args", "kwargs"),
    [
        (one, X, (X,), {}),
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
        (one, ["a", 1], "a batch of type list holds no tensor"),
        (one, (LABELS, X), r"the batches are torch.int64 of shape \(6,\)"),
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
