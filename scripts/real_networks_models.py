"""Networks of packages other than torchvision and timm, and inputs that they accept.

Weights are random, but for those that come with the package; none is downloaded. The networks are
small, and what is small about them is in their arguments alone: their code is that of the package.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
from network_checks import roughen
from torch import Generator, Tensor, nn

import retrofit


@dataclass(frozen=True)
class Network:
    """A network that is converted.

    Attributes:
        package: the name under which `pip install` knows it.
        name: the class, and what is special about it.
        task: what it is for, in a few words.
        build: makes it; weights are drawn from torch's global generator.
        batch: draws a batch: a tensor, a tuple of arguments, or a mapping of named ones.
        options: of `retrofit.add_batchnorm`.
    """

    package: str
    name: str
    task: str
    build: Callable[[], nn.Module]
    batch: Callable[[Generator], Any]
    options: Mapping[str, Any] = field(default_factory=dict)


def normal(*shape: int) -> Callable[[Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


def named(**shapes: tuple[int, ...]) -> Callable[[Generator], dict[str, Tensor]]:
    """Draw a mapping of tensors, as Hugging Face's processors make."""
    return lambda generator: {n: torch.rand(*s, generator=generator) for n, s in shapes.items()}


# --- segmentation ------------------------------------------------------------------------------


def smp_unet() -> nn.Module:
    smp = import_module("segmentation_models_pytorch")
    return module(smp.Unet("vgg13", encoder_weights=None, decoder_use_norm=False))


def smp_fpn() -> nn.Module:
    """Build an FPN on a MobileOne whose branches and BatchNorms are merged, and so frozen."""
    smp, timm_utils = import_module("segmentation_models_pytorch"), import_module("timm.utils")
    model = smp.FPN("mobileone_s0", encoder_weights=None).eval()
    return module(timm_utils.reparameterize_model(model))


def monai_unet() -> nn.Module:
    nets = import_module("monai.networks.nets")
    return module(nets.UNet(3, 1, 2, (8, 16, 32, 64), (2, 2, 2), num_res_units=2, norm=None))


def monai_segresnet() -> nn.Module:
    return module(import_module("monai.networks.nets").SegResNet(3, 8, 1, 2))


def monai_dynunet() -> nn.Module:
    nets = import_module("monai.networks.nets")
    sizes = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    deep = {"deep_supervision": True, "deep_supr_num": 1}
    return module(nets.DynUNet(3, 1, 2, **sizes, filters=[8, 16, 32], **deep))


def nnunet() -> nn.Module:
    unet = import_module("dynamic_network_architectures.architectures.unet")
    plain = {"conv_bias": True, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    sizes = (8, 16, 32), nn.Conv3d, 3, (1, 2, 2), (1, 1, 1), 2, (1, 1)
    return module(unet.PlainConvUNet(1, 3, *sizes, deep_supervision=True, **plain))


def upernet() -> nn.Module:
    transformers = import_module("transformers")
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    widths = {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 2, 1]}
    backbone = transformers.ConvNextConfig(**widths, out_features=stages)
    auxiliary = {"auxiliary_channels": 16, "auxiliary_in_channels": 64}
    config = transformers.UperNetConfig(backbone_config=backbone, hidden_size=32, **auxiliary)
    return module(transformers.UperNetForSemanticSegmentation(config))


# --- detection and matching --------------------------------------------------------------------


def yolo(description: str, *, frozen: bool) -> nn.Module:
    """Build a detector and `.fuse()` it, which merges and freezes its convolutions."""
    tasks = import_module("ultralytics.nn.tasks")
    kind = tasks.SegmentationModel if "seg" in description else tasks.DetectionModel
    model = kind(description, verbose=False).eval().fuse(verbose=False)
    return module(model if frozen else model.requires_grad_())


def mtcnn() -> nn.Module:
    """Build the last network of MTCNN; its trained weights are in the package."""
    return module(import_module("facenet_pytorch.models.mtcnn").ONet(pretrained=True))


def superpoint() -> nn.Module:
    transformers = import_module("transformers")
    config = transformers.SuperPointConfig(keypoint_threshold=0.0, max_keypoints=50)
    return module(transformers.SuperPointForKeypointDetection(config))


def disk() -> nn.Module:
    return module(import_module("kornia.feature").DISK().unet)


