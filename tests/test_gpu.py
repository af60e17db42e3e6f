"""On a GPU: the same moments, outputs that are close, the same files. Skipped elsewhere."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torchvision
from nets import Residual, build, images
from PIL import Image
from safetensors import safe_open
from torch import nn

import retrofit
from retrofit.calibration import fused_bias, site_samples

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def float32():
    """Convolutions in float32, not TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def two_pass(batches):
    """Mean and unbiased variance of each channel, in float64."""
    x = torch.cat([batch.double().transpose(0, 1).flatten(1) for batch in batches], 1)
    return x.mean(1), x.var(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_moments_equal_two_passes_in_float64(dtype, memory_format):
    conv = nn.Conv2d(3, 3, 1, groups=3, bias=False).cuda().eval()
    nn.init.ones_(conv.weight)
    scale = torch.tensor([1.0, 3.0, 0.1]).view(3, 1, 1)
    batches = [
        (scale * (images(n, 3, 97, 83, seed=n) + 10)).cuda().to(dtype, memory_format=memory_format)
        for n in (7, 1, 3)
    ]
    model = nn.Sequential(conv, nn.ReLU()).to(dtype)
    prepared = retrofit.prepare(model, retrofit.plan(model))
    retrofit.calibrate(prepared, batches, progress=False)
    (found,) = retrofit.channel_moments(prepared).values()
    mean, var = (moment.cpu() for moment in two_pass(batches))
    assert ((found.mean - mean).abs() / var.sqrt()).max() < 1e-5
    assert ((found.var - var).abs() / var).max() < 1e-5


KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_the_kernel_for_biases_gives_what_pytorch_does(dtype):
    pytest.importorskip("triton")
    assert fused_bias._is_right(torch.device("cuda", 0), dtype)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_with_the_kernel_for_biases_every_layer_gets_the_same_bits(
    dtype, memory_format, monkeypatch
):
    """And the sites the same moments, although no activation is read again."""
    pytest.importorskip("triton")
    layers = [nn.Conv2d(3, 40, 3), nn.ReLU(inplace=True), nn.Conv2d(40, 33, 3, 2), nn.ReLU()]
    net = nn.Sequential(*layers).eval().cuda().to(dtype, memory_format=memory_format)
    batches = [
        images(n, 3, 131, 127, seed=n).cuda().to(dtype, memory_format=memory_format) for n in (5, 2)
    ]
    inputs, found = {}, {}
    for used in (False, True):
        prepared = retrofit.prepare(net)
        for module in prepared.modules():
            if isinstance(module, nn.Conv2d | nn.ReLU):
                module.register_forward_pre_hook(
                    lambda _, args, used=used: inputs.setdefault(used, []).append(args[0].clone())
                )
        with monkeypatch.context() as patch:
            if used:
                patch.setattr(site_samples, "reduced", None)
            else:
                patch.setattr(fused_bias, "_kernel", lambda: None)
            retrofit.calibrate(prepared, batches, progress=False)
        found[used] = retrofit.channel_moments(prepared)
    assert len(inputs[True]) == len(inputs[False]) > 4
    assert all(torch.equal(a, b) for a, b in zip(inputs[True], inputs[False], strict=True))
    for site, (mean, var) in found[True].items():
        theirs = found[False][site]
        assert ((mean - theirs.mean).abs() <= 1e-5 * theirs.var.sqrt()).all()
        assert ((var - theirs.var).abs() <= 2e-5 * theirs.var).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_with_relus_in_the_kernel_every_convolution_gets_the_same_bits(
    dtype, memory_format, monkeypatch
):
    pytest.importorskip("triton")
    convs = [nn.Conv2d(3, 40, 3), nn.Conv2d(40, 33, 3, 2), nn.Conv2d(33, 8, 1)]
    layers = [layer for conv in convs for layer in (conv, nn.ReLU(inplace=True))]
    net = nn.Sequential(*layers, nn.Conv2d(8, 4, 1)).eval()
    net.cuda().to(dtype, memory_format=memory_format)
    batches = [
        images(n, 3, 131, 127, seed=n).cuda().to(dtype, memory_format=memory_format) for n in (5, 2)
    ]
    inputs, ran = {}, []
    forward = nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda *args: ran.append(args) or forward(*args))
    for used in (False, True):
        prepared = retrofit.prepare(net, retrofit.plan(net, include="*"))
        for module in prepared.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(
                    lambda _, args, used=used: inputs.setdefault(used, []).append(args[0].clone())
                )
        ran.clear()
        with monkeypatch.context() as patch:
            if not used:
                patch.setattr(fused_bias, "_kernel", lambda: None)
            retrofit.calibrate(prepared, batches, progress=False)
        assert len(ran) == (0 if used else 6)
    assert len(inputs[True]) == len(inputs[False]) == 8
    assert all(torch.equal(a, b) for a, b in zip(inputs[True], inputs[False], strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_outputs_are_close_and_folding_restores_the_bits(memory_format):
    torch.manual_seed(0)
    vgg = torchvision.models.vgg11().eval().cuda().to(memory_format=memory_format)
    batches = [images(4, 3, 64, 64, seed=s).cuda() for s in (1, 2)]
    converted = retrofit.add_batchnorm(vgg, batches, progress=False)
    assert all(p.is_cuda for p in converted.state_dict().values())
    report = retrofit.verify(vgg, converted, batches)
    assert report.passed(1e-4)
    state = vgg.state_dict()
    folded = retrofit.fold(converted).state_dict()
    assert all(torch.equal(state[key], folded[key]) for key in state)


def test_a_network_calibrated_on_a_gpu_is_exact_on_the_cpu():
    model = build(Residual)
    model.register_buffer("scale", torch.ones(3))
    data = [images(8, 3, 32, 32)]
    converted = retrofit.add_batchnorm(model, data, device="cuda", progress=False)
    for one in (model, converted):
        assert all(not tensor.is_cuda for tensor in one.state_dict().values())
    assert retrofit.verify(model, converted, data).exact


def test_drift_on_a_gpu_is_that_on_the_cpu_and_leaves_the_models_there():
    model, data = build(Residual), [images(32, 3, 32, 32)]
    converted = retrofit.add_batchnorm(model, data, progress=False)
    before = {**converted.state_dict()}
    (found,) = retrofit.drift(model, converted, data, [8], device="cuda").rows
    (expected,) = retrofit.drift(model, converted, data, [8]).rows
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    after = converted.state_dict()
    assert all(after[key].data_ptr() == tensor.data_ptr() for key, tensor in before.items())


def test_batches_that_do_not_fit_are_halved():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()).eval()
    data = [images(64, 3, 256, 256)]
    expected = retrofit.add_batchnorm(model, data, progress=False).state_dict()
    torch.cuda.empty_cache()  # 64 images are 1.07 GB after the convolution
    limit = torch.cuda.memory_reserved() + 900 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        with pytest.warns(UserWarning, match="memory"):
            found = retrofit.add_batchnorm(model, data, device="cuda", progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found, batches = found.state_dict(), "0.bn.num_batches_tracked"
    assert (found.pop(batches), expected.pop(batches)) == (2, 1)
    for key, value in found.items():
        assert torch.allclose(value.cpu(), expected[key], rtol=1e-4, atol=1e-5), key


def test_fine_tuning_on_a_gpu_under_autocast():
    converted = retrofit.add_batchnorm(build(Residual).cuda(), [images(8, 3, 32, 32).cuda()])
    optimizer = torch.optim.SGD(retrofit.param_groups(converted.train()), lr=0.01)
    with torch.autocast("cuda", torch.bfloat16):
        loss = converted(images(8, 3, 32, 32).cuda()).float().square().mean()
    loss.backward()
    optimizer.step()
    assert all(p.grad.isfinite().all() for p in converted.parameters())


@pytest.mark.parametrize(
    "launcher", [[], ["torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"]]
)
def test_the_command_converts_on_a_gpu(launcher, tmp_path):
    for i in range(12):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / f"{i}.png")
    output = tmp_path / "bn.safetensors"
    command = [sys.executable, "-m", *launcher, "retrofit", "convert", "retrofit.demo:trained_vgg"]
    options = ["--data", tmp_path, "--output", output, "--device", "cuda", "--workers", "1"]
    done = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "equal bit for bit" in done.stdout
    with safe_open(output, framework="pt") as file:
        assert json.loads(file.metadata()["retrofit"])["images"] == 12
