"""Copies of tensors in the host's memory, which is all of a checkpoint that training waits for."""

import contextlib
import logging
import mmap
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)
PIECE = 64 * 2**20  # bytes that are page-locked at a time: a GPU takes no work meanwhile
ALIGNMENT = 64  # bytes


class Place(NamedTuple):
    """Where a buffer lies."""

    piece: int
    offset: int  # bytes


class HostCopy:
    """Copies in buffers that are used again; one copy exists at a time.

    Buffers for a GPU's tensors are page-locked, so they fill at the speed of the bus. Locking takes long, most of it for
    pages that the system has not given yet: those are touched first, which holds up neither the GPU nor Python.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._locked: list[Tensor] = []
        self._lockable = True
        weakref.finalize(self, _unlock, self._locked)

    def reserve(self, tensors: dict[str, Tensor]) -> None:
        """Make the buffers that copies of these tensors need, unless they are there."""
        if all(_kind(self._buffers.get(name)) == _kind(tensor) for name, tensor in tensors.items()):
            return
        self._buffers = {}
        _unlock(self._locked)
        places, sizes = arrange({name: tensor.nbytes for name, tensor in tensors.items() if tensor.is_cuda}, PIECE)
        pieces = [self._piece(size) for size in sizes]
        for name, tensor in tensors.items():
            if name in places:
                at = places[name]
                memory = pieces[at.piece][at.offset : at.offset + tensor.nbytes]
                self._buffers[name] = memory.view(tensor.dtype).view(tensor.shape)
            else:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The copies, by the tensors' names; the next call writes over them."""
        self.reserve(tensors)
        copies = {name: self._buffers[name] for name in tensors}
        for name, tensor in tensors.items():
            copies[name].copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _piece(self, size: int) -> Tensor:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        piece = torch.frombuffer(memory, dtype=torch.uint8).zero_()
        if self._lockable:
            try:
                torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), size, 0)))
                self._locked.append(piece)
            except RuntimeError as error:  # how much a process may lock is limited on some nodes
                log.warning("training waits longer for its checkpoints, memory cannot be page-locked: %s", error)
                self._lockable = False
                with contextlib.suppress(RuntimeError):  # CUDA would tell it once more, at this thread's next kernel
                    torch.zeros(1, device="cuda")
        return piece


def arrange(sizes: dict[str, int], piece: int) -> tuple[dict[str, Place], list[int]]:
    """A place for each buffer in pieces of memory, and the sizes of the pieces, all in bytes: `piece`, or more for a buffer
    that is larger, and the last one no more than it needs (PURE)."""
    places: dict[str, Place] = {}
    used: list[int] = []
    for name, size in sizes.items():
        if not used or used[-1] + size > piece:
            used.append(0)
        places[name] = Place(len(used) - 1, used[-1])
        used[-1] += -(-size // ALIGNMENT) * ALIGNMENT
    return places, [max(size, 1) for size in used]


def _kind(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _unlock(pieces: list[Tensor]) -> None:
    while pieces:
        piece = pieces.pop()
        torch.cuda.cudart().cudaHostUnregister(piece.data_ptr())
        del piece  # not before: the memory may go with it, and must not be given to others while it counts as locked
