"""Where values go beside the record on disk, a file for each."""

from packext.diagnostics.sinks.tensorboard import TensorBoard as TensorBoard
from packext.diagnostics.sinks.wandb import WandB as WandB
