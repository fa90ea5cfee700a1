"""How far a training run has come: all that a resumed run has to know beside the weights."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """`position` counts the rows of the current epoch taken by all ranks, `rows` those of all epochs.

    `stale` counts the evaluations since the best one. Randomness needs no entry: data order is a function of seed and
    epoch, dropout of seed, step and rank.
    """

    seed: int
    step: int = 0
    epoch: int = 0
    position: int = 0
    rows: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0

    def after_step(self, global_rows: int, *, epoch_rows: int) -> "Progress":
        """One step further; the end of an epoch is the start of the next."""
        ended = self.position + global_rows >= epoch_rows
        return replace(
            self,
            step=self.step + 1,
            rows=self.rows + global_rows,
            epoch=self.epoch + ended,
            position=0 if ended else self.position + global_rows,
        )

    def after_evaluation(self, value: float) -> "Progress":
        """`value` is better the higher it is."""
        if self.best_value is None or value > self.best_value:
            return replace(self, best_step=self.step, best_value=value, stale=0)
        return replace(self, stale=self.stale + 1)
