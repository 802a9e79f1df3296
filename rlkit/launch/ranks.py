"""`python -m rlkit.launch.ranks N COMMAND ...`: a command of rlkit on N ranks, under the supervisor's eyes.

torch's launcher runs in this process, which answers the supervisor for all ranks. (accelerate's starts one, on a CPU.)
"""

import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from rlkit.launch.supervisor import END_S, follow


def stop(number: int, _: object) -> None:
    """Pass SIGTERM on and wait."""
    signal.signal(number, signal.SIG_IGN)  # the end of the supervisor's pulse is a second one: it would end the waiting
    raise SignalException("the ranks are asked to end", signal.Signals(number))


def main() -> None:
    """Until all ranks have ended; one that fails ends the others, and this process with its status, or 1."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's launcher would set it, with a warning
    os.environ |= {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{END_S:.0f}"}
    signal.signal(signal.SIGTERM, stop)
    follow()
    count, *command = sys.argv[1:]
    try:
        run.main(["--standalone", "--nproc-per-node", count, "-m", "rlkit", *command])
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        sys.exit(max(1, error.get_first_failure()[1].exitcode))


if __name__ == "__main__":
    main()
