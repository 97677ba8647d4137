"""packing: several examples in one sequence, each attending to itself only, so that no work is spent on padding.

The model is told by positions: they start at 0 with each example. Where it is given positions and no attention mask,
transformers keeps what lies between two zeros apart (masking_utils.find_packed_sequence_indices), with a block-diagonal
mask for sdpa and eager attention and with sequence lengths for flash attention. Not every architecture does; check_packing
asks the model itself.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, overload

import torch
from graft.contracts.progress import Reason

from graft_trainer.data.tokens import IGNORED, Collator, Tokenised
from graft_trainer.run.failures import Failure

Pack = list[Tokenised]  # examples that share one sequence
TOLERANCE = (
    0.1  # root mean square, of the logits' standard deviation: rounding in 16 bits is ten times less, a leak far more
)


class Packs(Sequence[Pack]):
    """Examples in packs, put together when they are asked for."""

    def __init__(self, examples: Sequence[Tokenised], places: list[list[int]]) -> None:
        self.examples = examples
        self.places = places  # of each pack's examples

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
    """The examples in as few sequences of at most `max_length` tokens as best-fit decreasing finds (Ding et al. 2024):
    the longest first, each into the fullest sequence that still has room for it. The same examples give the same packs."""
    packs: list[list[int]] = []
    sizes = [item.tokens for item in examples]
    with_room: dict[int, list[int]] = {}  # tokens of room -> packs that have as much
    rooms: list[int] = []  # the keys of with_room, in order
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
    """Packs -> a batch, filled up on the right to its longest."""

    def __call__(self, packs: Sequence[Any]) -> dict[str, torch.Tensor]:
        """input_ids, position_ids and labels, each (packs, longest). The filling counts its own positions, so it is one
        more sequence that nothing attends to. There is no attention_mask: with one, positions are not looked at."""
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
                # An example's first token would be predicted from the last one of the example before it.
                labels[row, begin + 1 : end] = torch.from_numpy(learned[1:])
                positions[row, begin:end] = torch.arange(item.tokens)
                begin = end
            positions[row, begin:] = torch.arange(width - begin)
            self.tokens += begin
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


def check_packing(model: Any, example: Tokenised, name: str) -> None:
    """Failure(ConfigurationInvalid) unless the model answers to an example behind another one as it does to it alone."""
    refused = Failure(
        Reason.CONFIGURATION_INVALID,
        f"training.packing is true, but in {name} examples that share a sequence would see each other",
        "Set training.packing to false.",
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
    except (TypeError, ValueError) as error:  # an architecture without positions
        raise refused from error
    finally:
        model.train(training)
    if float((behind - expected).square().mean().sqrt()) > TOLERANCE * float(expected.std()):
        raise refused
