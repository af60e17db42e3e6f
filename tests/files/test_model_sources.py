"""Models by name, their weights, and what makes a picture their input."""

import logging
import sys

import nets
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.utils import reparameterize_model

from retrofit import RetrofitError
from retrofit.files import model_sources
from retrofit.pictures.batches import PictureBatches
from retrofit.pictures.preprocessing import preprocessing
from retrofit.pictures.sources import ArrayPictures

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def repvgg():
    """A timm RepVGG in eval mode, its BatchNorms as after training."""
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0")
    with torch.no_grad():
        for _ in range(3):
            model(2 * nets.images(4, 3, 64, 64) + 1)
    return model.eval()


def transform_of(spec, weights=None, **steps):
    return preprocessing(
        model_sources.transforms(spec, model_sources.build(spec), weights), **steps
    )


@pytest.mark.parametrize("merged", [False, True])
def test_a_reparameterised_model_takes_the_keys_before_merging_and_after(repvgg, tmp_path, merged):
    expected = reparameterize_model(repvgg)
    source = expected if merged else repvgg
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    model = model_sources.trained("timm-reparameterized:repvgg_a0", str(tmp_path / "w.pth"))
    assert not any(module.training for module in model.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)


@pytest.mark.parametrize("merged", [False, True])
def test_weights_that_fit_neither_are_judged_by_the_keys_they_nearly_have(repvgg, tmp_path, merged):
    state = (reparameterize_model(repvgg) if merged else repvgg).state_dict()
    del state["head.fc.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(RetrofitError, match=r": 1 missing \(head\.fc\.bias\)"):
        model_sources.trained("timm-reparameterized:repvgg_a0", str(tmp_path / "w.pth"))


def test_default_weights_of_timm_are_its_pretrained_ones(repvgg, monkeypatch):
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(repvgg.state_dict())
    )
    x = nets.images(2, 3, 64, 64)
    for name in ("repvgg_a0", "repvgg_a0.rvgg_in1k"):
        assert torch.equal(model_sources.trained(f"timm:{name}", "DEFAULT")(x), repvgg(x))
    model = model_sources.trained("timm-reparameterized:repvgg_a0", "DEFAULT")
    assert torch.equal(model(x), reparameterize_model(repvgg)(x))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_models_that_start_slowly_are_built_without_a_warning(name):
    builder = torchvision.models.get_model_builder(name)
    expected = builder(weights=None, init_weights=False).state_dict()
    assert model_sources.build(name).state_dict().keys() == expected.keys()


def test_a_download_that_fails_is_one_line(monkeypatch, capfd):
    def unreachable(*_, **__):
        logging.getLogger("huggingface_hub").warning("Retrying in 1s")
        raise OSError("no route\nto the host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(RetrofitError) as raised:
        model_sources.trained("timm:test_nfnet", "DEFAULT")
    assert "weights of timm's test_nfnet cannot be loaded" in str(raised.value)
    assert str(raised.value).endswith("OSError: no route to the host")
    assert capfd.readouterr().err == ""


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(RetrofitError, match=r"pip install 'batchnorm-retrofit\[timm\]'$"):
        model_sources.build("timm:vgg11")


def test_pictures_are_prepared_as_timm_prepares_them():
    model = timm.create_model("fastvit_t8")
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**config, is_training=False)
    ours = preprocessing(model_sources.transforms("timm:fastvit_t8", model))
    assert torch.equal(ours(PICTURE), theirs(PICTURE))


