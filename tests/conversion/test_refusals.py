"""What cannot be done in Python is refused by name; the command line's are in test_bad_requests."""

from pathlib import Path

import nets
import pytest
import torch
from PIL import Image
from torch import nn

import retrofit
from retrofit import RetrofitError

X, LABELS = nets.images(8, 3, 16, 16), torch.arange(8)
GREY = X[:, :1]
PICTURE = Image.new("RGB", (16, 16))


def converted(net=nets.root_sequential):
    return retrofit.add_batchnorm(nets.build(net), [X], progress=False)


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, y):
        return self.conv(x).relu() + self.conv(y).relu()


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(1024, 5)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: list[torch.Tensor]):
        return self.conv(torch.stack([image - torch.ones(3, 1, 1) for image in images]))


def video():
    return nn.Sequential(nn.Conv3d(3, 4, 3))


def prepared_elsewhere():
    prepared = retrofit.prepare(nets.build(nets.root_sequential))
    retrofit.calibrate(prepared, [X], progress=False)
    prepared[0].bn = nn.Identity()
    return prepared


def graph_plan_of_another():
    plan = retrofit.plan(nets.build(nets.Residual), layout="graph")
    return retrofit.insert(nets.build(nets.root_sequential), plan)


def folded_with_another_norm():
    model = converted()
    model[0].bn = nn.GroupNorm(1, model[0].conv.out_channels)
    return retrofit.fold(model)


