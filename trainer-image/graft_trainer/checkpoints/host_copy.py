"""Copies of tensors in host memory. This copy is the only part of a checkpoint that training waits for."""

import contextlib
import logging
import mmap
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)
PIECE = 64 * 2**20  # bytes that are page-locked at a time: meanwhile the GPU accepts no work
ALIGNMENT = 64  # bytes


class Place(NamedTuple):
    """The place of a buffer in the pieces of memory."""

    piece: int  # index of the piece
    offset: int  # bytes


class HostCopy:
    """Copies tensors into buffers that it reuses. Only one copy exists at a time.

    The buffers for a GPU's tensors are page-locked, so the copy runs at the speed of the bus. Locking takes long,
    mostly because the system must first allocate the pages. Therefore the pages are written once before they are
    locked. That write delays neither the GPU nor Python.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._locked: list[Tensor] = []
        self._lockable = True
        weakref.finalize(self, _unlock, self._locked)

    def reserve(self, tensors: dict[str, Tensor]) -> None:
        """Allocate the buffers for copies of these tensors, unless they already exist."""
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
                # Written once, so that the system allocates the pages now: too little memory shows in the first step.
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype).zero_()

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the tensors, by name. The next call overwrites them."""
        self.reserve(tensors)
        copies = {name: self._buffers[name] for name in tensors}
        for name, tensor in tensors.items():
            copies[name].copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _piece(self, size: int) -> Tensor:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        piece = torch.frombuffer(memory, dtype=torch.uint8).zero_()
        if self._lockable:
            try:
                torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), size, 0)))
                self._locked.append(piece)
            except RuntimeError as error:  # some nodes limit the memory that a process may lock
                log.warning("memory cannot be page-locked, so training waits longer for each checkpoint: %s", error)
                self._lockable = False
                # This clears the error. CUDA would raise it again at this thread's next kernel.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda")
        return piece


def arrange(sizes: dict[str, int], piece: int) -> tuple[dict[str, Place], list[int]]:
    """Return a place for each buffer in pieces of memory, and the sizes of the pieces in bytes (PURE).

    A piece has at most `piece` bytes, or the size of one buffer that is larger. No piece is larger than its buffers
    need.
    """
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
        # Only after the unlock: this may free the memory, which must not be reused while it counts as locked.
        del piece
