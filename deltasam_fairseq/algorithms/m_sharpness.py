"""Cut a global batch into groups of M sentences, each with a perturbation of its own.

Foret et al. 2020, "Sharpness-Aware Minimization for Efficiently Improving Generalization", section
4.1 (m-sharpness). Group k has M consecutive sentences of the global batch, the last one perhaps
fewer. With N_k the number of its sentences and L_k the mean of their losses,

    eps_k = rho grad L_k(w) / ||grad L_k(w)||_2
    g     = (1/N) sum_k N_k grad L_k(w + eps_k)

and the base optimizer steps from w with g. M = N is SAM; M = 1 is per-instance perturbation
(Zhou et al., "Sharpness-Aware Minimization with Dynamic Reweighting", Eq. 2).
"""

from typing import List, NamedTuple, Sequence


class Part(NamedTuple):
    """Consecutive sentences of one mini-batch.

    Attributes:
        batch: index of the mini-batch.
        begin, end: of the sentences in it; ``end`` is not included.
    """

    batch: int
    begin: int
    end: int


def groups_of(sizes: Sequence[int], m: int) -> List[List[Part]]:
    """Cut the sentences of all mini-batches, one after the other, into groups of ``m``.

    ``groups_of([3, 2], 2)`` is ``[[(0, 0, 2)], [(0, 2, 3), (1, 0, 1)], [(1, 1, 2)]]``.

    Args:
        sizes: number of sentences of every mini-batch in the global order, at least 0.
        m: sentences of a group, at least 1.

    Returns:
        the parts of each group; no part is empty, and only the last group may have fewer than ``m``
        sentences. They do not depend on how the sentences are split into mini-batches.
    """
    groups: List[List[Part]] = []
    room = 0  # in the last group
    for batch, size in enumerate(sizes):
        begin = 0
        while begin < size:
            if not room:
                groups.append([])
                room = m
            end = min(size, begin + room)
            groups[-1].append(Part(batch, begin, end))
            room -= end - begin
            begin = end
    return groups