REFUSED = [
    (lambda: retrofit.plan("vgg16"), "plan takes an nn.Module, not a str"),
    (
        lambda: retrofit.calibrate(prepared_elsewhere(), 3),
        "must be an iterable of batches, not int",
    ),
    (lambda: retrofit.convert(prepared_elsewhere()), "0.bn is no observer"),
    (graph_plan_of_another, "it has no place after"),
    (folded_with_another_norm, "after 0 comes a GroupNorm, not a BatchNorm"),
    (
        lambda: retrofit.drift(converted(), converted(), [X], [0]),
        "must be positive and a whole number, not 0",
    ),
    (lambda: retrofit.drift(converted(), converted(), [X, X[..., 1:]]), "several sizes"),
    (lambda: retrofit.drift(Pairs(), Pairs(), [(X, X)]), "Pairs takes more than one tensor"),
    (lambda: retrofit.verify(nn.Sequential(), converted(), [X]), "a Sequential, has no 0"),
    (lambda: retrofit.fold("vgg16"), "nn.Module, not a str"),
    # --- what is no model, plan or prepared model ---
    (lambda: add("vgg16", [X]), "add_batchnorm takes an nn.Module, not a str"),
    (lambda: add([X], net()), "add_batchnorm takes an nn.Module, not a list"),
    (lambda: retrofit.verify(net(), [X], [X]), "verify takes an nn.Module, not a list"),
    (lambda: retrofit.drift(net(), X, [X]), "drift takes an nn.Module, not a Tensor"),
    (lambda: retrofit.recalibrate([X], net()), "recalibrate takes an nn.Module, not a list"),
    (lambda: retrofit.prepare("vgg16"), "prepare takes an nn.Module, not a str"),
    (
        lambda: retrofit.prepare(net(), [X]),
        "second argument of prepare is a plan, as plan(model) makes it, not a list; data goes to",
    ),
    (lambda: retrofit.insert(net(), "plan.json"), "second argument of insert is a plan"),
    (lambda: retrofit.convert(net()), "convert takes a model made by prepare, and this Sequential"),
    (lambda: retrofit.calibrate(net(), [X]), "call prepared = retrofit.prepare(model) first"),
    # --- options of the wrong type ---
    (lambda: add(net(), [X], max_images="100"), "max_images must be positive and a whole number, "),
    (lambda: add(net(), [X], max_images=2.5), "a whole number, not 2.5"),
    (lambda: add(net(), [X], max_images=True), "a whole number, not True"),
    (lambda: add(net(), [X], tolerance="2%"), "between 0 and 1 (0.02: 2 %), not '2%'"),
    (lambda: add(net(), [X], tolerance=True), "between 0 and 1 (0.02: 2 %), not True"),
    (lambda: add(net(), [X], device="gpu"), 'torch calls its devices "cpu", "cuda", "cuda:1"'),
    (lambda: add(net(), [X], device=1.5), "device 1.5 cannot be used here: torch calls"),
    (lambda: add(net(), [X], eps="1e-5"), "eps must be positive, not '1e-5'"),
    (lambda: retrofit.insert(net(), eps=0), "eps must be positive, not 0"),
    (lambda: add(net(), [X], momentum="0.1"), "momentum must lie between 0 and 1, or be None for"),
    (lambda: add(net(), [X], momentum=2), "momentum must lie between 0 and 1, or be None for a"),
    (lambda: retrofit.recalibrate(converted(), [X], prior="64"), "from 0 up, not '64'"),
    (lambda: retrofit.drift(net(), net(), [X], 8), "batch_sizes must be a list such as [8, 32]"),
    (lambda: retrofit.drift(net(), net(), [X], ["8"]), "a whole number, not '8'"),
    (lambda: retrofit.drift(net(), net(), [X], []), "batch_sizes names no size: give some"),
    (lambda: add(net(), [X], forward_fn="x"), "must be a function, called as forward_fn(model, ba"),
    (lambda: retrofit.plan(net(), forward_fn=3), "forward_fn must be a function"),
    (lambda: retrofit.verify(net(), net(), [X], forward_fn="x"), "forward_fn must be a function"),
    (lambda: calibrated(forward_fn="x"), "forward_fn must be a function"),
    (lambda: retrofit.recalibrate(converted(), [X], forward_fn=X), "forward_fn must be a function"),
    (lambda: calibrated(state=3), "state must be the path of a file, not 3"),
    (lambda: calibrated(state=True), "state must be the path of a file, not True"),
    (lambda: calibrated(progress="no"), "progress must be True or False, not 'no'"),
    (lambda: calibrated(process_group="world"), "must be a group of torch.distributed, such as it"),
    (lambda: retrofit.recalibrate(converted(), [X], layerwise="no"), "layerwise must be True or F"),
    (lambda: retrofit.plan(net(), linear="no"), "linear must be True or False, not 'no'"),
    (lambda: add(net(), [X], inplace="no"), "inplace must be True or False, not 'no'"),
    (lambda: add(net(), [X], skip_unused=None), "skip_unused must be True or False, not None"),
    (lambda: retrofit.convert(prepared(), share_storage=1), "share_storage must be True or False"),
    (lambda: retrofit.convert(prepared(), match=[X]), "what channel_moments gives, not a list"),
    (
        lambda: retrofit.convert(prepared(), match={"0": 3}),
        "0 has no pair of a mean and a variance",
    ),
    (lambda: retrofit.channel_moments("vgg16"), "channel_moments takes an nn.Module, not a str"),
    (lambda: same().passed("0.1"), "tolerance must be a number from 0 up, not '0.1'"),
    (lambda: same().passed(float("nan")), "tolerance must be a number from 0 up, not nan"),
    (lambda: calibrated().images_needed("2%"), "tolerance must be positive, not '2%'"),
    (lambda: calibrated().images_needed(0), "tolerance must be positive, not 0"),
    (lambda: retrofit.save(net(), 3), "with path: int, model: Sequential"),
    (lambda: retrofit.save("vgg16", "vgg16.pth"), "with path: str, model: str"),
    (lambda: retrofit.save(net(), "n.pth", overwrite="no"), "overwrite must be True or False"),
    (lambda: retrofit.save(net(), "n.safetensors", name=3), "name= cannot be stored"),
    (lambda: retrofit.save(net(), "n.safetensors", drift=1), "drift= cannot be stored"),
    (
        lambda: retrofit.save(net(), "n.safetensors", verification=True),
        "verification= cannot be stored",
    ),
    (lambda: retrofit.load(3), "with path: int, model: Module"),
    (lambda: retrofit.load("n.pth", "vgg16"), "with path: str, model: str"),
    (lambda: retrofit.load("n.pth", weights_key=0), "weights_key must be a string, not 0"),
    # --- what is no iterable of batches ---
    (lambda: add(net(), "pictures"), "not str: a DataLoader over torchvision.datasets.ImageFolder"),
    (lambda: add(net(), Path("pictures")), "must be an iterable of batches, not PosixPath"),
    (lambda: add(net(), {"image": X}), "not dict: of one batch make a list, [batch]"),
    (lambda: add(net(), X.numpy()), "data is one numpy array of shape (8, 3, 16, 16)"),
    (lambda: retrofit.verify(net(), net(), net()), "not Sequential: the data comes after the mod"),
    (lambda: add(net(), used_up()), "no data: this generator is used up, or was empty; it can be"),
    (lambda: retrofit.verify(net(), net(), used_up()), "no data: this generator is used up"),
    (lambda: retrofit.drift(net(), net(), used_up()), "no data: this generator is used up"),
    (lambda: retrofit.recalibrate(converted(), used_up()), "no data: this generator is used up"),
    (lambda: retrofit.calibrate(retrofit.prepare(net()), used_up()), "this generator is used up"),
    # --- batches that are none ---
    (lambda: add(net(), Samples(X)), "single picture of shape (3, 16, 16), without a batch axis"),
    (lambda: retrofit.verify(net(), net(), Samples(X)), "DataLoader(dataset, batch_size=32)"),
    (lambda: retrofit.drift(net(), net(), list(X)), "without a batch axis"),
    (lambda: retrofit.recalibrate(converted(), Samples(X)), "add the axis with x.unsqueeze(0)"),
    (lambda: add(net(), [X.numpy()]), "a batch is a numpy array, or holds one: make a tensor of"),
    (lambda: add(net(), [(X.numpy(), LABELS)]), "torch.from_numpy(x).float(), of shape (N, C, H"),
    (lambda: add(net(), [PICTURE]), "a batch is a picture of PIL, or holds some: give the data"),
    (lambda: add(net(), [(PICTURE, 3)]), "transform that makes tensors of them"),
    (lambda: add(net(), ["a.png", "b.png"]), "the name of a file, it seems: read it first"),
    (lambda: add(net(), [(LABELS, X)]), "a batch begins with int64 (8,), labels it seems, and flo"),
    (lambda: add(net(), [(LABELS.float(), X)]), "give batches of (images, labels)"),
    (lambda: add(net(), [(X * 255).byte()]), "are torch.uint8 of shape (8, 3, 16, 16): convert th"),
    (lambda: add(net(), [{"image": (X * 255).byte()}]), "convert them to float and normalise"),
    (lambda: add(Named(), [{"pixels": (X * 255).byte()}]), "the batches are torch.uint8 of shape"),
    (lambda: add(net().half(), [X]), "the batches are torch.float32, the model torch.float16"),
    (lambda: retrofit.verify(net(), net(), [X.double()]), "as by batch.to(torch.float32)"),
    (
        lambda: retrofit.verify(net(), net(), [X.to("meta")], forward_fn=as_list),
        "the batches are on meta, the model on cpu: move either",
    ),
    (lambda: add(net(), [X.permute(0, 2, 3, 1)]), "has its channels last: permute it"),
    (lambda: add(net(), [None]), "a batch is None: there is nothing in it; look at what the data"),
    (lambda: add(net(), [X, None]), "a batch is None: there is nothing in it"),
    (lambda: retrofit.verify(net(), net(), [[]]), "a batch is []: there is nothing in it"),
    (
        lambda: add(net(), [[(PICTURE, 3), (PICTURE, 2)]]),
        "a batch is a picture of PIL, or holds so",
    ),
    (lambda: add(net(), [{"image": [PICTURE]}]), "a batch is a picture of PIL, or holds some"),
    (lambda: add(net(), [[[X[0].numpy()]]]), "a batch is a numpy array, or holds one"),
    # --- other axes than the model takes ---
    (
        lambda: add(net(), [GREY]),
        "0 takes (N, 3, H, W), and gets (8, 1, 16, 16) of a batch of floa",
    ),
    (lambda: add(net(), [X, GREY]), "0.conv takes (N, 3, H, W), and gets (8, 1, 16, 16)"),
    (lambda: retrofit.verify(net(), converted(), [GREY]), "0 takes (N, 3, H, W), and gets (8, 1, "),
    (
        lambda: retrofit.recalibrate(converted(), [GREY], progress=False),
        "0.conv takes (N, 3, H, W)",
    ),
    (
        lambda: retrofit.drift(net(), converted(), [GREY]),
        "0 takes (N, 3, H, W), and gets (8, 1, 16",
    ),
    (lambda: retrofit.calibrate(prepared(), [X[None]], progress=False), "gets (1, 8, 3, 16, 16)"),
    (
        lambda: retrofit.verify(net(), net(), [X[:, 0, 0]]),
        "takes (N, 3, H, W), and gets (8, 16) of",
    ),
    (lambda: retrofit.verify(video(), video(), [X]), "0 takes (N, 3, D, H, W), and gets (8, 3, 16"),
    (
        lambda: retrofit.verify(net(), net(), [X[:, 0]]),
        "0 takes (N, 3, H, W), and gets (8, 16, 16)",
    ),
    (
        lambda: retrofit.verify(Detector(), Detector(), [[X[0, :2]]]),
        "pictures (3, H, W), and gets (2, 1",
    ),
    (
        lambda: retrofit.verify(Flat(), Flat(), [X[..., 1:]]),
        "head takes (..., 1024), and gets (8, 960) of a batch of float32 (8, 3, 16, 15): give b",
    ),
]


