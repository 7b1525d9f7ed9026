"""Functional SAM's descent: output gradients of w, through the Jacobian at ``w + eps*``."""

from deltasam_fairseq.core.parts import Descent


class Functional(Descent):
    """The step along ``J_z(w + eps*)^T dL/dz(w)``, see `functional_loss`."""

    along_outputs = True

    def describe(self) -> str:
        return "functional: output gradients at w"
