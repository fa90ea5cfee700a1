"""One step's rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one step: ids int64, the rest float32. Padding rows have weight 0 and ids 0.

    `global_rows` counts the real rows of the step over all ranks.
    """

    ids_BF: Tensor
    dense_BN: Tensor
    labels_BT: Tensor
    weights_B: Tensor
    global_rows: int

    def to(self, device: torch.device) -> "Batch":
        """The same rows on a device, copied without waiting."""
        tensors = (self.ids_BF, self.dense_BN, self.labels_BT, self.weights_B)
        ids_BF, dense_BN, labels_BT, weights_B = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(ids_BF, dense_BN, labels_BT, weights_B, self.global_rows)
