"""Whether several servers, and the runs before this one, all compute the same model.

A name proves little. The first tokens of the data set's first dialogue are the probe: every server's log-probabilities
for them must be those of the first server, of the shards made before, and of the model's weights where they are here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fusechat.artifact import Json
from fusechat.checkpoint import open_checkpoint
from fusechat.errors import DataError
from fusechat.extract.task import Task

log = logging.getLogger(__name__)

PROBE_TOKENS = 32
# Two servers of one model differ by rounding, hundredths of a nat at most; two models differ by tenths and more.
_TOLERANCE_NATS = 0.1
_LOCAL_WEIGHTS_BYTES = 4 << 30  # more is not worth loading for 32 tokens


class Probe:
    """The probe's log-probabilities as first seen; shared by the threads that talk to servers."""

    def __init__(self, task: Task, earlier: Sequence[Json]) -> None:
        self.ids = np.array(task.probe, dtype=np.int32)
        self._lock = threading.Lock()
        self._task = task
        self._expected: npt.NDArray[np.float64] | None = None
        self._whose = ""
        for engine in earlier:
            if "probe" in engine:
                self._expected, self._whose = np.array(engine["probe"]), f"the shards made by {engine['url']}"

    def check(self, url: str, logprobs: npt.NDArray[np.float32]) -> None:
        """Compare a server's log-probabilities of the probe's tokens, float32[T−1]; raises DataError naming both."""
        with self._lock:
            if self._expected is None:
                self._expected, self._whose = self._local(), f"the weights in {self._task.directory}"
            if self._expected is None:
                self._expected, self._whose = logprobs.astype(np.float64), url
            apart = float(np.abs(logprobs - self._expected).mean())
        if not apart <= _TOLERANCE_NATS:
            raise DataError(
                f"{url} serves another model than {self._whose}: on the same {len(self.ids)} tokens their "
                f"log-probabilities are {apart:.2f} nats apart; correct the URL or the model"
            )

    def _local(self) -> npt.NDArray[np.float64] | None:
        directory = self._task.directory
        if self._task.quantized or not any(directory.glob("*.safetensors")):
            return None
        if sum(file.stat().st_size for file in open_checkpoint(directory).files) > _LOCAL_WEIGHTS_BYTES:
            log.info("%s is not loaded to check the servers against: too large", directory)
            return None
        import torch

        from fusechat.model import load_model

        model = load_model(
            directory, dtype=self._task.dtype, device="cpu", trust_remote_code=self._task.config.trust_remote_code
        )
        ids = torch.from_numpy(self.ids.astype(np.int64))
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), dim=-1)
        return np.asarray(logprobs.gather(1, ids[1:, None])[:, 0].numpy())
