"""Training: the loop, its checkpoints and records, and embeddings of whole image lists."""

from fastreid_vi.train.checkpoint import load_weights
from fastreid_vi.train.distributed import rank
from fastreid_vi.train.embed import embed_all, load_embeddings, save_embeddings
from fastreid_vi.train.errors import (
    CheckpointError,
    Interrupted,
    NonFiniteLoss,
    StoppedElsewhere,
    TrainError,
)
from fastreid_vi.train.keeper import TrainResult
from fastreid_vi.train.loop import train
from fastreid_vi.train.record import RunRecord, read_run
from fastreid_vi.train.state import seed_everything
from fastreid_vi.train.step import choose_device
from fastreid_vi.train.validate import TrainingSplit, training_split

__all__ = [
    "CheckpointError",
    "Interrupted",
    "NonFiniteLoss",
    "RunRecord",
    "StoppedElsewhere",
    "TrainError",
    "TrainResult",
    "TrainingSplit",
    "choose_device",
    "embed_all",
    "load_embeddings",
    "load_weights",
    "rank",
    "read_run",
    "save_embeddings",
    "seed_everything",
    "train",
    "training_split",
]
