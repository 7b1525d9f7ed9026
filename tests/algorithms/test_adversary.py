"""Norms, steps and projections of perturbations, worked by hand."""

import math

import pytest
import torch

from deltasam_fairseq.algorithms import freelb_start, normalised, project, sentence_norm

# Two sentences of one token and two dimensions: lengths 5 and 0.5, largest entries 4 and 0.4.
DELTA = torch.tensor([[[3.0, -4.0]], [[0.3, 0.4]]])


def test_norms_are_a_sentences_own():
    assert sentence_norm(DELTA, 2).flatten().tolist() == pytest.approx([5, 0.5])
    assert sentence_norm(DELTA, math.inf).flatten().tolist() == pytest.approx([4, 0.4])


def test_norm_runs_over_all_tokens():
    """Tokens (1, 2) and (2, 4): sqrt(1 + 4 + 4 + 16) = 5."""
    delta = torch.tensor([[[1.0, 2.0], [2.0, 4.0]]])
    assert sentence_norm(delta, 2).item() == 5
    assert sentence_norm(delta, math.inf).item() == 4


def test_normalised():
    torch.testing.assert_close(normalised(DELTA, 2)[0, 0], torch.tensor([0.6, -0.8]))
    torch.testing.assert_close(normalised(DELTA, 2)[1, 0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(normalised(DELTA, math.inf)[0, 0], torch.tensor([0.75, -1.0]))


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_gradient_without_direction_moves_nothing_and_no_other_sentence(norm, bad):
    gradient = torch.cat([torch.full((1, 1, 2), bad), DELTA[1:]])
    unit = normalised(gradient, norm)
    assert unit[0].tolist() == [[0, 0]]
    torch.testing.assert_close(unit[1:], normalised(DELTA[1:], norm))


def test_normalised_of_numbers_whose_squares_vanish():
    """1e-30 squared is below float32's range: without scaling first, 0 / 0."""
    torch.testing.assert_close(normalised(DELTA * 1e-30, 2), normalised(DELTA, 2))


def test_projection_shortens_what_is_outside_only():
    """To the ball of radius 1: (3, -4) / 5; (0.3, 0.4) stays. Linf: each entry is clamped."""
    torch.testing.assert_close(project(DELTA, 1, 2)[0, 0], torch.tensor([0.6, -0.8]))
    assert torch.equal(project(DELTA, 1, 2)[1], DELTA[1])
    assert project(DELTA, 1, math.inf)[0].tolist() == [[1, -1]]
    assert torch.equal(project(DELTA, 1, math.inf)[1], DELTA[1])
    assert torch.equal(project(torch.zeros(1, 2, 2), 1, 2), torch.zeros(1, 2, 2))


class TestFreeLBStart:
    MASK = torch.tensor([[True] * 50, [True] * 20 + [False] * 30])

    def start(self, magnitude, norm):
        torch.manual_seed(1)
        return freelb_start(self.MASK, 64, magnitude, norm, torch.float64)

    def test_l2_size_does_not_depend_on_the_length(self):
        """Uniform in [-1, 1] has variance 1/3, so the norm is about 0.577 magnitude."""
        sizes = sentence_norm(self.start(0.4, 2), 2).flatten()
        torch.testing.assert_close(
            sizes, torch.full((2,), 0.4 / 3**0.5).double(), rtol=0.05, atol=0
        )

    def test_linf(self):
        size = sentence_norm(self.start(0.4, math.inf), math.inf)
        assert (size <= 0.4).all() and (size > 0.39).all()

    @pytest.mark.parametrize("norm", [2, math.inf])
    def test_padding_is_zero_and_magnitude_zero_is_none(self, norm):
        assert (self.start(0.4, norm)[1, 20:] == 0).all()
        assert (self.start(0.0, norm) == 0).all()
