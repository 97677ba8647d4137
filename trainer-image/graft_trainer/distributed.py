"""Which of the run's processes this is. One process per GPU, one per pod without GPUs; torchrun's variables say which."""

import os


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of its pod, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process reports, evaluates and publishes."""
    return rank() == 0
