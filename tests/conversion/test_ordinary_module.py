"""A converted network is an ordinary module: what torch does with modules works on it."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import nets
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.feature_extraction import create_feature_extractor

import retrofit

IMAGES = nets.images(8, 3, 14, 14)
OTHERS = nets.images(3, 3, 14, 14, seed=2)
LABELS = torch.arange(8) % 3


def tiny_vgg():
    """torchvision's own class, whose BatchNorms go in by renumbering."""
    with torch.device("meta"):  # the stock classifier has 120 million weights
        model = torchvision.models.VGG(nn.Sequential(), init_weights=False)
    model.features = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
    )
    model.classifier = nn.Sequential(
        nn.Linear(8 * 7 * 7, 16),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(16, 5),
    )
    return model


def converted(net):
    return retrofit.add_batchnorm(nets.build(net), [IMAGES], progress=False)


def trained(model, images=IMAGES, labels=LABELS):
    """The model itself after one training step, in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model.train()(images), labels).backward()
    optimizer.step()
    model.zero_grad()
    return model.eval()


def fine_tuned(net):
    """By pictures of another kind: no BatchNorm is the identity any more."""
    return trained(converted(net), 2 * IMAGES + 1)


def sites(net):
    return retrofit.plan(nets.build(net)).inserted


each_net = pytest.mark.parametrize(
    "net", [tiny_vgg, nets.Residual], ids=["renumbered", "wrapped in place"]
)
each_stage = pytest.mark.parametrize("made", [converted, fine_tuned])
# torch's compilers, exporters and quantization warn of themselves, of other things in each release.
torch_may_warn = pytest.mark.filterwarnings("ignore")


def assert_same_tensors(ours, theirs):
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


@each_net
def test_a_deep_copy_is_equal_independent_and_still_folds_to_the_original(net):
    model = converted(net)
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(OTHERS), model(OTHERS))
    assert_same_tensors(retrofit.fold(duplicate).state_dict(), nets.build(net).state_dict())
    trained(duplicate)
    assert not torch.equal(duplicate(OTHERS), model(OTHERS))
    assert_same_tensors(model.state_dict(), converted(net).state_dict())


@each_net
@pytest.mark.slow
def test_a_pickle_loads_where_retrofit_is_never_imported_and_still_folds(net, tmp_path):
    model = converted(net)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save(OTHERS, tmp_path / "images.pt")
    script = """
        import pickle, sys, torch
        with open("model.pkl", "rb") as file:
            model = pickle.load(file)
        torch.save(model(torch.load("images.pt")), "outputs.pt")
        with open("again.pkl", "wb") as file:
            pickle.dump(model, file)
        assert not any(name.startswith("retrofit") for name in sys.modules)
    """
    subprocess.run(
        [sys.executable, "-c", "if True:" + script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},  # where `nets` is
        check=True,
    )
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), model(OTHERS))
    again = pickle.loads((tmp_path / "again.pkl").read_bytes())  # noqa: S301
    assert_same_tensors(retrofit.fold(again).state_dict(), nets.build(net).state_dict())


@each_net
def test_a_saved_state_dict_loads_into_a_network_made_by_insert(net, tmp_path):
    model = fine_tuned(net)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = retrofit.insert(net().eval())  # built anew, with other weights
    assert not torch.equal(other(OTHERS), model(OTHERS))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(OTHERS), model(OTHERS))


@torch_may_warn
@each_net
@each_stage
def test_torch_export_keeps_every_batchnorm_and_the_outputs(net, made):
    model = made(net)
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=batch)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("batch_norm" in target for target in targets) == len(sites(net))
    assert torch.equal(program.module()(OTHERS), model(OTHERS))


@torch_may_warn
@each_net
@each_stage
@pytest.mark.slow
def test_onnxruntime_computes_what_torch_does_converted_and_folded(net, made, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = made(net)
    for name, exported in (("converted", model), ("folded", retrofit.fold(model))):
        file = tmp_path / f"{name}.onnx"
        any_batch = {"images": {0: "batch"}}  # in the form that every exporter of torch knows
        torch.onnx.export(exported, (IMAGES,), file, input_names=["images"], dynamic_axes=any_batch)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        outputs = torch.from_numpy(session.run(None, {"images": OTHERS.numpy()})[0])
        with torch.no_grad():
            for reference in (exported(OTHERS), model(OTHERS)):
                torch.testing.assert_close(outputs, reference, rtol=1e-5, atol=1e-5)


@torch_may_warn
@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler"
)
@each_net
@pytest.mark.slow
def test_the_compiled_network_computes_the_same(net):
    model = fine_tuned(net)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model)(OTHERS), model(OTHERS), rtol=1e-5, atol=1e-5
        )


@torch_may_warn
def test_a_training_step_of_the_compiled_network_is_that_of_the_plain_one():
    plain, compiled = converted(nets.Residual), converted(nets.Residual)
    trained(plain)
    trained(torch.compile(compiled, backend="aot_eager"))
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], tensor)


@each_net
def test_under_bfloat16_autocast_it_computes_what_the_original_does_and_trains(net):
    model = converted(net)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(OTHERS)
        assert outputs.dtype is torch.bfloat16
        assert torch.equal(outputs, nets.build(net)(OTHERS))
        trained(model)
    for site in sites(net):
        for name in ("weight", "running_mean", "running_var"):
            tensor = model.state_dict()[f"{site.norm}.{name}"]
            assert tensor.dtype is torch.float32
            assert tensor.isfinite().all()
            assert not torch.equal(tensor, before[f"{site.norm}.{name}"])


@each_net
def test_its_batchnorms_become_synchronised_ones_and_still_fold(net):
    model = converted(net)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    for site in sites(net):
        assert type(synchronised.get_submodule(site.norm)) is nn.SyncBatchNorm
    assert_same_tensors(synchronised.state_dict(), model.state_dict())
    assert torch.equal(synchronised(OTHERS), model(OTHERS))
    assert_same_tensors(retrofit.fold(synchronised).state_dict(), nets.build(net).state_dict())


def distributed_step(rank, folder):
    """What each of two processes does: one training step on its half of the images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = torch.load(folder / "model.pt", weights_only=False)
    half = slice(4 * rank, 4 * rank + 4)
    trained(DistributedDataParallel(model), IMAGES[half], LABELS[half])
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


