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

from retrofit.calibration.calibrate import calibrate
from retrofit.calibration.observer import MomentObserver, channel_moments
from retrofit.calibration.recalibrate import Recalibration, recalibrate
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
from retrofit.planning.plan import plan
from retrofit.plans import Plan, Site
from retrofit.restoring.restoration import Restoration, Seat, restoration_of
from retrofit.restoring.restore import restore
from retrofit.surgery.batchnorm import LastAxisBatchNorm
from retrofit.surgery.folding import fold, unfoldable
from retrofit.surgery.record import plan_of
from retrofit.version import __version__

__all__ = [
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
    "Recalibration",
    "Restoration",
    "RetrofitError",
    "Seat",
    "Site",
    "SiteSample",
    "Verification",
    "__version__",
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


def __dir__() -> list[str]:
    """List the public names; the modules behind them are found in the source."""
    return sorted(__all__)
