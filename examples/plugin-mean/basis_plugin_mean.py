"""A merge method of one's own, as a package: `pip install .`, then `basis merge a b --base c --method mean`."""

import torch
from torch import Tensor

from basiscli import transform


@transform("merge", elementwise=True)
def mean(base: Tensor, others: list[Tensor], *, keep_base: bool = True) -> Tensor:
    """Plain average, with the base as one of the models unless told otherwise."""
    models = [base, *others] if keep_base else others
    return torch.stack(models).mean(0)
