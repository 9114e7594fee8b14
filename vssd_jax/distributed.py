"""Several processes that train one model."""

import faulthandler
import time

import jax

from vssd_jax.errors import UserError

# How long a silent process is waited for, in seconds.
_HEARTBEAT_TIMEOUT = 30
# What the others may need to see for themselves that one has ended, in seconds.
_GRACE = 5


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; before anything else is computed.

    Args:
      coordinator: host:port of process 0; None leaves all three to what JAX finds in the
        environment (SLURM, Kubernetes, Open MPI, TPU).
      num_processes, process_id: how many, and which of them this one is.

    Raises:
      UserError: nothing was found, or the others cannot be reached.
    """
    # JAX ends a process that lost the others with a line that says so; no page of stacks after it.
    faulthandler.disable()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            # All devices of the machine belong to this process, unless a cluster says otherwise.
            cluster_detection_method=None if coordinator is None else "deactivate",
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of the run cannot be joined: {str(error).splitlines()[0]}; outside of "
            "SLURM, Kubernetes, Open MPI and TPUs give --coordinator=HOST:PORT, --num_processes "
            "and --process_id"
        ) from error


def outlive_others() -> None:
    """Process 0 coordinates the others: after a failure it must end last.

    Without it JAX aborts them, and what each has to say is lost.
    """
    if is_main():
        time.sleep(_GRACE)


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints once for all processes."""
    if is_main():
        print(text, flush=True)


def failure(error: Exception) -> str | None:
    """A line for an error that a process has when another one of its run ends; else None."""
    if jax.process_count() == 1:
        return None
    text = str(error).splitlines()[0] if str(error) else ""
    if not isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" not in text:
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()} cannot go on, probably since "
        f"another one ended ({text[:200]}); start them all again, and the run resumes"
    )
