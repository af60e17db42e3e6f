"""The command `restore`: folded weights back in their own class, compared, written."""

from __future__ import annotations

from pathlib import Path

import retrofit
from retrofit.cli.data_sources import check_device, sample_for
from retrofit.cli.requests import RestoreRequest, may_end_early
from retrofit.cli.sample import naming
from retrofit.cli.terminal import Terminal, if_stopped
from retrofit.files.checkpoint import check_output
from retrofit.files.model_sources import build, code_of, preparation_in
from retrofit.files.shards import located


def run_restore(request: RestoreRequest, terminal: Terminal) -> int:
    """Restore the BatchNorms of a folded network, and save it as the weights of its class."""
    check_output(request.output, overwrite=request.overwrite)
    check_device(request.pictures)
    located(Path(request.weights))  # before the wait for all else
    architecture = build(request.model, request.model_args).eval()
    told = preparation_in(request.weights)
    sample = sample_for(architecture, request.model, request.pictures, told=told)
    sample.announce(terminal, at_most=may_end_early(request))
    batches = sample.batches()
    with naming(batches), if_stopped(f"{request.output} is not written"):
        restored = retrofit.restore(
            architecture,
            request.weights,
            batches,
            device=request.pictures.device,
            max_images=request.pictures.images,
            tolerance=request.tolerance,
            weights_key=request.weights_key,
            progress=terminal.progress,
        )
    found = retrofit.restoration_of(restored)
    assert found is not None
    data = f"restored on {found.images} {sample.kind} of {sample.source}"
    terminal.say(f"writing {request.output}")
    retrofit.save(
        restored,
        request.output,
        name=request.model,
        model_args=request.model_args,
        data=data,
        preparation=sample.preparation,
        overwrite=request.overwrite,
    )
    sample.list_bad(terminal, batches.bad)
    sample.warn_of_guess(terminal)
    loading = _loading(request)
    terminal.show(*sample.worded(found._parts()), f"written: {request.output}\nto load: {loading}")
    terminal.tell(restoration=found, written=str(request.output), loading=loading)
    return 0


def _loading(request: RestoreRequest) -> str:
    """Write the line of Python that loads the file into a fresh `network`."""
    path = repr(str(request.output))
    safe = request.output.suffix == ".safetensors"
    read = f"safetensors.torch.load_file({path})" if safe else f"torch.load({path})"
    made = code_of(request.model, request.model_args)
    return f"network = {made}; network.load_state_dict({read})"
