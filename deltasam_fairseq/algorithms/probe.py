"""Draw the random direction of Eq. 3, the same on every process without communication."""

from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, List, Sequence

import torch
from torch import Tensor

from deltasam_fairseq.algorithms.rounding import unit_roundoff
from deltasam_fairseq.algorithms.sam import global_norm

PROBE, ROUNDING, SENTENCES, TRUST_REGION = 0, 1, 2, 3

PIECE = 1 << 20  # numbers of a direction that one thread draws at a time

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """Map neighbouring integers to unrelated ones: finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def update_generator(
    seed: int, update: int, use: int, device: torch.device, rank: int = 0
) -> torch.Generator:
    """Return a random generator for one use in one update.

    It depends on its arguments only, so that all processes and a resumed run draw the same numbers,
    and is separate from the global generators, so that dropout masks stay. The seed is mixed
    because fairseq seeds its dropout with ``seed + update``.

    Args:
        seed: the run's seed.
        update: number of updates done.
        use: of the numbers within an update: `PROBE`, `ROUNDING`, `SENTENCES`,
            `TRUST_REGION`.
        device: where the numbers are drawn.
        rank: of this process if each draws its own numbers; 0 if all draw the same.

    Returns:
        a seeded generator on ``device``.
    """
    generator = torch.Generator(device=device)
    mixed = _mix(_mix(_mix(seed & _MASK) ^ (update & _MASK)) ^ use ^ (rank << 8))
    generator.manual_seed(mixed >> 1)
    return generator


def probe_generator(seed: int, update: int, device: torch.device) -> torch.Generator:
    """Return the `update_generator` of the probe's direction."""
    return update_generator(seed, update, PROBE, device)


def draw_direction_(out: List[Tensor], generator: torch.Generator) -> Tensor:
    """Draw ``u ~ N(0, I)`` into a list of tensors.

    Args:
        out: receives ``u``; one tensor a weight, in the same order on every process.
        generator: see `probe_generator`.

    Returns:
        ``||u||_2``, 0-dim float64.
    """
    fill_direction_(out, generator, torch.get_num_threads())
    return global_norm(out)


def fill_direction_(out: List[Tensor], generator: torch.Generator, threads: int) -> None:
    """Draw as `draw_direction_`, without the norm.

    On a CPU several threads draw pieces, each with a generator of its own: one generator uses one
    thread, half a second for the weights of RoBERTa base on any number of cores. The numbers do not
    depend on the number of threads.

    Args:
        out, generator: as in `draw_direction_`.
        threads: number of threads on a CPU, at least 1.
    """
    if out and out[0].device.type == "cpu":
        dense = torch.contiguous_format
        flat = [u if u.is_contiguous() else torch.empty_like(u, memory_format=dense) for u in out]
        _draw_pieces_([piece for u in flat for piece in _pieces(u)], generator, threads)
        for u, drawn in zip(out, flat):
            if drawn is not u:
                u.copy_(drawn)
    else:
        for u in out:
            u.normal_(generator=generator)


def directions(like: Sequence[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the same ``u`` in float32, a tensor at a time.

    On a CPU it draws enough tensors ahead to keep every thread busy.

    Args:
        like: tensors of the shapes, on the device.
        generator: see `probe_generator`.
    """
    threads, ahead, waiting = torch.get_num_threads(), [], 0
    for i, v in enumerate(like, start=1):
        u = torch.empty_like(v, dtype=torch.float32, memory_format=torch.contiguous_format)
        ahead.append(u)
        waiting += u.numel()
        if u.device.type != "cpu" or waiting >= threads * PIECE or i == len(like):
            fill_direction_(ahead, generator, threads)
            yield from ahead
            ahead, waiting = [], 0


def direction_sum(like: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Return ``sum_i u_i / sqrt(d)``; processes compare it to check that they draw alike.

    It is N(0, 1) over the seeds. Equal numbers give equal sums; numbers that differ in the last
    bit, by the rounding of different processors, give sums equal to 1e-7.

    Args:
        like, generator: as in `directions`.

    Returns:
        0-dim float64.
    """
    sums = [u.sum(dtype=torch.float64) for u in directions(like, generator)]
    return torch.stack(sums).sum() / sum(v.numel() for v in like) ** 0.5


def _pieces(u: Tensor) -> List[Tensor]:
    return list(u.view(-1).split(PIECE))


def _draw_pieces_(pieces: List[Tensor], generator: torch.Generator, threads: int) -> None:
    seeds = torch.randint(_MASK >> 1, (len(pieces),), generator=generator).tolist()

    def draw(piece: Tensor, seed: int) -> None:
        piece.normal_(generator=torch.Generator().manual_seed(seed))

    threads = min(threads, len(pieces))
    if threads <= 1:
        for piece, seed in zip(pieces, seeds):
            draw(piece, seed)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(draw, pieces, seeds):
            pass


def resolvable_radius(weights: List[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the radius of a probe in half precision.

    ``R = 0.35 cbrt(unit roundoff of dtype) ||w||_2``

    This is the textbook step of a central difference in the weight vector: the relative error of
    ``a_j`` from rounding falls as 1/R, that from the loss's third derivative grows as R^2, and they
    balance where R is proportional to the cube root of the roundoff (Nocedal and Wright 2006,
    section 8.1). The factor was measured, see docs/half_precision.md. R is far from rho, but ``g``
    and ``r`` (Eq. 4, 5) do not change if all ``a_j`` are multiplied by one number.

    Args:
        weights: the weights that the probe moves.
        dtype: precision of the forward.

    Returns:
        0-dim float64, on the device of the weights.
    """
    return 0.35 * unit_roundoff(dtype) ** (1 / 3) * global_norm(weights)
