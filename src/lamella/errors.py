"""The one exception family: every message is one line that says what, where and the mend."""


class LamellaError(Exception):
    """Something the user can mend; the command line prints the message and exits with 2."""


class ArchitectureError(LamellaError):
    """A model that the family table does not know, or a feature that its family does not have."""


class PlanError(LamellaError):
    """A plan that is malformed, or that does not fit the model it is applied to."""


class CacheError(LamellaError):
    """A key-value cache that the plan cannot run with."""


class CalibrationError(LamellaError):
    """Calibration or evaluation text that is missing, too short, or from the wrong split."""


class NumericsError(LamellaError):
    """Activations or distances that are not finite, named by site."""


class CheckpointError(LamellaError):
    """A model folder that is missing, damaged, unsafe or incomplete."""


class ExportError(LamellaError):
    """An output folder that cannot be written: it exists, or the disk has no room."""


class MethodError(LamellaError):
    """An unknown method, or an option that the method does not take."""


class DownloadError(LamellaError):
    """Something that must come from the network did not."""


class BudgetError(LamellaError):
    """A target that no plan of the series reaches."""


class TrainingError(LamellaError):
    """Training that cannot start, go on from its checkpoint, or stay finite."""
