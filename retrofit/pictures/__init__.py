"""Pictures from folders, arrays and tar shards, to batches."""
