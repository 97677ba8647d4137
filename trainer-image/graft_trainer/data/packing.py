"""Packing: several examples share one sequence and each attends only to itself, so that no compute is spent on padding.

The positions start at 0 with each example. If a model gets positions and no attention mask, transformers separates the
examples where a position is 0 (masking_utils.find_packed_sequence_indices): with a block-diagonal mask for sdpa and
eager attention, with sequence lengths for flash attention. Not every architecture does so. check_packing tests the
model itself.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, overload

import torch
from graft.contracts.progress import Reason

from graft_trainer.data.tokens import IGNORED, Collator, Tokenised
from graft_trainer.run.failures import Failure

Pack = list[Tokenised]  # examples that share one sequence
# Root mean square difference of the logits, as a share of their standard deviation. Rounding in 16 bits causes a tenth
# of this, attention to another example far more.
TOLERANCE = 0.1


class Packs(Sequence[Pack]):
    """Packs of examples. A pack is put together when it is accessed."""

    def __init__(self, examples: Sequence[Tokenised], places: list[list[int]]) -> None:
        self.examples = examples
        self.places = places  # the indices of each pack's examples

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Pack: ...
    @overload
    def __getitem__(self, index: slice) -> "Packs": ...
    def __getitem__(self, index: int | slice) -> "Pack | Packs":
        if isinstance(index, slice):
            return Packs(self.examples, self.places[index])
        return [self.examples[place] for place in self.places[index]]


def pack(examples: Sequence[Tokenised], max_length: int) -> Packs:
    """Pack the examples into sequences of at most `max_length` tokens, by best-fit decreasing (Ding et al. 2024): the
    longest example first, each into the fullest sequence in which it still fits. The same examples give the same
    packs."""
    packs: list[list[int]] = []
    sizes = [item.tokens for item in examples]
    with_room: dict[int, list[int]] = {}  # free tokens -> the packs with as many free tokens
    rooms: list[int] = []  # the keys of with_room, ascending
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        place = bisect_left(rooms, sizes[number])
        if place == len(rooms):
            packs.append([number])
            index, room = len(packs) - 1, max_length
        else:
            room = rooms[place]
            index = with_room[room].pop()
            packs[index].append(number)
            if not with_room[room]:
                del with_room[room], rooms[place]
        left = room - sizes[number]
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(index)
    return Packs(examples, packs)


class PackCollator(Collator):
    """Turn packs into a batch, padded on the right to the longest pack."""

    def __call__(self, packs: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return input_ids, position_ids and labels, each (packs, longest). The padding has its own positions from 0,
        so it is a separate sequence and no example attends to it. There is no attention_mask: with a mask, transformers
        does not use the positions to separate examples."""
        longest: int = max(sum(item.tokens for item in chosen) for chosen in packs)
        width = -(-longest // self.multiple) * self.multiple
        ids = torch.full((len(packs), width), self.pad)
        labels = torch.full((len(packs), width), IGNORED)
        positions = torch.empty((len(packs), width), dtype=torch.long)
        for row, chosen in enumerate(packs):
            begin = 0
            for item in chosen:
                end = begin + item.tokens
                read, learned = item.arrays()
                ids[row, begin:end] = torch.from_numpy(read)
                # No label for an example's first token: the last token of the previous example would predict it.
                labels[row, begin + 1 : end] = torch.from_numpy(learned[1:])
                positions[row, begin:end] = torch.arange(item.tokens)
                begin = end
            positions[row, begin:] = torch.arange(width - begin)
            self.tokens += begin
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


def check_packing(model: Any, example: Tokenised, name: str) -> None:
    """Check that the model gives an example the same logits behind another example as alone. Raises
    Failure(ConfigurationInvalid) if it does not."""
    refused = Failure(
        Reason.CONFIGURATION_INVALID,
        f"spec.training.packing is true, but in {name} examples that share a sequence would attend to each other",
        "Set spec.training.packing to false.",
    )
    ids = torch.tensor([example.input_ids[:32]], device=model.device)
    alone = torch.arange(ids.shape[1], device=ids.device)[None]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            expected = model(input_ids=ids, position_ids=alone, use_cache=False).logits.float()
            both, positions = torch.cat([ids.flip(1), ids], 1), torch.cat([alone, alone], 1)
            behind = model(input_ids=both, position_ids=positions, use_cache=False).logits[:, ids.shape[1] :].float()
    except (TypeError, ValueError) as error:  # the architecture takes no positions
        raise refused from error
    finally:
        model.train(training)
    if float((behind - expected).square().mean().sqrt()) > TOLERANCE * float(expected.std()):
        raise refused
