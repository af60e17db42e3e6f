"""Weights of torchvision by their names: the network is the one that torchvision makes of them."""

import nets
import pytest
import torch
import torchvision
from folders import pictures
from torch import nn

import retrofit
from retrofit import RetrofitError
from retrofit.files import model_sources

models = torchvision.models
QUICK = (
    models.Inception_V3_Weights.DEFAULT,
    models.GoogLeNet_Weights.DEFAULT,
    models.SqueezeNet1_1_Weights.DEFAULT,
    models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1,
    models.segmentation.FCN_ResNet50_Weights.DEFAULT,
    models.segmentation.LRASPP_MobileNet_V3_Large_Weights.DEFAULT,
    models.detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT,
    models.detection.FasterRCNN_ResNet50_FPN_V2_Weights.DEFAULT,
    models.detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.DEFAULT,
    models.detection.KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY,
    models.detection.KeypointRCNN_ResNet50_FPN_Weights.COCO_V1,
)
NAMES = {models.get_model_weights(name): name for name in models.list_models()}
ALL = [entry for kind, name in NAMES.items() for entry in kind if "quantized" not in name]
FASTER = models.detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.DEFAULT


def as_torchvision_builds(entry, monkeypatch):
    """The network that torchvision makes for these weights, before it loads them."""
    with monkeypatch.context() as patched:
        patched.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **__: {})
        patched.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        return models.get_model(NAMES[type(entry)], weights=entry)


def described(model):
    """What a network is but for the values of its tensors."""
    tensors = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    plain = (bool, int, float, str, tuple)
    settings = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "training"
    }
    lines = [line for line in repr(model).splitlines() if not line.endswith(": None")]
    return lines, tensors, settings


def is_regnet(entry):
    return "regnet" in NAMES[type(entry)]  # cannot be built on the meta device


@pytest.mark.parametrize("entry", QUICK, ids=str)
def test_a_network_is_built_for_weights_as_torchvision_builds_it(entry, monkeypatch):
    with torch.device("meta"):
        expected = as_torchvision_builds(entry, monkeypatch)
        found = model_sources.build(NAMES[type(entry)], built_for=entry.name)
    assert described(found) == described(expected)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ALL, ids=str)
