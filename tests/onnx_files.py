"""Networks as ONNX files, in the ways that torch exports them."""

import warnings

import onnx
import pytest
import torch
from onnx import parser

PRESERVE = torch.onnx.TrainingMode.PRESERVE
# The defaults of both exporters, which merge BatchNorms and rename, and those that keep everything.
EXPORTS = {
    "dynamo": {"dynamo": True},
    "dynamo, whole": {"dynamo": True, "optimize": False},
    "script": {"dynamo": False},
    "script, whole": {"dynamo": False, "training": PRESERVE, "do_constant_folding": False},
}
# Of torch 2.6 it fails at any BatchNorm in eval mode.
dynamo_knows_batchnorm = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6's newer exporter fails at BatchNorm"
)
HOW = ["dynamo", "script", *(pytest.param(h, marks=pytest.mark.slow) for h in EXPORTS if "," in h)]


def export(model, example, file, how="script", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, that it is older
        torch.onnx.export(model, (example,), file, **{"verbose": False, **EXPORTS[how], **options})
    return file


def written(file, text, *, opset=17, domain=""):
    """A file from ONNX's textual form of a graph."""
    other = f', "{domain}" : 1' if domain else ""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{other}]>\n{text}')
    onnx.save(model, file)
    return file
