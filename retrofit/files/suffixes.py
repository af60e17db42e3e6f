"""What weights files are called."""

PICKLED = (".pth", ".pt")
SUFFIXES = (".safetensors", *PICKLED)  # of what is written
READ = (*SUFFIXES, ".ckpt", ".bin")  # of what is read, by its content
KINDS = " or ".join((", ".join(READ[:-1]), READ[-1]))
