"""Add BatchNorm to a network that was trained without it; its outputs stay exactly as they were.

bn_vgg = retrofit.add_batchnorm(vgg, images)      # one call; images: any iterable of batches

plan     = retrofit.plan(vgg)                     # every convolution, the decision, the reason
prepared = retrofit.prepare(vgg, plan)            # the original is never touched
retrofit.calibrate(prepared, images)              # one pass; or a loop of your own
bn_vgg   = retrofit.convert(prepared)             # observers become exact identities
report   = retrofit.verify(vgg, bn_vgg, images)   # equal bit for bit?
vgg_2    = retrofit.fold(bn_vgg)                  # BatchNorm absorbed again

resnet   = retrofit.restore(resnet50(), folded, images)   # folded weights in their own class

Which module may import which stands in pyproject.toml, under [tool.importlinter].
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrofit.adaptation.adapting import Adapting, adapting
    from retrofit.adaptation.recalibrate import Recalibration, recalibrate
    from retrofit.calibration.calibrate import calibrate
    from retrofit.calibration.observer import MomentObserver, channel_moments
    from retrofit.calibration.sample_errors import Calibration, SiteSample
    from retrofit.checking.drift import BatchDrift, Drift, drift
    from retrofit.checking.verify import Verification, verify
    from retrofit.conversion import add_batchnorm, convert, insert, prepare
    from retrofit.errors import NonFiniteError, PeerError, RetrofitError
    from retrofit.files.checkpoint import load, save
    from retrofit.files.onnx_modules import module_from_onnx
    from retrofit.finetuning import freeze_statistics, param_groups, unfreeze_statistics
    from retrofit.numerics.comparison import Difference
    from retrofit.numerics.moments import ChannelMoments
    from retrofit.pictures.preparation import Preparation
    from retrofit.planning.plan import plan
    from retrofit.plans import Plan, Site
    from retrofit.restoring.restoration import Restoration, Seat, restoration_of
    from retrofit.restoring.restore import restore
    from retrofit.surgery.batchnorm import LastAxisBatchNorm
    from retrofit.surgery.folding import fold, unfoldable
    from retrofit.surgery.record import plan_of
    from retrofit.version import __version__

__all__ = [
    "Adapting",
    "BatchDrift",
    "Calibration",
    "ChannelMoments",
    "Difference",
    "Drift",
    "LastAxisBatchNorm",
    "MomentObserver",
    "NonFiniteError",
    "PeerError",
    "Plan",
    "Preparation",
    "Recalibration",
    "Restoration",
    "RetrofitError",
    "Seat",
    "Site",
    "SiteSample",
    "Verification",
    "__version__",
    "adapting",
    "add_batchnorm",
    "calibrate",
    "channel_moments",
    "convert",
    "drift",
    "fold",
    "freeze_statistics",
    "insert",
    "load",
    "module_from_onnx",
    "param_groups",
    "plan",
    "plan_of",
    "prepare",
    "recalibrate",
    "restoration_of",
    "restore",
    "save",
    "unfoldable",
    "unfreeze_statistics",
    "verify",
]

# The same modules again: each is imported when one of its names is first asked for, so that
# `import retrofit`, the help of the command and its errors about arguments wait for no torch.
_NAMES = {
    "adaptation.adapting": ("Adapting", "adapting"),
    "adaptation.recalibrate": ("Recalibration", "recalibrate"),
    "calibration.calibrate": ("calibrate",),
    "calibration.observer": ("MomentObserver", "channel_moments"),
    "calibration.sample_errors": ("Calibration", "SiteSample"),
    "checking.drift": ("BatchDrift", "Drift", "drift"),
    "checking.verify": ("Verification", "verify"),
    "conversion": ("add_batchnorm", "convert", "insert", "prepare"),
    "errors": ("NonFiniteError", "PeerError", "RetrofitError"),
    "files.checkpoint": ("load", "save"),
    "files.onnx_modules": ("module_from_onnx",),
    "finetuning": ("freeze_statistics", "param_groups", "unfreeze_statistics"),
    "numerics.comparison": ("Difference",),
    "numerics.moments": ("ChannelMoments",),
    "pictures.preparation": ("Preparation",),
    "planning.plan": ("plan",),
    "plans": ("Plan", "Site"),
    "restoring.restoration": ("Restoration", "Seat", "restoration_of"),
    "restoring.restore": ("restore",),
    "surgery.batchnorm": ("LastAxisBatchNorm",),
    "surgery.folding": ("fold", "unfoldable"),
    "surgery.record": ("plan_of",),
    "version": ("__version__",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:  # to a type checker it would say that there is every name

    def __getattr__(name: str) -> Any:
        """Import a public name, the first time that it is used."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        value = globals()[name] = getattr(module, name)
        return value


def __dir__() -> list[str]:
    """List the public names; the modules behind them are found in the source."""
    return sorted(__all__)
