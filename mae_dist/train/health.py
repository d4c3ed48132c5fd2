"""When numbers are too bad to go on."""


class TrainingDiverged(RuntimeError):
    """The run stopped itself: too many updates in a row had a non-finite loss or gradient."""


def check_skipped(in_row: int, limit: int, step: int) -> None:
    """Raise TrainingDiverged when `limit` updates in a row were skipped by `step`. The weights are still good."""
    if in_row >= limit:
        raise TrainingDiverged(
            f"{in_row} updates in a row up to step {step} were skipped: loss or gradient not finite. The weights are "
            "unharmed (none of these was applied). Lower optim.blr, set optim.clip_grad (1.0), or use "
            "train.precision bf16 or fp32, and resume"
        )