@each_net
def test_two_processes_train_it_together(net, tmp_path):
    model = converted(net)
    torch.save(model, tmp_path / "model.pt")
    start_processes(distributed_step, (tmp_path,), nprocs=2, start_method="forkserver")
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for key, parameter in model.named_parameters():
        assert torch.equal(states[0][key], states[1][key]), key
        # A bias before a BatchNorm has no gradient but rounding noise.
        assert key.endswith("bias") or not torch.equal(states[0][key], parameter), key

    # Each rank's statistics have moved a tenth of the way to those of its own half.
    first = sites(net)[0]
    conv, bn = nets.build(net).get_submodule(first.path), model.get_submodule(first.norm)
    for state, half in zip(states, IMAGES.split(4), strict=True):
        var, mean = torch.var_mean(conv(half), (0, 2, 3))
        for name, old, new in (("mean", bn.running_mean, mean), ("var", bn.running_var, var)):
            moved = state[f"{first.norm}.running_{name}"]
            torch.testing.assert_close(moved, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-6)
            assert not torch.equal(moved, old)


@each_net
def test_a_feature_extractor_taps_at_each_batchnorm_what_the_convolution_gave(net):
    taps = {site.path: site.path for site in sites(net)}
    theirs = create_feature_extractor(nets.build(net), taps)(OTHERS)
    behind = {site.norm: site.path for site in sites(net)}
    assert_same_tensors(create_feature_extractor(converted(net), behind)(OTHERS), theirs)


def test_a_feature_extractor_finds_a_wrapped_convolution_under_its_old_name():
    taps = [site.path for site in sites(nets.Residual)]
    ours, theirs = (
        create_feature_extractor(model, taps)(OTHERS)
        for model in (converted(nets.Residual), nets.build(nets.Residual))
    )
    assert_same_tensors(ours, theirs)


@each_net
def test_with_a_new_head_it_trains_and_every_batchnorm_folds(net):
    model = converted(net)
    if net is tiny_vgg:
        head = model.classifier[6] = nn.Linear(16, 3)
    else:
        head = model.head = nn.Linear(8, 3)
    untrained = retrofit.fold(model)
    original = nets.build(net)
    for site in sites(net):
        conv = untrained.get_submodule(site.path)
        assert_same_tensors(conv.state_dict(), original.get_submodule(site.path).state_dict())

    before = head.weight.detach().clone()
    folded = retrofit.fold(trained(model))
    assert not torch.equal(head.weight, before)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert [type(m) for m in folded.modules()] == [type(m) for m in original.modules()]
    assert folded(OTHERS).shape == (3, 3)
    torch.testing.assert_close(folded(OTHERS), model(OTHERS), rtol=1e-5, atol=1e-5)


@torch_may_warn
@pytest.mark.parametrize(
    ("net", "fused"),
    [
        (tiny_vgg, ("features.0 features.1 features.2", "features.4 features.5 features.6")),
        (nets.root_sequential, ("0.conv 0.bn 1", "2.conv 2.bn 3")),
    ],
    ids=["renumbered", "wrapped in place"],
)
def test_quantization_aware_training_fuses_each_convolution_and_its_batchnorm(net, fused):
    ao = torch.ao.quantization
    model = ao.fuse_modules_qat(converted(net).train(), [names.split() for names in fused])
    model.qconfig = ao.get_default_qat_qconfig(torch.backends.quantized.engine)
    model = ao.prepare_qat(ao.QuantWrapper(model))
    convs = [f"module.{names.split()[0]}" for names in fused]
    for conv in convs:
        assert type(model.get_submodule(conv)) is torch.ao.nn.intrinsic.qat.ConvBnReLU2d

    def in_float():
        return copy.deepcopy(model).eval().apply(ao.disable_fake_quant)(OTHERS)

    torch.testing.assert_close(in_float(), nets.build(net)(OTHERS), rtol=1e-5, atol=1e-5)
    gamma = model.get_submodule(convs[0]).bn.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IMAGES).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.get_submodule(convs[0]).bn.weight, gamma)

    int8 = ao.convert(model.eval())
    for conv in convs:
        assert type(int8.get_submodule(conv)) is torch.ao.nn.intrinsic.quantized.ConvReLU2d
    assert (int8(OTHERS) - in_float()).norm() < 0.05 * in_float().norm()
