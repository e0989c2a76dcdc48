"""Singular vectors of an output matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 2**14  # of the matrix that are held in float64 at once


def right_singular(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values `(width,)`, zeros included, and right singular vectors of `(V, width)`.

    In float64, by QR decompositions of a few rows at a time: as exact as a decomposition of the
    whole, which `rows.t() @ rows`, whose condition is squared, would not be.
    """
    width = rows.shape[1]
    device = "cpu" if rows.device.type == "mps" else rows.device  # mps has no float64
    triangle = torch.zeros(0, width, dtype=torch.float64, device=device)
    for part in torch.split(rows, ROWS):
        stacked = torch.cat([triangle, part.to(triangle)])
        triangle = torch.linalg.qr(stacked, mode="r").R
    _, values, vectors = torch.linalg.svd(triangle)
    return F.pad(values, (0, width - len(values))), vectors
