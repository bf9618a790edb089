"""The machines of a run: reading TF_CONFIG, and waiting until all of them can be reached.

TensorFlow connects the workers in one C++ call (`TFE_EnableCollectiveOps` of TensorFlow 2.20).
During that call no Python code runs, SIGTERM is ignored, and if a worker never starts, the call
waits for an hour without a message. The same is true of a TPU that cannot be reached. Therefore the
processes first connect to each other here, over plain sockets, and TensorFlow connects only when
all of them are present.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator

from inputs.errors import InputError

JOBS = ("chief", "worker")
EXAMPLE = (
    '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'
)
POLL_SECONDS = 1.0
REPEAT_SECONDS = 60.0  # between two log lines about the same missing workers
ANSWER_SECONDS = 5.0  # timeout of one connection attempt or message
MAX_LINE = 65536  # bytes of a message


@dataclasses.dataclass(frozen=True)
class Worker:
    """A process of the cluster.

    Attributes:
        job: "chief" or "worker".
        index: its index in the job.
        host: name or address of its machine.
        port: port of its TensorFlow server.
    """

    job: str
    index: int
    host: str
    port: int

    def __str__(self):
        return f"{self.job} {self.index} ({self.host}:{self.port})"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The cluster that TF_CONFIG describes.

    Attributes:
        workers: all processes. The first one is the chief: the others connect to it.
        own: index of this process in `workers`.
    """

    workers: tuple[Worker, ...]
    own: int