def test_single_steps_of_timms_preparation_are_replaced():
    steps = {"resize": 50, "crop": 32, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    ours = transform_of("timm:test_nfnet", **steps)(PICTURE)
    transforms = torchvision.transforms
    theirs = transforms.Compose(
        [
            transforms.Resize(50, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(steps["mean"], steps["std"]),
        ]
    )(PICTURE)
    assert torch.equal(ours, theirs)


def test_torchvision_models_use_the_transform_of_their_weights():
    entries = torchvision.models.ResNet50_Weights
    named = transform_of("resnet50", "IMAGENET1K_V1")(PICTURE)
    assert torch.equal(named, entries.IMAGENET1K_V1.transforms()(PICTURE))
    of_a_file = transform_of("resnet50", "mine.pth")(PICTURE)
    assert torch.equal(of_a_file, entries.DEFAULT.transforms()(PICTURE))
    assert not torch.equal(named, of_a_file)


def test_a_detector_sees_pictures_in_their_own_size_unless_asked():
    to_input = transform_of("ssdlite320_mobilenet_v3_large", "mine.pth")
    assert torch.equal(to_input(PICTURE), torchvision.transforms.ToTensor()(PICTURE))
    assert transform_of("ssdlite320_mobilenet_v3_large", resize=45)(PICTURE).shape == (3, 45, 60)
    assert transform_of("ssdlite320_mobilenet_v3_large", crop=40)(PICTURE).shape == (3, 40, 40)
    assert transform_of("lraspp_mobilenet_v3_large", crop=40)(PICTURE).shape == (3, 40, 40)
    with pytest.raises(RetrofitError, match="leave out --mean and --std"):
        transform_of("ssdlite320_mobilenet_v3_large", mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("spec", ["raft_small", "r3d_18"])
def test_models_of_pairs_or_videos_are_for_python(spec):
    with pytest.raises(RetrofitError, match="takes no single pictures"):
        transform_of(spec)


def test_pictures_of_different_sizes_are_a_list_where_the_model_takes_one():
    class Mixed(ArrayPictures):
        def __init__(self):
            self.file, self.array = "mixed", [PICTURE, PICTURE.resize((40, 30))]

        def read(self, index):
            return self.array[index]

    to_tensor = torchvision.transforms.ToTensor()
    options = {"batch_size": 2, "workers": 0}
    (batch,) = PictureBatches(Mixed(), [0, 1], to_tensor, lists=True, **options)
    assert [tuple(picture.shape) for picture in batch] == [(3, 90, 120), (3, 30, 40)]
    (batch,) = PictureBatches(Mixed(), [0, 0], to_tensor, lists=True, **options)
    assert batch.shape == (2, 3, 90, 120)
    with pytest.raises(RetrofitError, match=r"\(90 x 120, 30 x 40\).*--crop, or --batch-size 1"):
        list(PictureBatches(Mixed(), [0, 1], to_tensor, **options))


def test_torchvisions_pretrained_weights_are_loaded(tmp_path, monkeypatch):
    """From the cache of downloads, where a file of that name lies."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    model = torchvision.models.squeezenet1_1().eval()
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    torch.save(model.state_dict(), file)
    x = nets.images(2, 3, 64, 64)
    assert torch.equal(model_sources.trained("squeezenet1_1", "DEFAULT").eval()(x), model(x))

    def unreachable(*_, **__):
        raise OSError("no route to the host")

    file.unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(RetrofitError, match="cannot be downloaded: no route to the host"):
        model_sources.trained("squeezenet1_1", "DEFAULT")


# --- ultralytics --------------------------------------------------------------------------------


def test_without_ultralytics_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(RetrofitError, match=r"for its model yolo11n: pip install ultralytics"):
        model_sources.build("ultralytics:yolo11n")


def test_a_name_of_ultralytics_builds_its_class(tmp_path):
    ultralytics = pytest.importorskip("ultralytics")
    model = model_sources.build("ultralytics:yolov8n")
    assert type(model) is ultralytics.nn.tasks.DetectionModel
    expected = ultralytics.YOLO("yolov8n.yaml").model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert model_sources.code_of("ultralytics:yolov8n") == "ultralytics.YOLO('yolov8n.yaml').model"
    with pytest.raises(RetrofitError, match=r"no model 'yolov8q'; nearest: .*yolov8"):
        model_sources.build("ultralytics:yolov8q")
    (tmp_path / "yolov8n.yaml").write_text("nc: 2\nbackbone: 3\n")
    with pytest.raises(RetrofitError, match=r"ultralytics builds no model of .*yolov8n\.yaml: "):
        model_sources.build(f"ultralytics:{tmp_path / 'yolov8n.yaml'}")
    with pytest.raises(RetrofitError, match=r"'DEFAULT' is no .*: give weights of ultralytics"):
        model_sources.trained("ultralytics:yolov8n", "DEFAULT")


def test_pictures_are_prepared_as_ultralytics_prepares_them():
    augment = pytest.importorskip("ultralytics.data.augment")
    boxed = augment.LetterBox((320, 320), auto=False)(image=np.asarray(PICTURE))
    expected = torch.from_numpy(np.ascontiguousarray(boxed)).permute(2, 0, 1) / 255
    for steps in ({"crop": 320}, {"resize": 320}, {"crop": 320, "resize": 320}):
        assert torch.equal(transform_of("ultralytics:yolov8n", **steps)(PICTURE), expected)
    assert transform_of("ultralytics:yolov8n")(PICTURE).shape == (3, 640, 640)
    for resize in (350, 640):
        with pytest.raises(RetrofitError, match=rf"of 320 pixels: leave out --resize {resize}"):
            transform_of("ultralytics:yolov8n", crop=320, resize=resize)
    classified = transform_of("ultralytics:yolov8n-cls")(PICTURE)
    assert torch.equal(classified, augment.classify_transforms(224)(PICTURE))


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("resnet18", "torchvision.models.get_model('resnet18')"),
        ("timm:test_resnet", "timm.create_model('test_resnet')"),
        (
            "timm-reparameterized:repvgg_a0",
            "timm.utils.reparameterize_model(timm.create_model('repvgg_a0'))",
        ),
    ],
)
def test_the_code_that_builds_a_model_builds_it(spec, code):
    assert model_sources.code_of(spec) == code
    built = eval(code)  # noqa: S307 - what is printed for users to type
    assert built.state_dict().keys() == model_sources.build(spec).state_dict().keys()
