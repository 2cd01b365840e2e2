"""What can go wrong for a user. Every message names the thing and the remedy."""


class TopiaristError(Exception):
    """Root of all errors that a user can mend; the command line exits with code 2 on it."""


class ModelError(TopiaristError):
    """The model file is missing, broken, or has something that can't be compiled."""


class TargetError(TopiaristError):
    """The target is unknown, or this machine can't run code built for it."""


class BundleError(TopiaristError):
    """A bundle is missing, altered, or was built for another machine or version."""


class OutputError(TopiaristError):
    """A result can't be written where it was asked for."""


class BuildError(TopiaristError):
    """A kernel or a network failed to compile."""


class GpuError(TopiaristError):
    """A GPU failed: it has too little memory, or could not launch or finish a kernel."""


class TuningLogError(TopiaristError):
    """A tuning log is altered or unreadable, or was written by a newer version."""


class NewerLogError(TuningLogError):
    """A tuning record is of a schema that this version does not know; an upgrade reads it."""


class MissingRecordsError(TopiaristError):
    """A tuning log that was named is not there, or lacks records that were needed."""


class CostModelError(TopiaristError):
    """A latency model is broken, was made for something else, or has too little to learn from."""


class BudgetError(TopiaristError):
    """A latency was asked for that no choice of levels reaches."""


class ProfileError(TopiaristError):
    """A profile, the file with a level for each layer, is missing or has a line that is wrong."""


class CalibrationError(TopiaristError):
    """Calibration images don't fit the model, are too few, or leave a layer without statistics."""


class BoardError(TopiaristError):
    """A board, or the tracker that knows it, can't be reached, doesn't fit, or has failed."""


class TrainingError(TopiaristError):
    """A network can't be trained as asked, training diverged, or its checkpoint doesn't fit."""
