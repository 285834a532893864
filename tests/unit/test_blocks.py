from __future__ import annotations

import numpy as np
import pytest

from inferflux.kv.arena import Bytes
from inferflux.kv.blocks import COVERED_BYTES, BlockShape, Part, clear, heads_of_rank, is_first_of_replicas, slot_digest
from inferflux.kv.digests import DIGEST_BYTES

PIECE = COVERED_BYTES // 2
SHAPE = BlockShape(num_layers=3, num_heads=4, piece_bytes=PIECE)
BLOCK = np.random.default_rng(7).integers(0, 256, (3, 4, PIECE), np.uint8)


def part(rank: int, num_ranks: int) -> Part:
    return Part(SHAPE, range(SHAPE.num_layers), heads_of_rank(rank, num_ranks, SHAPE.num_heads))


def share(of: Part) -> list[Bytes]:
    """What a rank has of the block in its own cache."""
    return [np.ascontiguousarray(layer[of.heads.start : of.heads.stop]).reshape(-1) for layer in BLOCK[of.layers]]


def written(*parts: Part) -> Bytes:
    slot = np.full(SHAPE.slot_bytes, 0xEE, np.uint8)
    clear(slot, SHAPE.num_pieces)
    for of in parts:
        of.copy_out(share(of), slot)
    return slot


def read(slot: Bytes, of: Part) -> tuple[bytes, list[Bytes]]:
    block = [np.zeros_like(layer) for layer in share(of)]
    return of.copy_in(slot, block), block


@pytest.mark.parametrize("num_writers", [1, 2, 4])
@pytest.mark.parametrize("num_readers", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(num_writers: int, num_readers: int) -> None:
    slot = written(*(part(rank, num_writers) for rank in range(num_writers)))

    assert (slot[: BLOCK.size] == written(Part.whole(SHAPE))[: BLOCK.size]).all()
    for rank in range(num_readers):
        digest, block = read(slot, part(rank, num_readers))
        assert digest == slot_digest(slot, SHAPE.num_pieces)
        assert all((a == b).all() for a, b in zip(block, share(part(rank, num_readers)), strict=True))


def test_stages_of_a_pipeline_write_layers_side_by_side() -> None:
    heads = range(SHAPE.num_heads)
    slot = written(Part(SHAPE, range(2), heads), Part(SHAPE, range(2, 3), heads))

    assert slot.tobytes() == written(Part.whole(SHAPE)).tobytes()


@pytest.mark.parametrize("num_writers", [1, 2, 4])
@pytest.mark.parametrize("at", [0, PIECE + 5, PIECE - 1, 3 * 4 * PIECE - 1])
def test_a_flipped_bit_is_noticed_by_the_ranks_whose_heads_share_its_digest(at: int, num_writers: int) -> None:
    writers = [part(rank, num_writers) for rank in range(num_writers)]
    slot = written(*writers)
    digest = slot_digest(slot, SHAPE.num_pieces)
    slot[at] ^= 1

    noticed = [read(slot, part(rank, 4))[0] != digest for rank in range(4)]
    covered = writers[0].num_covered
    assert covered == min(2, 4 // num_writers)
    assert noticed == [rank // covered == at // PIECE % 4 // covered for rank in range(4)]
    assert read(slot, Part.whole(SHAPE))[0] != digest


def test_a_flipped_bit_in_the_digests_is_noticed_by_whoever_trusts_it() -> None:
    slot = written(Part.whole(SHAPE))
    digest = slot_digest(slot, SHAPE.num_pieces)
    slot[-2 * DIGEST_BYTES] ^= 1  # of the last two heads of the last layer

    assert [read(slot, part(rank, 2))[0] == digest for rank in range(2)] == [False, True]


def test_a_digest_where_none_should_be_is_noticed_by_all() -> None:
    slot = written(Part.whole(SHAPE))
    digest = slot_digest(slot, SHAPE.num_pieces)
    slot[3 * 4 * PIECE + DIGEST_BYTES] = 1

    assert all(read(slot, part(rank, 4))[0] != digest for rank in range(4))


def test_a_part_that_nobody_wrote_is_noticed() -> None:
    slot = written(Part.whole(SHAPE))
    clear(slot, SHAPE.num_pieces)
    part(0, 2).copy_out(share(part(0, 2)), slot)
    digest = slot_digest(slot, SHAPE.num_pieces)

    assert read(slot, part(1, 2))[0] != digest


def test_a_slot_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="takes"):
        Part.whole(SHAPE).copy_in(np.zeros(SHAPE.slot_bytes - 1, np.uint8), share(Part.whole(SHAPE)))


@pytest.mark.parametrize(
    ("num_ranks", "num_heads", "heads", "writers"),
    [
        (1, 3, [range(3)], [True]),
        (2, 4, [range(2), range(2, 4)], [True, True]),
        (4, 2, [range(1), range(1), range(1, 2), range(1, 2)], [True, False, True, False]),
        (2, 1, [range(1), range(1)], [True, False]),
    ],
)
def test_ranks_share_heads_as_vllm_does(
    num_ranks: int, num_heads: int, heads: list[range], writers: list[bool]
) -> None:
    assert [heads_of_rank(rank, num_ranks, num_heads) for rank in range(num_ranks)] == heads
    assert [is_first_of_replicas(rank, num_ranks, num_heads) for rank in range(num_ranks)] == writers
