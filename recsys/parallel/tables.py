"""The sharded tables: torchrec's, with exchanges of our own, or none where nobody is there to exchange with."""

from collections.abc import Iterator
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from torchrec import KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist

from recsys.parallel.exchange import AllToAll, Scatter


class Tables(ShardedEmbeddingBagCollection):  # type: ignore[misc]
    """Keeps data_parallel tables out of DDP, since their optimizer takes the gradient inside the backward pass; sends
    what was looked up over gloo by exchanges of our own. A lone rank on CPU whose tables are whole looks
    up without any: the way through torchrec's exchanges takes up to 1 ms a step there."""

    def leave_ddp(self) -> None:
        """Takes off the wrapper that torchrec needs while it builds the module."""
        for at, lookup in enumerate(self._lookups):
            self._lookups[at] = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup

    def exchange_over_gloo(self) -> None:
        """Takes the place of torchrec's exchanges of row_wise and of table_wise lookups that send fp32 over gloo."""
        for output in self._output_dists if self._device.type == "cpu" and self._env.world_size > 1 else ():
            if isinstance(output, RwPooledEmbeddingDist) and output._codecs is None:
                output._dist = Scatter(output._pg)
            elif isinstance(output, TwPooledEmbeddingDist) and output._codecs is None and not output._callbacks:
                output._dist = AllToAll(output._pg, widths=output._dim_sum_per_rank)

    def forward(self, features: KeyedJaggedTensor) -> Any:
        """The sums of each feature's rows, a KeyedTensor or, through torchrec, what becomes one."""
        if self._has_uninitialized_input_dist or not self._whole_and_alone():
            return super().forward(features)  # the first call finds the order of the features, too
        if self._has_features_permute:
            features = features.permute(self._features_order, self._features_order_tensor)
        [lookup] = self._lookups
        return KeyedTensor(self._embedding_names, self._embedding_dims, lookup(features))

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        yield from (f"{prefix}.{name}" if prefix else name for name, _ in self.named_parameters())

    def _whole_and_alone(self) -> bool:
        whole = self._sharding_types == [ShardingType.TABLE_WISE.value]
        return bool(whole and self._env.world_size == 1 and self._device.type == "cpu")
