"""How an error in one weight is best made up for by the others: the curvature of a layer's loss.

Changing a weight W (O, I) by D changes what the layer writes by X D^T, so its squared error is
trace(D H D^T) with H = X^T X, the inputs' products on calibration text. Once one input's weights
are fixed, the best change of those to come is known in closed form from the inverse of H.

Optimal Brain Surgeon (Hassibi and Stork, 1993). GPTQ rounds with it, SparseGPT prunes with it.

Axes: I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def factor(products: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of the damped inverse, U^T U = H^-1, (I, I).

    Row i of U, divided by its diagonal, says how each later weight makes up for an error in i once
    the earlier ones are fixed. Computed in FP64: with few positions H is nearly singular.
    Raises ValueError where damping does not help.
    """
    h = products.double()
    h = h + damping * h.diagonal().mean().clamp(min=1e-12) * torch.eye(len(h), device=h.device)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        return torch.linalg.cholesky(inverse, upper=True).to(products.dtype)
    except torch.linalg.LinAlgError as error:
        message = f"the inputs leave H singular at a damping of {damping}; give more of either"
        raise ValueError(message) from error