def read_cluster() -> Cluster | None:
    """Reads the environment variable TF_CONFIG; returns None if it is not set.

    Raises:
        InputError: it is not JSON, or does not describe a cluster that contains this process.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"is not JSON ({error})") from None
    config = config if isinstance(config, dict) else {}
    cluster, task = config.get("cluster"), config.get("task")
    if not isinstance(cluster, dict) or not any(cluster.get(job) for job in JOBS):
        raise _wrong("names no cluster of workers")
    workers = []
    for job in sorted(cluster):  # "chief" first
        if job not in JOBS:
            raise _wrong(
                f"has a job {job!r}; only chief and worker are supported, and they evaluate, too"
            )
        workers += _read_job(job, cluster[job])
    places = [(worker.host, worker.port) for worker in workers]
    for host, port in places:
        if places.count((host, port)) > 1:
            raise _wrong(f"gives the address {host}:{port} to two workers")
    job, index = (task.get("type"), task.get("index")) if isinstance(task, dict) else (None, None)
    if job == "evaluator":
        raise _wrong("starts an evaluator; the workers evaluate, so no such process is needed")
    own = [i for i, w in enumerate(workers) if (w.job, w.index) == (job, _as_index(index))]
    if not own:
        raise _wrong(
            f"says that this process is {job!r} number {index!r}, which is not in its cluster"
        )
    return Cluster(tuple(workers), own[0])


def _wrong(what: str) -> InputError:
    return InputError(f"TF_CONFIG {what}. Write it like {EXAMPLE}, or unset it.")


def _as_index(index) -> int | None:
    """An index as an integer; launchers that fill it in with a template write a string."""
    if isinstance(index, str) and index.isascii() and index.isdecimal():
        return int(index)
    return index if isinstance(index, int) and not isinstance(index, bool) else None


def _read_job(job: str, addresses) -> list[Worker]:
    if not isinstance(addresses, list) or not all(isinstance(a, str) for a in addresses):
        raise _wrong(f"gives no list of addresses for {job!r}")
    workers = []
    for index, address in enumerate(addresses):
        parsed = parse_address(address)
        if parsed is None:
            raise _wrong(f"has the address {address!r}, which is not host:port")
        workers.append(Worker(job, index, *parsed))
    return workers


def parse_address(text: str) -> tuple[str, int] | None:
    """(host, port) of "host:port" or "[IPv6]:port"; None if the text is something else."""
    host, _, port = text.strip().rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    valid = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if not valid or not bare or "/" in host or (":" in bare and bare == host):
        return None
    return bare, int(port)


def wait_until_reachable(tpu: str, seconds: float, log: Callable[[str], object]) -> bool:
    """Waits for the TPU's address, or for the workers of TF_CONFIG. Returns at once without them.

    Args:
        tpu: value of `--tpu`.
        seconds: how long to wait.
        log: receives lines that name the missing machines.

    Returns:
        Whether the run needs other machines.

    Raises:
        InputError: a machine could not be reached in time, TF_CONFIG is invalid, or the port that
            it gives to this process is in use.
    """
    end = time.monotonic() + seconds
    if tpu == "local":
        return False
    if tpu:
        for address in tpu_addresses(tpu):
            _wait_for_tpu(tpu, address, seconds, end, log)
        return True
    cluster = read_cluster()
    if cluster is None or len(cluster.workers) == 1:
        return False
    _Meeting(cluster, seconds, end, log).run()
    return True


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends the process if the block takes too long, even if the block is a call into C++.

    During the block, SIGINT (Ctrl-C) ends the process without a `KeyboardInterrupt`. Use this only
    in the main thread.

    Args:
        seconds: the longest time that the block may take.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open(os.devnull, "w") as nowhere:  # for the stack trace
        # Its timer is a C thread, so it can end the process while C++ code holds the GIL.
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGINT, previous)


# TPUs


def tpu_addresses(tpu: str) -> list[tuple[str, int]]:
    """The addresses (host, port) in `--tpu`; an empty list if it is the name of a TPU."""
    parts = [parse_address(part.strip().removeprefix("grpc://")) for part in tpu.split(",")]
    return [part for part in parts if part]


def _wait_for_tpu(tpu, address, seconds, end, log):
    host, port = address
    said = False
    while True:
        try:
            with socket.create_connection(address, timeout=ANSWER_SECONDS):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise InputError(
                f"--tpu={tpu}: nothing answered at {host}:{port} for {seconds:g} s ({reason}). "
                "Check the address and that the TPU has started; --connect_seconds waits longer."
            )
        if not said:
            log(f"Waiting for --tpu={tpu} ({reason}), for at most {seconds:g} s")
            said = True
        time.sleep(POLL_SECONDS)


# Workers


class _Meeting:
    """The chief listens until all other workers have connected, then tells them to continue.

    Messages are lines of JSON. A worker sends {"worker": its index in `Cluster.workers`}. The chief
    sends {"missing": [names]} whenever that changes, with an empty list at the end, or {"error":
    sentence}.
    """

    def __init__(self, cluster: Cluster, seconds, end, log):
        self._workers = cluster.workers
        self._own = cluster.own
        self._seconds = seconds
        self._end = end
        self._log = log
        self._said = "", 0.0

    def run(self) -> None:
        with self._listen() as server:
            if self._own == 0:
                self._lead(server)
                return
        self._join()

    def _listen(self) -> socket.socket:
        """Opens a socket at this process's port, to check that TensorFlow will be able to."""
        own = self._workers[self._own]
        try:
            if socket.has_dualstack_ipv6():
                with contextlib.suppress(OSError):  # IPv6 is switched off, or the port is in use
                    return socket.create_server(
                        ("", own.port), family=socket.AF_INET6, dualstack_ipv6=True
                    )
            return socket.create_server(("", own.port))
        except OSError as error:
            raise InputError(
                f"TF_CONFIG: {own}, this process, cannot open its port ({error.strerror}). End "
                "the process that uses it, or choose another port."
            ) from None

    def _wait_for(self, missing: list[str], note: str = "") -> None:
        """Logs the missing workers, on changes and once a minute; raises after the time limit."""
        names = ", ".join(missing) + note
        now = time.monotonic()
        if now > self._end:
            raise InputError(
                f"TF_CONFIG: {names} did not come within {self._seconds:g} s. Start the same "
                "command on all workers, and check that their addresses can be reached; "
                "--connect_seconds waits longer."
            )
        said, when = self._said
        if said != names or now > when + REPEAT_SECONDS:
            self._log(f"Waiting for {names}, for at most {self._end - now:.0f} s")
            self._said = names, now

    def _lead(self, server) -> None:
        arrived: dict[int, socket.socket] = {}
        told: dict[int, list[str]] = {}
        try:
            while True:
                missing = [str(w) for i, w in enumerate(self._workers) if i and i not in arrived]
                for i, connection in arrived.items():
                    if told.get(i) != missing:
                        _send(connection, missing=missing)
                        told[i] = missing
                if not missing:
                    return
                self._wait_for(missing)
                ready, _, _ = select.select([server, *arrived.values()], [], [], POLL_SECONDS)
                for i in [i for i, connection in arrived.items() if connection in ready]:
                    arrived.pop(i).close()  # workers send only one message, so this one has closed
                    told.pop(i, None)
                if server in ready:
                    self._welcome(server.accept()[0], arrived)
        except InputError as error:
            for connection in arrived.values():
                _send(connection, error=str(error))
            raise
        finally:
            for connection in arrived.values():
                connection.close()

    def _welcome(self, connection, arrived) -> None:
        """Adds a worker to `arrived`, or closes the connection of anything else."""
        connection.settimeout(ANSWER_SECONDS)
        i = None
        with contextlib.suppress(OSError):
            i = (_receive(connection) or {}).get("worker")
        if not isinstance(i, int):  # another program
            connection.close()
            return
        if 0 < i < len(self._workers) and i not in arrived:
            arrived[i] = connection
            return
        if i in arrived:
            _send(
                connection,
                error=f"TF_CONFIG: another process is {self._workers[i]} already. Give each "
                "process its own index.",
            )
        connection.close()

    def _join(self) -> None:
        chief = self._workers[0]
        while True:
            note = " (another program answers there)"
            try:
                address = chief.host, chief.port
                with socket.create_connection(address, timeout=ANSWER_SECONDS) as connection:
                    _send(connection, worker=self._own)
                    if self._follow(connection):
                        return
            except OSError as error:
                note = f" ({error.strerror or error})"
            self._wait_for([str(chief)], note)
            time.sleep(POLL_SECONDS)

    def _follow(self, connection) -> bool:
        """Waits for the other workers; False if another program answers at the chief's address.

        Raises:
            OSError: the connection was closed.
        """
        missing = [str(self._workers[0])]
        while missing:
            self._wait_for(missing)
            ready, _, _ = select.select([connection], [], [], POLL_SECONDS)
            if ready:
                message = _receive(connection)
                if message is None:
                    return False
                if "error" in message:
                    raise InputError(message["error"])
                missing = message.get("missing", missing)
        return True


def _send(connection, **message) -> None:
    with contextlib.suppress(OSError):  # if the connection is closed, the next read fails
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection) -> dict | None:
    """Returns the next message; None if something else was sent.

    Raises:
        OSError: the connection is closed, or no complete line arrived in time.
    """
    # Unbuffered, so that the next message is left for the next call.
    with connection.makefile("rb", buffering=0) as stream:
        line = stream.readline(MAX_LINE)
    if not line:
        raise ConnectionError("it has ended")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
