"""How many images are enough by default: docs/results.md has what fewer and more of them bring."""

# Of the channel's standard deviation: standard errors that calibration may end at.
TOLERANCE = 0.05
# To re-estimate statistics on.
RECALIBRATION_IMAGES = 256