# --- pictures made, and compared ---------------------------------------------------------------


def esrgan() -> nn.Module:
    architecture = import_module("spandrel.architectures.ESRGAN")
    return module(architecture.ESRGAN(num_filters=16, num_blocks=2, scale=4))


def nafnet() -> nn.Module:
    architecture = import_module("spandrel.architectures.NAFNet")
    depths = {"enc_blk_nums": [1, 1], "middle_blk_num": 1, "dec_blk_nums": [1, 1]}
    return module(architecture.NAFNet(width=8, **depths))


def span() -> nn.Module:
    """Build SPAN, whose forward merges three convolutions into a fourth in eval mode."""
    architecture = import_module("spandrel.architectures.SPAN")
    return module(architecture.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2))


def autoencoder() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks["up_block_types"] = ("UpDecoderBlock2D",) * 2
    widths = {"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4}
    return module(import_module("diffusers").AutoencoderKL(**blocks, **widths))


def diffusion_unet() -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    blocks["up_block_types"] = ("AttnUpBlock2D", "UpBlock2D")
    widths = {"block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 8}
    return module(import_module("diffusers").UNet2DModel(sample_size=16, **blocks, **widths))


def conditional_unet() -> nn.Module:
    """Build the network of Stable Diffusion, small."""
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    widths = {"block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 8}
    unet = import_module("diffusers").UNet2DConditionModel
    return module(unet(sample_size=16, cross_attention_dim=24, **blocks, **widths))


def noised(generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([3, 500])


def noised_with_text(generator: Generator) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(2, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
    }


def lpips() -> nn.Module:
    """Build a perceptual distance on a frozen AlexNet."""
    with contextlib.redirect_stdout(io.StringIO()):  # it greets
        distance = import_module("lpips").LPIPS(net="alex", pretrained=False, pnet_rand=True)
    return module(distance)


def pair(generator: Generator) -> tuple[Tensor, ...]:
    return tuple(torch.rand(2, 2, 3, 64, 64, generator=generator))


# --- sound and sequences -----------------------------------------------------------------------


def whisper() -> nn.Module:
    transformers = import_module("transformers")
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    widths = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 20}
    tokens = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.WhisperConfig(
        **heads, **layers, **widths, **tokens, decoder_start_token_id=1, max_source_positions=50
    )
    return module(transformers.WhisperModel(config))


def spoken(generator: Generator) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(2, 20, 100, generator=generator),
        "decoder_input_ids": torch.randint(3, 100, (2, 7), generator=generator),
    }


def wav2vec2() -> nn.Module:
    transformers = import_module("transformers")
    widths = {"hidden_size": 64, "intermediate_size": 128, "conv_dim": [32] * 7}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = transformers.Wav2Vec2Config(**widths, **layers, **positions)
    return module(transformers.Wav2Vec2Model(config))


def hifigan() -> nn.Module:
    transformers = import_module("transformers")
    config = transformers.SpeechT5HifiGanConfig(model_in_dim=20, upsample_initial_channel=64)
    return module(transformers.SpeechT5HifiGan(config))


def encodec() -> nn.Module:
    build = import_module("encodec").EncodecModel._get_model
    return module(build([1.5, 3.0], sample_rate=24000, channels=1, causal=True))


def conv_tasnet() -> nn.Module:
    widths = {"enc_num_feats": 32, "msk_num_feats": 16, "msk_num_hidden_feats": 32}
    layers = {"msk_num_layers": 2, "msk_num_stacks": 2}
    return module(import_module("torchaudio.models").ConvTasNet(**widths, **layers))


def hdemucs() -> nn.Module:
    return module(import_module("torchaudio.models").HDemucs(["voice", "rest"], channels=8))


def tcn() -> nn.Module:
    return module(import_module("pytorch_tcn").TCN(8, [16, 16, 16], kernel_size=3))


# --- ONNX --------------------------------------------------------------------------------------


def from_onnx() -> nn.Module:
    """Export MobileNetV2, its BatchNorms folded, to ONNX, and read that back."""
    model = retrofit.fold(torchvision.models.mobilenet_v2().eval())
    roughen(model)  # equal biases would be exported as one
    with TemporaryDirectory() as folder:
        file = Path(folder) / "mobilenet.onnx"
        torch.onnx.export(
            model,
            (torch.rand(2, 3, 64, 64),),
            file,
            input_names=["x"],
            dynamic_axes={"x": {0: "images"}},
            opset_version=13,  # the newest that onnx2torch reads whole
            dynamo=False,
        )
        return module(import_module("onnx2torch").convert(file))


def module(built: Any) -> nn.Module:
    """Narrow the type: the packages are imported only where they are used, and without types."""
    assert isinstance(built, nn.Module)
    return built


PHOTO, VOLUME, WAVE = normal(2, 3, 64, 64), normal(2, 1, 32, 32, 32), normal(2, 1, 3200)

NETWORKS = (
    Network("segmentation-models-pytorch", "Unet, vgg13", "segmentation", smp_unet, PHOTO),
    Network(
        "segmentation-models-pytorch", "FPN, mobileone_s0 merged", "segmentation", smp_fpn, PHOTO
    ),
    Network(
        "transformers",
        "UperNet, ConvNeXt",
        "segmentation",
        upernet,
        named(pixel_values=(2, 3, 64, 64)),
    ),
    Network("monai", "UNet", "3-D segmentation", monai_unet, VOLUME),
    Network("monai", "SegResNet", "3-D segmentation", monai_segresnet, VOLUME),
    Network("monai", "DynUNet, deep supervision", "3-D segmentation", monai_dynunet, VOLUME),
    Network(
        "dynamic-network-architectures",
        "PlainConvUNet (nnU-Net)",
        "3-D segmentation",
        nnunet,
        VOLUME,
    ),
    Network(
        "ultralytics",
        "yolov8n, fused",
        "detection",
        lambda: yolo("yolov8n.yaml", frozen=True),
        PHOTO,
    ),
    Network(
        "ultralytics",
        "yolo11n-seg, fused, unfrozen",
        "detection",
        lambda: yolo("yolo11n-seg.yaml", frozen=False),
        PHOTO,
    ),
    Network(
        "facenet-pytorch",
        "ONet, its own weights",
        "face detection",
        mtcnn,
        normal(2, 3, 48, 48),
    ),
    Network(
        "transformers", "SuperPoint", "keypoints", superpoint, named(pixel_values=(2, 3, 64, 64))
    ),
    Network("kornia", "DISK", "keypoints", disk, PHOTO),
    Network("spandrel", "ESRGAN", "super-resolution", esrgan, normal(2, 3, 16, 16)),
    Network("spandrel", "SPAN", "super-resolution", span, normal(2, 3, 16, 16)),
    Network("spandrel", "NAFNet", "denoising", nafnet, normal(2, 3, 16, 16)),
    Network("diffusers", "AutoencoderKL", "diffusion", autoencoder, normal(2, 3, 32, 32)),
    Network("diffusers", "UNet2DModel", "diffusion", diffusion_unet, noised),
    Network("diffusers", "UNet2DConditionModel", "diffusion", conditional_unet, noised_with_text),
    Network("lpips", "LPIPS, AlexNet", "perceptual distance", lpips, pair),
    Network("transformers", "Whisper", "speech recognition", whisper, spoken),
    Network(
        "transformers",
        "Whisper, asked for",
        "speech recognition",
        whisper,
        spoken,
        {"include": "encoder.conv*"},
    ),
    Network("transformers", "Wav2Vec2", "speech features", wav2vec2, named(input_values=(2, 4000))),
    Network("transformers", "SpeechT5HifiGan", "vocoder", hifigan, normal(2, 30, 20)),
    Network("encodec", "EncodecModel, asked for", "audio codec", encodec, WAVE, {"include": "*"}),
    Network("torchaudio", "ConvTasNet", "source separation", conv_tasnet, normal(2, 1, 1600)),
    Network("torchaudio", "HDemucs", "source separation", hdemucs, normal(2, 2, 16384)),
    Network("pytorch-tcn", "TCN", "sequences", tcn, normal(2, 8, 40)),
    Network("onnx2torch", "MobileNetV2 from ONNX", "classification", from_onnx, PHOTO),
    Network(
        "onnx2torch",
        "MobileNetV2 from ONNX, graph layout",
        "classification",
        from_onnx,
        PHOTO,
        {"layout": "graph"},
    ),
)