def net():
    return nets.build(nets.root_sequential)


def add(model, data, **options):
    return retrofit.add_batchnorm(model, data, progress=False, **options)


def as_list(model, x):
    return model(x).tolist()


def prepared():
    return retrofit.prepare(net())


def calibrated(**options):
    return retrofit.calibrate(prepared(), [X], **{"progress": False, **options})


def same():
    return retrofit.verify(net(), net(), [X])


def used_up():
    batches = (x for x in [X])
    list(batches)
    return batches


class Samples(torch.utils.data.Dataset):
    """One picture and its label at a time, as in torchvision.datasets."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, pixels):
        return self.body(pixels)


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(call, words):
    with pytest.raises(RetrofitError) as refused:
        call()
    assert words in str(refused.value)


def test_networks_that_could_never_be_trained_are_not_made():
    model, prepared = nets.build(nets.root_sequential), prepared_elsewhere()
    with torch.inference_mode():
        for act in (retrofit.prepare, retrofit.insert, retrofit.fold):
            with pytest.raises(RetrofitError, match=r"inference_mode\(\) can never be trained"):
                act(model)
        with pytest.raises(RetrofitError, match="can never be trained"):
            retrofit.convert(prepared)


class Kept(nn.Sequential):
    """A frozen teacher, say, which is shared by what is copied."""

    def __deepcopy__(self, memo):
        return self


def test_a_part_that_does_not_copy_is_named_and_left_as_it_is():
    model = nn.Sequential(Kept(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3), nn.ReLU())
    handle = model[0].register_forward_hook(lambda *_: None)
    text = str(model)
    with pytest.raises(RetrofitError, match=r"^0 of this Sequential cannot be copied"):
        retrofit.add_batchnorm(model, [X], progress=False)
    assert model[0].training
    assert handle.id in model[0]._forward_hooks
    assert str(model) == text


def test_a_model_that_does_not_copy_is_left_as_it_is():
    model = Kept(nn.Conv2d(3, 4, 3), nn.ReLU())
    text = str(model)
    with pytest.raises(RetrofitError, match=r"^a Kept cannot be copied"):
        retrofit.plan(model)
    assert model.training
    assert str(model) == text


def test_data_of_too_large_a_variance_is_told_with_its_channel():
    with pytest.raises(
        RetrofitError, match=r"^0: .* channel 0 are not finite in float32 .*, varia"
    ):
        retrofit.add_batchnorm(net(), [X * 1e20], progress=False)


class Connected(nn.Sequential):
    """As one that holds a connection, and refuses as a whole."""

    def __deepcopy__(self, memo):
        raise TypeError("connected")


def test_a_model_that_refuses_to_be_copied_is_named_with_its_own_reason():
    with pytest.raises(RetrofitError, match=r"^this Connected cannot be copied: connected$"):
        retrofit.plan(Connected(nn.Conv2d(3, 4, 3), nn.ReLU()))


def test_a_model_on_the_meta_device_is_told_to_get_its_tensors(tmp_path):
    with torch.device("meta"):
        model = nets.root_sequential()
    with pytest.raises(RetrofitError, match="is on the meta device"):
        retrofit.calibrate(retrofit.prepare(model.eval()), [X], progress=False)
    retrofit.save(converted(), tmp_path / "bn.pth")
    with pytest.raises(RetrofitError, match="is on the meta device"):
        retrofit.load(tmp_path / "bn.pth", model)