def test_it_is_so_for_all_of_them(entry, monkeypatch):
    if is_regnet(entry) and "128" in NAMES[type(entry)]:
        pytest.skip("takes gigabytes")
    with torch.device("cpu" if is_regnet(entry) else "meta"):
        expected = as_torchvision_builds(entry, monkeypatch)
        found = model_sources.build(NAMES[type(entry)], built_for=entry.name)
    assert described(found) == described(expected)


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """Put random weights where torchvision finds those of this name, and return its network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)

    def stock(entry, random=None):
        torch.manual_seed(0)
        random = random or as_torchvision_builds(entry, monkeypatch)
        torch.save(random.state_dict(), folder / entry.url.rpartition("/")[2])
        return models.get_model(NAMES[type(entry)], weights=entry).eval()

    return stock


def test_the_trained_network_computes_what_torchvisions_does(downloaded):
    x = nets.images(2, 3, 80, 80)
    inception = downloaded(models.Inception_V3_Weights.DEFAULT)
    assert inception.transform_input
    found = model_sources.trained("inception_v3", "DEFAULT")
    assert torch.equal(found(x), inception(x))
    as_asked = model_sources.trained(
        "inception_v3", "DEFAULT", model_args={"transform_input": False}
    )
    assert not torch.equal(as_asked(x), inception(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the statistics")  # of four pictures
def test_a_detector_is_converted_verified_folded_and_loaded(downloaded, run, tmp_path):
    expected = downloaded(FASTER)
    expected.roi_heads.score_thresh = 0
    pictures(tmp_path / "pictures", 6)
    data = ("--data", "pictures", "--workers", "0", "--images", "4", "--batch-size", "2")
    every = ("--model-args", "box_score_thresh=0")  # of random weights
    named = (NAMES[type(FASTER)], *every, "--weights", "DEFAULT", *data)
    code, _, err = run("convert", *named, "--output", "bn.safetensors")
    assert (code, err) == (0, [])
    code, out, _ = run("inspect", "bn.safetensors")
    assert "weights             COCO_V1" in out
    assert run("verify", "bn.safetensors", "--weights", "DEFAULT", *data)[0] == 0
    assert run("fold", "bn.safetensors", "--output", "plain.safetensors")[0] == 0
    x = [torch.rand(3, 64, 80), torch.rand(3, 90, 70)]
    for file in ("bn.safetensors", "plain.safetensors"):
        for ours, theirs in zip(retrofit.load(file)(x), expected(x), strict=True):
            assert len(theirs["boxes"]) > 0
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_save_in_python_takes_the_weights_name(downloaded, tmp_path):
    with_classifiers = models.googlenet(init_weights=False)  # as in the file of torchvision's
    network = downloaded(models.GoogLeNet_Weights.DEFAULT, with_classifiers)
    x = nets.images(2, 3, 64, 64)
    assert torch.equal(model_sources.trained("googlenet", "DEFAULT")(x), network(x))
    file, without = tmp_path / "a.safetensors", {"aux_logits": False}
    with pytest.warns(UserWarning, match="network has transform_input=True in this one, and would"):
        retrofit.save(network, file, name="googlenet", model_args=without)
    assert not torch.equal(retrofit.load(file)(x), network(x))
    asked = {**without, "transform_input": True}
    for told in ({"weights": "IMAGENET1K_V1"}, {"model_args": asked}):
        retrofit.save(network, file, name="googlenet", **told, overwrite=True)
        assert torch.equal(retrofit.load(file)(x), network(x))


@pytest.mark.parametrize("converted", [False, True])
def test_another_activation_than_the_name_s_is_told(converted, tmp_path):
    model = models.squeezenet1_1().eval()
    model.features[3].expand3x3_activation = nn.SiLU()
    if converted:
        model = retrofit.insert(model)
    text = r"features\.3\.expand3x3_activation is a SiLU in this one, and would be a ReLU"
    with pytest.warns(UserWarning, match=text):
        retrofit.save(model, tmp_path / "a.safetensors", name="squeezenet1_1")


def resnet_with_a_deeper_head():
    model = models.resnet18()
    model.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 7))
    return model


def squeezenet_with_more():
    model = models.squeezenet1_1()
    model.extra = nn.Conv2d(3, 3, 1)
    return model


def squeezenet_with_less():
    model = models.squeezenet1_1()
    model.classifier = model.classifier[:3]
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (squeezenet_with_more, r"extra\.weight is in this one alone"),
        (squeezenet_with_less, r"classifier\.3, a AdaptiveAvgPool2d, is not in this one"),
    ],
)
def test_a_layer_more_or_less_than_the_name_s_is_told(make, text, tmp_path):
    with pytest.warns(UserWarning, match=f"will build another network: {text}"):
        retrofit.save(make(), tmp_path / "a.safetensors", name="squeezenet1_1")


def test_arguments_that_are_no_dict_are_refused(tmp_path):
    options = {"name": "squeezenet1_1", "model_args": [("num_classes", 5)]}
    with pytest.raises(RetrofitError, match=r"model_args must be a dict such as .*, not list$"):
        retrofit.save(models.squeezenet1_1(), tmp_path / "a.safetensors", **options)


@pytest.mark.parametrize(
    ("make", "name", "text"),
    [
        (resnet_with_a_deeper_head, "resnet18", r"fc\.weight is not in this one"),
        (lambda: models.resnet18(num_classes=7), "resnet18", r"shape \(7, 512\) in this one, and"),
        (lambda: retrofit.fold(models.resnet18()), "resnet18", r"bn1\.weight is not in this one"),
        (models.squeezenet1_0, "squeezenet1_1", r"features\.0\.weight has shape"),
    ],
)
def test_what_load_will_not_fit_is_told(make, name, text, tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.warns(UserWarning, match=text):
        retrofit.save(make(), file, name=name)
    with pytest.raises(RetrofitError):
        retrofit.load(file)


def test_nothing_is_told_of_what_load_would_build_alike_or_not_at_all(tmp_path):
    model = retrofit.insert(models.squeezenet1_1(dropout=0.1).train())
    retrofit.save(model, tmp_path / "a.safetensors", name="squeezenet1_1")
    model.classifier[1] = nn.Conv2d(512, 5, 1)  # the network still says num_classes=1000
    told = {"name": "squeezenet1_1", "model_args": {"num_classes": 5}}
    retrofit.save(model, tmp_path / "a.safetensors", **told, overwrite=True)
    other = retrofit.insert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)))
    for name in ("my own", "net.py:make", None):
        retrofit.save(other, tmp_path / "a.safetensors", name=name, overwrite=True)


def test_weights_that_the_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(RetrofitError, match="'COCO' is no file and no weights of squeezenet1_1"):
        model_sources.build("squeezenet1_1", built_for="COCO")
    file = tmp_path / "a.safetensors"
    with pytest.raises(RetrofitError, match="'COCO' is no file and no weights of squeezenet1_1"):
        retrofit.save(models.squeezenet1_1(), file, name="squeezenet1_1", weights="COCO")
    assert not file.exists()
