"""Which GPUs a pytest process begins with."""


def rotated(gpus: list[str], worker: str) -> str:
    """Return ``CUDA_VISIBLE_DEVICES`` of a pytest-xdist worker ("gw5"): all GPUs, since a test may use several.

    Each process begins with another, which is where tests of one GPU run.
    """
    first = int(worker.removeprefix("gw")) % len(gpus)
    return ",".join(gpus[first:] + gpus[:first])
