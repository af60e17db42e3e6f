"""Add BatchNorm to a network that was trained without it; its outputs stay exactly as they were.

bn_vgg = retrofit.add_batchnorm(vgg, images)      # one call; images: any iterable of batches

plan     = retrofit.plan(vgg)                     # every convolution, the decision, the reason
prepared = retrofit.prepare(vgg, plan)            # the original is never touched
retrofit.calibrate(prepared, images)              # one pass; or a loop of your own
bn_vgg   = retrofit.convert(prepared)             # observers become exact identities
report   = retrofit.verify(vgg, bn_vgg, images)   # equal bit for bit?
vgg_2    = retrofit.fold(bn_vgg)                  # BatchNorm absorbed again
"""

from retrofit.calibration import calibrate
from retrofit.checkpoint import load, save
from retrofit.comparison import Difference
from retrofit.conversion import add_batchnorm, convert, insert, prepare
from retrofit.drifting import BatchDrift, DriftReport, drift
from retrofit.errors import NonFiniteError, PeerError, RetrofitError
from retrofit.finetuning import freeze_statistics, param_groups, unfreeze_statistics
from retrofit.folding import fold
from retrofit.observer import ChannelMoments, MomentObserver, channel_moments
from retrofit.parity import ParityReport, verify
from retrofit.planning import plan
from retrofit.plans import Plan, Site
from retrofit.recalibration import Recalibration, recalibrate
from retrofit.sampling import Calibration, SiteSample
from retrofit.version import __version__

__all__ = [
    "BatchDrift",
    "Calibration",
    "ChannelMoments",
    "Difference",
    "DriftReport",
    "MomentObserver",
    "NonFiniteError",
    "ParityReport",
    "PeerError",
    "Plan",
    "Recalibration",
    "RetrofitError",
    "Site",
    "SiteSample",
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
    "param_groups",
    "plan",
    "prepare",
    "recalibrate",
    "save",
    "unfreeze_statistics",
    "verify",
]
