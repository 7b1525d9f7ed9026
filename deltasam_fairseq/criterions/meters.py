"""A meter that gathers what a validation predicts, for metrics that no sum over batches gives."""

from typing import Any, Type

from fairseq.logging import meters as fairseq_meters
from fairseq.logging import metrics


class GatheringMeter(fairseq_meters.MetersDict._DerivedMeter):
    """Base of such meters: what they gather stays in the process and never enters a checkpoint.

    fairseq saves every meter of a validation by the name of its class, looks that name up in its
    own module when a run resumes, and has no way to register one. It does not save meters of its
    class for derived values, so this is a subclass of that. `MetersDict.reset` skips those;
    `gather` resets them.
    """

    def __init__(self) -> None:
        self.reset()

    def fn(self, meters: Any) -> int:
        """Return the size, the value that a derived meter has for fairseq."""
        return len(self)

    def __len__(self) -> int:
        raise NotImplementedError


def gather(meter_class: Type[GatheringMeter], key: str, *values: Any) -> None:
    """Log the values of a batch with a meter in every active aggregator.

    fairseq validates under a new root, which it reports, and keeps an aggregator "valid" for ever:
    where the root has no such meter yet, a validation begins, and earlier ones are let go.

    Args:
        meter_class: makes the meters.
        key: their name in the log.
        values: for their ``update``.
    """
    active = metrics.get_active_aggregators()
    if key not in active[0]:
        for meters in active:
            if key in meters:
                meters[key].reset()
    metrics.log_custom(meter_class, key, *values)
