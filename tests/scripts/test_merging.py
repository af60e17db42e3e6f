"""scripts/merging.py: channels find their partners, and get the moments between."""

import itertools
from pathlib import Path

import merging
import page_blocks
import pytest
import torch

import retrofit
from retrofit import demo

pytestmark = pytest.mark.slow

SECOND = Path(__file__).parents[2] / "notebooks" / "vgg-cifar10-1.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.unpack(folder)
    return demo.labelled(folder / "calibration")[0][:256].split(64)


def shuffled(model, seed=0):
    """The same function, its channels in another order, written without the code under test."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    names = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    for name, following in itertools.pairwise(names):
        order = torch.randperm(len(state[f"{name}.bias"]), generator=generator)
        for key in (f"{name}.weight", f"{name}.bias"):
            state[key] = state[key][order]
        state[f"{following}.weight"] = state[f"{following}.weight"][:, order]
    copy = demo.trained_vgg()
    copy.load_state_dict(state)
    return copy


def test_channels_in_another_order_find_their_partners(images):
    one = demo.trained_vgg()
    other = shuffled(one)
    assert not torch.equal(one.features[0].weight, other.features[0].weight)
    found = merging.aligned(one, other, images).state_dict()
    for key, value in one.state_dict().items():
        assert torch.equal(found[key], value), key


def test_the_average_of_a_network_and_itself_is_repaired_to_itself(images):
    one = demo.trained_vgg()
    repaired = merging.matched(one, one, images)
    with torch.no_grad():
        torch.testing.assert_close(repaired(images[0]), one(images[0]), rtol=1e-3, atol=1e-3)


def test_matched_channels_have_the_mean_and_standard_deviation_between_the_two(images):
    one, other = demo.trained_vgg(), demo.trained_vgg()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    merged = merging.matched(one, other, images, share=0.25)
    seen = {}
    second = {one: "features.2", other: "features.2", merged: "features.4"}  # there the BatchNorm
    for model, path in second.items():
        layer = model.get_submodule(path)
        layer.register_forward_hook(lambda _l, _x, y, model=model: seen.update({model: y.double()}))
        with torch.no_grad():
            model(torch.cat(images))
    for figure in (torch.mean, torch.std):
        a, b, found = (figure(y, (0, 2, 3)) for y in seen.values())
        torch.testing.assert_close(found, 0.75 * a + 0.25 * b, rtol=0.02, atol=0.01)


def test_the_table_says_how_much_of_the_loss_came_back():
    curves = {"a": [0.9, 0.2, 0.8], "b": [0.9, 0.45, 0.8], "c": [0.9, 0.75, 0.8]}
    table = merging.table(curves, shares=(0.0, 0.5, 1.0))
    assert "| c | 75.00% |" in table
    assert "brings back 75% of the loss" in table


def test_the_code_of_its_page_makes_a_plain_network_that_knows_more_than_the_average(images):
    (block,) = page_blocks.blocks("docs/merging.md")
    one, other = demo.trained_vgg(), merging.network(SECOND)
    names = {
        "retrofit": retrofit,
        "aligned": merging.aligned,
        "averaged": merging.averaged,
        "images": images,
        "one": one,
        "other": other,
    }
    exec(block.code, names)  # noqa: S102
    plain, average = names["plain"].eval(), names["average"]
    assert plain.state_dict().keys() == one.state_dict().keys()
    x = torch.cat(images)
    with torch.no_grad():
        answers = one(x).argmax(1)
        agreed = [float((m(x).argmax(1) == answers).float().mean()) for m in (average, plain)]
    assert agreed[0] + 0.05 < agreed[1]
