"""New statistics for BatchNorms that are there: `recalibrate`, and `adapting` to a stream."""
